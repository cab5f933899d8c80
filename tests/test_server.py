"""A server's process: what it is started with, what shows of it, and what it leaves.

A small program of the same name stands for SGLang.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from sglang_support import processes_in

from tercet.core.rollout_config import RolloutConfig
from tercet.rollout import guard
from tercet.rollout.launch import _make_servers, open_engine, read_api_key
from tercet.rollout.server import Server, ServerError, start_all

pytestmark = pytest.mark.core

PROGRAM = """
import os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing import Semaphore, get_context

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(int(os.environ.get("HEALTH", "200")))
        self.end_headers()

if __name__ == "__main__":
    print("arguments:", sys.argv, flush=True)
    print("variables:", *sorted(name for name in os.environ), flush=True)
    held = open(f"/dev/shm/tercet_test_{os.getpid()}", "w")
    lock = get_context("spawn").Lock()
    print("shared:", held.name, flush=True)
    port = int(sys.argv[sys.argv.index("--port") + 1])
    HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def make(tmp_path):
    """A maker of servers of the program."""
    (tmp_path / "lib" / "sglang").mkdir(parents=True)
    (tmp_path / "lib" / "sglang" / "launch_server.py").write_text(PROGRAM)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")

    def server(**options) -> Server:
        environment = {"PYTHONPATH": str(tmp_path / "lib")} | options.pop("environment", {})
        more = {"environment": environment, "start_timeout_s": 60.0} | options
        return Server(tmp_path / "model", sys.executable, tmp_path / "work", **more)

    return server


def semaphores() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("sem.mp-")}


def command_lines(group: int) -> str:
    return " ".join(Path(f"/proc/{p}/cmdline").read_text() for p in guard.members(group))


def test_a_key_stands_on_no_command_line_and_in_no_log(make):
    with make(api_key="geheim-1234") as server:
        assert "sglang.launch_server" in command_lines(server.process_group)
        assert "geheim" not in command_lines(server.process_group)
        log = server.log_path.read_text()
    assert "'--api-key', '********'" in log and "geheim" not in log


