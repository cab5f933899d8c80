"""Runs tasks side by side, each in a process of its own with one thread, within a time limit."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkContext, ForkProcess
from pathlib import Path

import torch

STOP_S = 20.0
"""Time that a process has to end by itself after a signal."""
CHECK_S = 0.5
"""Time between two looks whether a signal has come."""


@dataclass(frozen=True)
class Task:
    """What one process does."""

    name: str
    run: Callable[[], object]
    """Can be pickled, as its result can."""
    log: Path
    """Gets what the task prints."""
    after: tuple[str, ...] = ()
    """Names of tasks that must be done before."""


def run_tasks(
    tasks: Sequence[Task],
    workers: int,
    done: Callable[[Task, object], None],
    limit_s: float | None = None,
) -> tuple[list[str], list[Task]]:
    """Run tasks in their order, as far as what they wait for allows.

    Args:
        tasks: with different names; what a task waits for must be among them.
        workers: processes at a time.
        done: called in this process with each task's result, as soon as it is there.
        limit_s: after so many seconds the processes that still run are stopped; None: never. They
            are stopped too when this process gets SIGTERM or SIGINT.

    Returns:
        Names of the tasks that were not done, for lack of time or because one that they wait for
        failed, and the tasks that failed.
    """
    context = get_context("fork")  # this process only waits, so it has no threads to lose
    waiting, running, names, failed = list(tasks), {}, set(), []
    end = time.monotonic() + (limit_s or math.inf)
    signals: list[int] = []  # an exception out of a handler could be lost inside fork
    before = signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    try:
        while waiting or running:
            free = [t for t in waiting if names.issuperset(t.after)][: workers - len(running)]
            for task in free:
                waiting.remove(task)
                receiver, process = _start(context, task)
                running[receiver] = (task, process)
            left = end - time.monotonic()
            if not running or left <= 0 or signals:
                break
            for receiver in wait(list(running), min(left, CHECK_S)):
                task, process = running.pop(receiver)
                try:
                    result = receiver.recv()
                except EOFError:  # the process ended without a result
                    failed.append(task)
                else:
                    names.add(task.name)
                    done(task, result)
                process.join()
    finally:
        _stop([process for _, process in running.values()])
        signal.signal(signal.SIGTERM, before)
    if signals:
        sys.exit(128 + signals[0])
    late = [task.name for task in waiting] + [task.name for task, _ in running.values()]
    return late, failed


def _start(context: ForkContext, task: Task) -> tuple[Connection, ForkProcess]:
    """A process at work, and where its result will come from."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(task, sender))
    process.start()
    sender.close()
    return receiver, process


def _work(task: Task, sender: Connection) -> None:
    """Do a task in a new process and send its result."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with task.log.open("a", encoding="utf-8", buffering=1) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout = sys.stderr = log
        torch.set_num_threads(1)
        try:
            result = task.run()
        except BaseException:
            traceback.print_exc()
            raise SystemExit(1) from None
        sender.send(result)


def _stop(processes: Sequence) -> None:
    """End processes, by force where they do not end by themselves."""
    for process in processes:
        process.terminate()
    end = time.monotonic() + STOP_S
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
