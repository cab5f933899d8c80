"""SGLang servers as child processes: started, watched, restarted, stopped.

A server runs in its own virtual environment (SGLang pins another torch), its own process group and
its own working directory, and logs to a file. Its parent is a guard (rollout/guard.py), a small
process that ends it when the trainer ends, however it ends.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx

from tercet.rollout import exchange, guard
from tercet.rollout.exchange import Again, Refused

HOST = "127.0.0.1"
POLL_S = 0.5
POLL_TIMEOUT_S = 5.0
HUNG_S = 30.0
"""A server that does not answer for this long hangs."""
STOP_S = 4 * guard.STOP_S
"""Longest that a guard takes to end its server."""
LOG_LINES = 20
"""Lines of the server's log that an error shows."""
TORCHRUN = ("TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_")
"""Beginnings of the variables that torchrun sets; a server that has them waits for ever."""
API_KEY = "TERCET_API_KEY"
"""Variable with the key of the servers."""
DECIDING = ("SGLANG_", "SGL_", "VLLM_")
"""Beginnings of the variables that change what a server computes or replies. They are not passed
on: a run is described by its options alone."""


class ServerError(RuntimeError):
    """A server that does not start, does not answer, or gives a wrong answer."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status
        """HTTP status of the answer, where there was one."""


class Server:
    """One SGLang server, on this machine's loopback address.

    Args:
        model_path: Hugging Face folder that the server loads.
        python: Python of the environment in which sglang is installed.
        work_dir: the server's working directory; its log is `sglang.log` in it.
        arguments: further flags of `sglang.launch_server`, passed on as they are.
        port: port to listen on; None: a free one.
        api_key: when given, every client must send it. It stands in the server's environment, not
            on its command line.
        start_timeout_s: how long loading may take.
        environment: variables set on top of the trainer's.
        weight_folders: where the trainer's weights are removed when it has been killed.
        check_stop: called while a start is waited for; raises where the run is to stop.

    Raises:
        ValueError: no such Python, or no model in the folder.
    """

    def __init__(
        self,
        model_path: str | Path,
        python: str | Path,
        work_dir: str | Path,
        *,
        arguments: Sequence[str] = (),
        port: int | None = None,
        api_key: str | None = None,
        start_timeout_s: float = 600.0,
        environment: dict[str, str] | None = None,
        weight_folders: Sequence[Path] = (),
        check_stop: Callable[[], None] = lambda: None,
    ):
        self.model_path, self.python = Path(model_path).resolve(), Path(python).absolute()
        self.work_dir, self.arguments = Path(work_dir).resolve(), tuple(arguments)
        self.port = port if port is not None else free_ports(1)[0]
        self.api_key = api_key
        self.start_timeout_s = start_timeout_s
        self.environment = environment or {}
        self.weight_folders, self.check_stop = tuple(weight_folders), check_stop
        self.log_path = self.work_dir / "sglang.log"
        self._process: subprocess.Popen | None = None
        self._shared: set[Path] = set()
        """Its files in shared memory."""
        if not self.python.is_file() or not os.access(self.python, os.X_OK):
            raise ValueError(
                f"rollout.sglang_python: {self.python} is no program that can be started; give "
                "ENV/bin/python of the environment with sglang"
            )
        if not (self.model_path / "config.json").exists():
            raise ValueError(f"the server cannot load {self.model_path}: it holds no config.json")

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://{HOST}:{self.port}"

    @property
    def process_group(self) -> int | None:
        """Id of its process group; None when it is not started."""
        return None if self._process is None else self._process.pid

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and wait until it answers.

        Raises:
            ServerError: the port is taken, or, with the end of the log, the server ended or did not
                answer in time.
        """
        if self.is_running():
            return
        _require_free(self.port)
        self.work_dir.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            if left_out := [name for name in os.environ if name.startswith(DECIDING)]:
                log.write(f"tercet: not passed on: {', '.join(left_out)}\n".encode())
                log.flush()
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.work_dir,
                env=self._environment(),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        atexit.register(self.stop)  # an orderly end; the guard is for all other ends
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        self._shared = guard.shared_files(guard.members(self._process.pid))

    def is_running(self) -> bool:
        """Whether the process is alive; it may hang all the same."""
        return self._process is not None and self._process.poll() is None

    def is_healthy(self, timeout_s: float = HUNG_S) -> bool:
        """Whether it runs and answers in time; a busy server may be slow to answer."""
        if not self.is_running():
            return False
        try:
            exchange.wait(exchange.submit(self._ask_health(timeout_s)), self.check_stop)
            return True
        except (httpx.HTTPError, Again, Refused):
            return False

    def restart(self) -> None:
        """Stop its processes, if any, and start it again on the same port."""
        self.stop()
        self.start()

    def stop(self) -> None:
        """End all its processes, and remove what they left in shared memory."""
        process, self._process = self._process, None
        if process is None:
            return
        atexit.unregister(self.stop)
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            pass  # the guard hangs too
        guard.end_group(process.pid, 0.0, self._shared)
        process.wait()
        process.stdin.close()

    def log_tail(self) -> str:
        """The last lines of its log."""
        if not self.log_path.exists():
            return ""
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-LOG_LINES:])

    def _command(self) -> list[str]:
        command = [sys.executable, "-I", guard.__file__, *map(str, self.weight_folders), "--"]
        command += [str(self.python)]
        command += ["-c", guard.START] if self.api_key else ["-m", "sglang.launch_server"]
        command += ["--model-path", str(self.model_path), "--host", HOST]
        return [*command, "--port", str(self.port), *self.arguments]

    async def _ask_health(self, timeout_s: float) -> None:
        async with exchange.open_client() as client:
            await exchange.exchange(client, "GET", f"{self.url}/health", seconds=timeout_s)

    def _environment(self) -> dict[str, str]:
        # SGLang cannot release memory with expandable segments, which this variable may ask for.
        dropped = ("PYTORCH_CUDA_ALLOC_CONF", API_KEY)
        variables = {
            name: value
            for name, value in os.environ.items()
            if name not in dropped and not name.startswith(TORCHRUN + DECIDING)
        }
        variables |= {"PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
        # Cached features of photos would be those of an earlier vision tower.
        variables["SGLANG_VLM_CACHE_SIZE_MB"] = "0"
        if self.api_key:
            variables[guard.SERVER_KEY] = self.api_key
        variables["GLOO_SOCKET_IFNAME"] = "lo"
        return variables | self.environment

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + self.start_timeout_s
        while not self.is_healthy(POLL_TIMEOUT_S):
            self.check_stop()
            if not self.is_running():
                code = self._process.returncode if self._process else "none: it was stopped"
                raise ServerError(f"{self.url} ended with code {code}:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise ServerError(
                    f"{self.url} did not answer in {self.start_timeout_s:.0f} s:\n{self.log_tail()}"
                )
            time.sleep(POLL_S)


def start_all(servers: Sequence[Server]) -> None:
    """Start servers, all at the same time; if one does not start, all are stopped."""
    with ThreadPoolExecutor(max(1, len(servers))) as pool:
        starts = [pool.submit(server.start) for server in servers]
    try:
        for start in starts:
            start.result()
    except BaseException:
        stop_all(servers)
        raise


def stop_all(servers: Sequence[Server]) -> None:
    """Stop servers, all at the same time."""
    with ThreadPoolExecutor(max(1, len(servers))) as pool:
        list(pool.map(Server.stop, servers))


def free_ports(count: int) -> list[int]:
    """Different ports that nothing listens on at the moment."""
    with ExitStack() as probes:
        ports = []
        for _ in range(count):
            probe = probes.enter_context(socket.socket())
            probe.bind((HOST, 0))
            ports.append(probe.getsockname()[1])
    return ports


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ServerError(f"port {port} of {HOST} is taken: {error}") from None
