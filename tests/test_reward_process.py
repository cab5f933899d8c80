"""A reward function in a process of its own: found, called, and ended whatever it does."""

import asyncio
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tercet.core.reward_calls import find_function
from tercet.core.reward_process import RewardProcess
from tercet.core.rewards import call_reward, load_reward

pytestmark = pytest.mark.core


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current directory whose modules are forgotten after the test."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_functions_of_the_current_directory(folder):
    (folder / "my_reward.py").write_text("def length(rows): return [{'overall': 4.0}]\n")
    (folder / "my_pack").mkdir()
    (folder / "my_pack" / "__init__.py").write_text("")
    (folder / "my_pack" / "base.py").write_text("VALUE = 5.0\n")
    (folder / "my_pack" / "deep.py").write_text(
        "from .base import VALUE\ndef f(rows): return [{'overall': VALUE}]\n"
    )
    path = list(sys.path)
    assert find_function("my_reward:length")([{}]) == [{"overall": 4.0}]
    assert find_function("my_pack.deep:f")([{}]) == [{"overall": 5.0}]
    assert find_function("my_reward:length") is find_function("my_reward:length")
    assert sys.path == path


def test_functions_that_cannot_be_loaded(folder):
    (folder / "broken_reward.py").write_text("import no_such_module_here\n")
    (folder / "my_reward.py").write_text("limit = 3\n")
    (folder / "leaving.py").write_text("import sys; sys.exit(0)\n")
    (folder / "bare_folder").mkdir()
    (folder / "bare_folder" / "inner.py").write_text("def f(rows): return []\n")
    for spec, message in [
        ("no_such_reward:f", "No module named 'no_such_reward'"),
        ("broken_reward:f", "No module named 'no_such_module_here'"),
        ("bare_folder.inner:f", "No module named 'bare_folder'"),
        ("leaving:f", r"'leaving' .* failed: SystemExit\(0\)"),
        ("my_reward:missing", r"my_reward\.py has no function 'missing'"),
        ("my_reward:limit", r"my_reward\.py has no function 'limit'"),
    ]:
        with pytest.raises(ValueError, match=message):
            find_function(spec)
    assert find_function("math:hypot") is math.hypot
    assert "broken_reward" not in sys.modules and "bare_folder" not in sys.modules


MODULE = """
import asyncio, ctypes, os, re, signal, subprocess, sys, time
calls = []

def counts(rows):
    calls.append(rows)
    return [{"overall": len(calls), "pid": os.getpid(), "torch": "torch" in sys.modules,
             "same": rows[0]["names"] == ("auk", "gull")} for _ in rows]

def by_word(rows):
    word = rows[0]["response"]
    if word == "raise": raise KeyError(word)
    if word == "exit": sys.exit(0)
    if word == "exit at once": os._exit(0)
    if word == "crash": ctypes.string_at(0)
    if word == "kill": os.kill(os.getpid(), signal.SIGKILL)
    if word == "loop":
        while True: pass
    if word == "hang in C": re.match("(a+)+$", "a" * 60 + "b")
    if word == "sleep": time.sleep(600)
    if word == "child":
        child = subprocess.Popen(["sleep", "600"])
        open("child", "w").write(str(child.pid))
        time.sleep(600)
    if word == "key": return [{"overall": 1, 3: 4} for _ in rows]
    if word == "type": return [{type("T", (str,), {})("overall"): type("F", (float,), {})(1)}]
    return [{"overall": 1.0, "pid": os.getpid()} for _ in rows]

async def later(rows):
    word = rows[0]["response"]
    if word == "raise": raise asyncio.CancelledError
    if word == "cancel":
        asyncio.current_task().cancel()
        await asyncio.sleep(9)
    if word == "block": time.sleep(600)
    if word == "task":
        async def leave(): sys.exit(0)
        asyncio.create_task(leave())
    if word != "well": await asyncio.sleep(600)
    return [{"overall": 1.0} for _ in rows]
"""


