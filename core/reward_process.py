"""The process in which a reward function of the user's runs, and the trainer's end of it.

The function may hang, call sys.exit or crash: the trainer goes on, kills the process and names the
group. The process imports the function's module, and torch only where that does. It has a session
of its own, so that Ctrl-C reaches the trainer alone, and ends with the trainer, however that ends.
"""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue

from tercet.core.reward_calls import Results, RewardError, Rows, find_function, results_of

LOAD_TIMEOUT_S = 600.0
"""Longest that the function's module may take to be imported."""
STOP_S = 2.0
"""Time between the request to end and SIGKILL."""
MOST_THREADS = 256
"""Calls of a plain function that run at once: those waited for, and those no longer needed."""
LOADED = 0
"""Number of the first reply: whether the function was found."""
PR_SET_PDEATHSIG = 1  # of Linux's prctl


class RewardProcess:
    """A `module:function` in a process of its own, which is started again when it has ended.

    Args:
        spec: `module:function`.

    Raises:
        ValueError: no such module or function, or its import fails or takes too long.
    """

    def __init__(self, spec: str):
        self.spec = spec
        self._worker = _Worker(spec)
        try:
            self._worker.loaded.result(LOAD_TIMEOUT_S)
        except BaseException as error:
            self._worker.kill()
            if isinstance(error, TimeoutError):
                what = f"its module was not imported in {LOAD_TIMEOUT_S:.0f} s"
                raise ValueError(f"reward {spec!r}: {what}") from error
            if isinstance(error, RewardError):
                raise ValueError(str(error)) from error
            raise

    async def call(self, rows: Rows, timeout_s: float) -> Results:
        """Checked results of the function for the rows of whole groups.

        Nothing waits for a call that was cancelled. One that then takes longer than `timeout_s` is
        ended with its process, before another call.

        Raises:
            RewardError: the function fails or takes longer than `timeout_s`, or its process ended.
        """
        if self._worker.has_ended or self._worker.hangs():
            self._worker.kill()
            self._worker = _Worker(self.spec)
        worker = self._worker
        number, reply = worker.send(rows)
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.wrap_future(reply)
        except TimeoutError as error:
            others = worker.groups(but=number)
            worker.kill()
            raise RewardError(
                f"no result within {timeout_s:g} s (rollout.reward_timeout_s), its process was "
                f"killed{f' while it also worked on {others}' if others else ''}"
            ) from error
        except asyncio.CancelledError:
            worker.leave(number, time.monotonic() + timeout_s)
            raise

    def close(self) -> None:
        """End the process, at once where a call is running."""
        self._worker.close()


@dataclass
class _Call:
    """A call whose reply is still to come."""

    group: str
    reply: Future[Results]
    overdue: float | None = None
    """When the process is taken to hang, where nobody waits for the reply any more."""