def test_variables_that_change_results_are_not_passed_on(make, monkeypatch):
    for name in ("SGLANG_RETURN_ORIGINAL_LOGPROB", "SGL_X", "RANK", "TERCET_API_KEY"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SGLANG_VLM_CACHE_SIZE_MB", "100")
    monkeypatch.setenv("HARMLESS", "1")
    with make() as server:
        log = server.log_path.read_text()
        assert server._environment()["SGLANG_VLM_CACHE_SIZE_MB"] == "0"
    passed = log.partition("variables:")[2].split("\n")[0].split()
    assert "HARMLESS" in passed and "SGLANG_VLM_CACHE_SIZE_MB" in passed
    assert not {"SGLANG_RETURN_ORIGINAL_LOGPROB", "SGL_X", "RANK", "TERCET_API_KEY"} & {*passed}
    assert "not passed on: " in log and "SGLANG_RETURN_ORIGINAL_LOGPROB" in log.split("\n")[0]


@pytest.mark.parametrize("hangs", [False, True])
def test_a_stopped_server_leaves_nothing(make, hangs):
    server = make()
    server.start()
    group, shared = (
        server.process_group,
        server.log_path.read_text().split("shared: ")[1].split()[0],
    )
    assert Path(shared).exists() and len(guard.members(group)) == 3
    if hangs:
        os.killpg(group, signal.SIGSTOP)
    server.stop()
    assert guard.members(group) == [] and not Path(shared).exists()
    assert processes_in(server.work_dir) == []


TRAINER = """
import os, signal, sys, time
from pathlib import Path
from tercet.rollout.server import Server
from tercet.rollout import guard
from tercet.rollout import server as server_module
import fcntl, tempfile
model, work, lib, folders = map(Path, sys.argv[1:])
server = Server(model, sys.executable, work, environment={"PYTHONPATH": str(lib)},
                weight_folders=[folders])
server.start()
folder = tempfile.mkdtemp(prefix=guard.PREFIX, dir=folders)
held = os.open(folder, os.O_RDONLY)
fcntl.flock(held, fcntl.LOCK_EX)
print(server.process_group, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_trainer_leaves_nothing(make, tmp_path):
    """Neither a server nor what it shared, nor weights in memory."""
    make()
    (tmp_path / "shm").mkdir()
    before = semaphores()
    places = [str(tmp_path / name) for name in ("model", "work", "lib", "shm")]
    done = subprocess.run(
        [sys.executable, "-c", TRAINER, *places], capture_output=True, text=True, timeout=120
    )
    group = int(done.stdout)
    deadline = time.monotonic() + 60
    while guard.members(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert guard.members(group) == [] and list((tmp_path / "shm").iterdir()) == []
    log = (tmp_path / "work" / "sglang.log").read_text()
    assert not Path(log.split("shared: ")[1].split()[0]).exists()
    assert semaphores() <= before


def test_a_signal_ends_the_wait_for_a_server(make):
    def stop():
        raise KeyError("stopped")

    server = make(environment={"HEALTH": "503"}, check_stop=stop)
    with pytest.raises(KeyError, match="stopped"):
        start_all([server])
    assert not server.is_running() and processes_in(server.work_dir) == []


def test_a_server_that_ends_is_named_with_its_log(make):
    with pytest.raises(ServerError, match=r"ended with code 1:\n(.*\n)*.*No module named"):
        make(environment={"PYTHONPATH": ""}).start()


def config(**options) -> RolloutConfig:
    return RolloutConfig(engine="sglang", sglang_python=sys.executable, **options)


def test_what_cannot_be_a_server_is_named(make, tmp_path):
    make()
    plain = tmp_path / "text"
    plain.write_text("no program")
    for python in (tmp_path, plain, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=f"rollout.sglang_python: {python} is no program"):
            Server(tmp_path / "model", str(python), tmp_path / "work")
    with pytest.raises(ValueError, match="rollout.server_gpus needs an entry per server"):
        config(server_gpus=[])


def test_servers_compute_in_the_policys_dtype_unless_they_are_asked_otherwise(make, tmp_path):
    make()
    (tmp_path / "model").rename(tmp_path / "policy")
    for dtype in (torch.float32, torch.bfloat16):
        (server,) = _make_servers(
            config(sglang_args="--dtype half"), tmp_path, None, dtype, lambda: None
        )
        place = server.arguments.index("--dtype")
        assert server.arguments[place + 1] == str(dtype).removeprefix("torch.")
        assert server.arguments[-2:] == ("--dtype", "half")
        assert server.weight_folders == (Path("/dev/shm"), tmp_path)


def test_a_key_is_read_from_a_file_or_a_variable(tmp_path, monkeypatch):
    monkeypatch.delenv("TERCET_API_KEY", raising=False)
    assert read_api_key(config()) is None
    monkeypatch.setenv("TERCET_API_KEY", "from-variable")
    assert read_api_key(config()) == "from-variable"
    (tmp_path / "key").write_text("from-file\n")
    assert read_api_key(config(api_key_file=str(tmp_path / "key"))) == "from-file"


@pytest.mark.parametrize("content", [None, "", " \n", "geheim zwei", "geheim\x07", "gehéim"])
def test_a_bad_key_is_an_error_that_does_not_show_it(tmp_path, content):
    if content is not None:
        (tmp_path / "key").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="^rollout.api_key_file: ") as caught:
        read_api_key(config(api_key_file=str(tmp_path / "key")))
    assert "geh" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_key_among_the_options_is_refused_without_repeating_it(make, tmp_path):
    with pytest.raises(ValueError, match="rollout.api_key is refused") as caught:
        config(api_key="geheim")
    assert "geheim" not in str(caught.value)
    with pytest.raises(ValueError, match="rollout.sglang_args: a key on a command line") as caught:
        arguments = config(sglang_args="--api-key geheim")
        _make_servers(arguments, tmp_path, None, None, lambda: None)
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize("urls", [["http://a", "http://a/"], ["nowhere"], ["http://u:geheim@a"]])
def test_bad_addresses_are_errors(parts, urls, tmp_path):
    options = RolloutConfig(engine="sglang", urls=urls)
    with pytest.raises(ValueError, match=r"^rollout\.urls: ") as caught:
        open_engine(parts, None, options, tmp_path, None)
    assert "geheim" not in str(caught.value)