def rows(word="well", group="0.3.a"):
    return [{"response": word, "group_id": group, "names": ("auk", "gull")}]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Opens a function of MODULE, once for all tests."""
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "module_of_rewards.py").write_text(MODULE)
    before, opened = Path.cwd(), {}
    os.chdir(folder)

    def open_one(name: str) -> RewardProcess:
        opened.setdefault(name, load_reward(f"module_of_rewards:{name}"))
        return opened[name]

    yield open_one
    for reward in opened.values():
        reward.close()
    os.chdir(before)


def call(function, batch, timeout_s=30.0):
    return asyncio.run(call_reward(function, batch, timeout_s))


def test_one_process_serves_all_calls_and_keeps_its_state(opened):
    first, second = (call(opened("counts"), rows())[0] for _ in range(2))
    assert (first["overall"], second["overall"]) == (1, 2)
    assert first["pid"] == second["pid"] != os.getpid()
    assert (first["torch"], first["same"]) == (0, 1)


@pytest.mark.parametrize(
    "name, word, timeout_s, fault",
    [
        ("by_word", "raise", 30, r"it raised KeyError\('raise'\)"),
        ("by_word", "exit", 30, r"it raised SystemExit\(0\)"),
        (
            "by_word",
            "exit at once",
            30,
            "its process ended with exit code 0 while",
        ),
        ("by_word", "crash", 30, "its process ended by SIGSEGV while it worked on 0.3.a"),
        ("by_word", "kill", 30, "its process ended by SIGKILL while it worked on 0.3.a"),
        ("by_word", "loop", 0.5, "no result within 0.5 s .*, its process was killed"),
        ("by_word", "hang in C", 0.5, "no result within 0.5 s .*, its process was killed"),
        ("by_word", "key", 30, "response 0: a metric's name must be a text, got 3"),
        ("later", "raise", 30, r"it raised CancelledError\(\)"),
        ("later", "cancel", 30, "it was cancelled"),
        ("later", "task", 30, "its process ended with exit code 0 while it worked on 0.3.a"),
        ("later", "block", 0.5, "no result within 0.5 s .*, its process was killed"),
        ("later", "sleep", 0.5, "no result within 0.5 s .*, its process was killed"),
    ],
)
def test_whatever_a_function_does_is_an_error_that_names_it(opened, name, word, timeout_s, fault):
    """And the next call is served, by another process where this one has ended."""
    reward = opened(name)
    pattern = rf"^reward function 'module_of_rewards:{name}', group 0\.3\.a: {fault}"
    with pytest.raises(ValueError, match=pattern):
        call(reward, rows(word), timeout_s)
    assert call(reward, rows())[0]["overall"] == 1.0


def test_subclasses_of_text_and_number_come_back_as_plain_ones(opened):
    (result,) = call(opened("by_word"), rows("type"))
    assert result == {"overall": 1.0} and type(*result) is str and type(*result.values()) is float


def test_groups_that_are_not_needed_any_more_are_not_waited_for(opened):
    """A group that hangs does not hold up others; once it is overdue, its process is ended."""
    reward = opened("by_word")

    async def leave_one(timeout_s: float) -> None:
        left = asyncio.create_task(call_reward(reward, rows("sleep", "left"), timeout_s))
        await asyncio.sleep(0)
        left.cancel()

    started, pids = time.monotonic(), []
    for timeout_s in (600, 0.01):
        pids.append(call(reward, rows())[0]["pid"])
        asyncio.run(leave_one(timeout_s))
    time.sleep(0.02)
    pids.append(call(reward, rows())[0]["pid"])
    assert pids[0] == pids[1] != pids[2]
    assert time.monotonic() - started < 60


def test_all_groups_of_a_process_that_ends_are_named(opened):
    reward = opened("by_word")

    async def both():
        sleeping = asyncio.create_task(call_reward(reward, rows("sleep", "first"), 30))
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match="group second: .* while it worked on first, second"):
            await call_reward(reward, rows("kill", "second"), 30)
        with pytest.raises(ValueError, match="group first: its process ended by SIGKILL"):
            await sleeping

    asyncio.run(both())


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(*pids: int) -> None:
    deadline = time.monotonic() + 30
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, pids
        time.sleep(0.02)


def test_what_the_function_started_ends_with_its_process(opened):
    with pytest.raises(ValueError, match="no result within 1 s"):
        call(opened("by_word"), rows("child"), 1)
    wait_until_gone(int(Path("child").read_text()))


@pytest.mark.parametrize("word", ["well", "loop", "hang in C"])
def test_the_process_ends_with_the_trainer(opened, word):
    """Also where that is killed and the function hangs."""
    opened("by_word")  # makes the module
    code = f"""
import asyncio, sys
from tercet.core.rewards import call_reward, load_reward
reward = load_reward("module_of_rewards:by_word")
row = {{"response": "well", "group_id": "g"}}
print(int(asyncio.run(call_reward(reward, [row]))[0]["pid"]), flush=True)
row["response"] = {word!r}
asyncio.run(call_reward(reward, [row]))
sys.stdin.read()
"""
    trainer = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    pid = int(trainer.stdout.readline())
    assert is_running(pid) and pid != trainer.pid
    time.sleep(0.2)
    trainer.send_signal(signal.SIGKILL)
    trainer.communicate(timeout=30)
    wait_until_gone(pid)


def test_closing_ends_the_process_in_order(opened, tmp_path):
    Path("tidy.py").write_text(
        "import atexit, os\n"
        f"atexit.register(open, {str(tmp_path / 'tidy')!r}, 'w')\n"
        "def f(rows): return [{'overall': os.getpid()}]\n"
    )
    reward = load_reward("tidy:f")
    (result,) = call(reward, rows())
    reward.close()
    assert not is_running(int(result["overall"])) and (tmp_path / "tidy").exists()


def test_a_pipe_is_closed_after_the_last_write_to_it(opened):
    """Else that write reaches what got the pipe's number since: the next process's pipe."""
    reward, order = load_reward("module_of_rewards:counts"), []

    class Slow:
        def __init__(self, connection):
            self.recv, self._connection = connection.recv, connection

        def send(self, request):
            time.sleep(0.2)
            order.append("write")
            self._connection.send(request)

        def close(self):
            order.append("close")
            self._connection.close()

    worker = reward._worker
    worker._connection = Slow(worker._connection)
    worker.kill()
    worker._receiver.join(30)
    assert order == ["write", "close"]


def test_an_import_that_ends_the_process_or_hangs_is_named(opened, monkeypatch):
    opened("by_word")
    Path("dying.py").write_text("import os; os._exit(3)\n")
    Path("dreaming.py").write_text("import time; time.sleep(600)\n")
    with pytest.raises(ValueError, match="'dying:f': its process ended with exit code 3 while"):
        load_reward("dying:f")
    monkeypatch.setattr("tercet.core.reward_process.LOAD_TIMEOUT_S", 0.5)
    with pytest.raises(ValueError, match="'dreaming:f': its module was not imported in"):
        load_reward("dreaming:f")