class _Worker:
    """The trainer's end of one process."""

    def __init__(self, spec: str):
        self.loaded: Future[Results] = Future()
        self.has_ended = False
        self._spec, self._fault, self._last = spec, "", LOADED
        self._calls = {LOADED: _Call("", self.loaded)}
        self._lock = threading.Lock()
        """Held where `_calls` or `has_ended` are changed."""
        self._requests: SimpleQueue = SimpleQueue()
        self._connection, theirs = Pipe()
        code = (
            f"import sys; sys.path[:] = {list(map(str, sys.path))}; "
            f"from {__name__} import serve; serve({theirs.fileno()}, {spec!r})"
        )
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._sender = threading.Thread(target=self._send_all, daemon=True)
        self._receiver = threading.Thread(target=self._receive_all, daemon=True)
        self._sender.start()
        self._receiver.start()

    def send(self, rows: Rows) -> tuple[int, Future[Results]]:
        """Ask for the results of rows; returns the number of the call and its results."""
        call = _Call(str(rows[0].get("group_id", "?")) if rows else "?", Future())
        with self._lock:
            self._last += 1
            self._calls[self._last] = call
            if self.has_ended:
                _settle(call.reply, None, "its process has ended")
        self._requests.put((self._last, rows))
        return self._last, call.reply

    def leave(self, number: int, overdue: float) -> None:
        """Tell the process that nobody waits for a call any more."""
        with self._lock:
            if number in self._calls:
                self._calls[number].overdue = overdue
        self._requests.put((number, None))

    def hangs(self) -> bool:
        """Whether a call that nobody waits for is overdue, and no other is running."""
        with self._lock:
            overdue = [call.overdue for call in self._calls.values()]
        return bool(overdue) and None not in overdue and min(overdue) < time.monotonic()

    def groups(self, but: int | None = None) -> str:
        """The groups whose rewards are being computed."""
        with self._lock:
            return ", ".join(c.group for number, c in self._calls.items() if number != but)

    def kill(self) -> None:
        """End the process and all that it started."""
        with self._lock:
            self.has_ended = True
        if self._process.poll() is None:
            _kill_group(self._process.pid)
            self._process.wait()

    def close(self) -> None:
        """End the process: at once where a call is running, else at its own pace, up to STOP_S."""
        if not self._calls:
            self._requests.put(None)
            self._receiver.join(STOP_S)
        self.kill()

    def _send_all(self) -> None:
        request = ()
        while request is not None:
            request = self._requests.get()
            try:
                self._connection.send(request)
            except OSError:
                return  # the process has ended; the other thread says so

    def _receive_all(self) -> None:
        while True:
            try:
                number, results, fault = self._connection.recv()
                with self._lock:
                    call = self._calls.pop(number)
            except Exception:  # the end, or no reply of ours: the function wrote into the pipe
                break
            if number == LOADED and fault is not None:
                self._fault = fault
            _settle(call.reply, results, fault)
        self._end()

    def _end(self) -> None:
        """Tell all who wait that the process has ended."""
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
        _kill_group(self._process.pid)  # what it started may run on
        code = self._process.returncode
        what = f"with exit code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
        what = f"its process ended {what} while it worked on {self.groups()}"
        if not self.loaded.done():
            what = f"reward {self._spec!r}: {what}its import"
        with self._lock:
            self.has_ended = True
            calls, self._calls = self._calls, {}
        for call in calls.values():
            _settle(call.reply, None, self._fault or what)
        self._requests.put(None)
        self._sender.join()  # it would write into the next process's pipe, were this closed earlier
        self._connection.close()


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass  # nothing of it is left


def _settle(reply: Future[Results], results: Results | None, fault: str | None) -> None:
    if not reply.set_running_or_notify_cancel():
        return  # nobody waits for it
    if fault is None:
        reply.set_result(results)
    else:
        reply.set_exception(RewardError(fault))


def serve(descriptor: int, spec: str) -> None:
    """The process's own work: find the function, then call it until the trainer closes the pipe."""
    os.set_inheritable(descriptor, False)
    if sys.platform == "linux":  # where the function hangs, nothing else ends it with the trainer
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    connection = Connection(descriptor)
    try:
        function = find_function(spec)
    except ValueError as error:
        connection.send((LOADED, None, str(error)))
        sys.exit(1)
    connection.send((LOADED, [], None))
    asyncio.run(_answer(connection, function))


async def _answer(connection: Connection, function: Callable) -> None:
    """Call the function for every request, several at the same time."""
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(MOST_THREADS))
    requests: asyncio.Queue = asyncio.Queue()
    threading.Thread(target=_read, args=(connection, loop, requests), daemon=True).start()
    running: dict[int, asyncio.Task] = {}
    while (request := await requests.get()) is not None:
        number, rows = request
        if rows is not None:
            reply = _reply(connection, function, number, rows, asyncio.current_task())
            task = loop.create_task(reply)
            running[number] = task
            task.add_done_callback(lambda _, number=number: running.pop(number))
        elif number in running and inspect.iscoroutinefunction(function):
            running[number].cancel()  # the thread of a plain function cannot be stopped


def _read(connection: Connection, loop: asyncio.AbstractEventLoop, requests: asyncio.Queue) -> None:
    request = ()
    while request is not None:
        try:
            request = connection.recv()
        except (EOFError, OSError):  # the trainer is gone
            os.killpg(0, signal.SIGKILL)
        loop.call_soon_threadsafe(requests.put_nowait, request)


async def _reply(
    connection: Connection, function: Callable, number: int, rows: Rows, main: asyncio.Task
) -> None:
    try:
        reply = (number, await results_of(function, rows), None)
    except RewardError as error:
        reply = (number, None, str(error))
    except asyncio.CancelledError:
        if main.cancelling():
            return  # a task that the function began has called sys.exit: the process ends
        reply = (number, None, "it was cancelled")
    connection.send(reply)
