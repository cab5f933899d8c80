"""The process between a trainer and its server: it ends the server when the trainer ends.

    python guard.py [FOLDER]... -- command of the server

It leads the server's process group and reads from a pipe of the trainer's. SIGTERM ends the server
in order. Where the pipe closes, the trainer has ended, however it ended: the server is killed and
the trainer's weights in FOLDER are removed. The server's API key is masked in its log. This file
imports nothing of ours and runs by itself.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

MASK = "********"
SERVER_KEY = "TERCET_SERVER_API_KEY"
"""Variable by which the guard hears the key; the server's command line must not show it."""
START = """
import os, runpy, sys
sys.argv += ["--api-key", os.environ.pop("TERCET_SERVER_API_KEY")]
runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
"""
"""Starts a server with the key that stands in its environment."""
MEMORY_DISK = Path("/dev/shm")
PREFIX = "tercet-weights-"
STOP_S = 2.0
"""Time between SIGTERM and SIGKILL, and for what cleans up after the killed ones."""
POLL_S = 0.05


def members(group: int) -> list[int]:
    """Processes of a group that still run."""
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                state, _, its_group = (place / "stat").read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue  # it has ended
            if int(its_group) == group and state not in "ZX":
                found.append(int(place.name))
    return found


def shared_files(processes: list[int]) -> set[Path]:
    """Files in shared memory that processes have open, without folders of weights."""
    found = set()
    for process in processes:
        try:
            for entry in Path(f"/proc/{process}/fd").iterdir():
                path = Path(os.readlink(entry))
                if path.parent == MEMORY_DISK:
                    found.add(path)
        except OSError:
            pass  # it has ended
    return found


def end(processes, seconds: float, number: int) -> None:
    """Send a signal to the processes that a function gives, and wait until there are none."""
    deadline = time.monotonic() + seconds
    sent = set()
    while left := processes():
        for process in set(left) - sent:
            _kill(process, number)
        sent |= set(left)
        if time.monotonic() > deadline:
            return
        time.sleep(POLL_S)


def end_group(group: int, seconds: float, files: set[Path] = frozenset()) -> None:
    """End all processes of a group but this one, and remove their files in shared memory.

    Python's resource trackers come last: they remove the semaphores of those that were killed.

    Args:
        group: its id.
        seconds: time that they have to end by themselves.
        files: files to remove beside those that are open now.
    """
    mine = shared_files([os.getpid()])

    def others() -> list[int]:
        return [p for p in members(group) if p != os.getpid()]

    files = files | shared_files(others())
    if seconds:
        end(lambda: [p for p in others() if not _is_tracker(p)], seconds, signal.SIGTERM)
    end(lambda: [p for p in others() if not _is_tracker(p)], STOP_S, signal.SIGKILL)
    end(others, STOP_S, signal.SIGCONT)
    end(others, STOP_S, signal.SIGKILL)
    for file in files - mine:
        file.unlink(missing_ok=True)


def remove_abandoned(parent: Path) -> list[Path]:
    """Remove the folders of weights whose owner has ended; returns them.

    An owner holds the kernel's lock on its folder, which no end of it leaves behind.
    """
    removed = []
    for folder in parent.glob(PREFIX + "*"):
        try:
            held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue  # gone, or another user's
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
        except OSError:
            pass  # in use
        finally:
            os.close(held)
    return removed


def _is_tracker(process: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False


def _kill(process: int, number: int) -> None:
    try:
        os.kill(process, number)
    except ProcessLookupError:
        pass


def _watch(weights: list[Path], orphaned: threading.Event) -> None:
    """Wait until the trainer has ended, and leave nothing of it."""
    while os.read(0, 1):
        pass
    orphaned.set()
    end_group(os.getpgrp(), 0.0)
    for folder in weights:
        remove_abandoned(folder)


def _write_masked(output, key: bytes) -> None:
    for line in output:
        sys.stdout.buffer.write(line.replace(key, MASK.encode()))
        sys.stdout.buffer.flush()


def main(argv: list[str]) -> None:
    place = argv.index("--")
    weights, command = [Path(folder) for folder in argv[:place]], argv[place + 1 :]
    key = os.environ.get(SERVER_KEY, "").encode()
    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if key else None,
        stderr=subprocess.STDOUT if key else None,
    )
    signal.signal(signal.SIGTERM, lambda *_: _end_server())
    orphaned = threading.Event()
    watch = threading.Thread(target=_watch, args=[weights, orphaned], daemon=True)
    watch.start()
    if key:
        _write_masked(server.stdout, key)
    code = server.wait()
    end_group(os.getpgrp(), 0.0)
    if orphaned.is_set():
        watch.join()
    os._exit(code & 255)


def _end_server() -> None:
    end_group(os.getpgrp(), STOP_S)


if __name__ == "__main__":
    main(sys.argv[1:])
