"""Sampling ahead: the next step's groups, in a thread, while those of this step are trained on.

They are sampled by the weights before this step's updates, one step older than those they train, so
they have importance weights, as carried groups have. On servers with GPUs of their own a step takes
as long as the longer of its two halves.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from tercet.core.config import TapoConfig
from tercet.rollout.sampler import GroupSampler
from tercet.train.cli.interrupt import StopSignal
from tercet.train.learner.ranks import Ranks
from tercet.train.logs.run_log import RunLog, SilentLog


class Run(Protocol):
    """What it uses of a run of TAPO."""

    config: TapoConfig
    sampler: GroupSampler
    ranks: Ranks
    log: RunLog | SilentLog
    stop: StopSignal
    steps_done: int
    total_steps: int


class NoWeightsNow(RuntimeError):
    """A restarted server needs weights, which the trainer is changing."""


class Unneeded(Exception):
    """Nobody waits for what is being sampled any more."""


class Ahead:
    """What samples ahead on rank 0; does nothing with `rollout.overlap off`.

    From `begin` to `wait` or `stop` nothing else may sample, or save the sampler's state.
    """

    def __init__(self, run: Run):
        self._run = run
        self._on = run.config.rollout.overlap != "off"
        self._thread = ThreadPoolExecutor(1, "sampling ahead")
        self._sampling: Future | None = None
        self._unneeded = threading.Event()

    def begin(self) -> None:
        """Sample the groups of the next step, where there is one, from now on."""
        step = self._run.steps_done + 1
        if self._on and self._run.ranks.is_first and step < self._run.total_steps:
            self._unneeded.clear()
            self._sampling = self._thread.submit(self._sample, step)

    def wait(self) -> None:
        """Return when the groups are there; raises what their sampling raised. A collective.

        Where a server had to be restarted meanwhile they are not: the step is sampled when it
        begins, by the weights that it then has.
        """
        if self._on:
            with self._run.log.phase("generate", total=1, unit="step"):
                self._run.ranks.on_first(self._result)

    def check_weights(self) -> None:
        """Raises NoWeightsNow in the thread: the policy may be in the middle of an update, and the
        other ranks cannot put its weights together now."""
        if self._sampling is not None and not self._sampling.done():
            raise NoWeightsNow("a server was restarted while the policy was updated")

    def stop(self) -> None:
        """Give up what is not finished: its triplets come again."""
        if self._sampling is not None:
            self._unneeded.set()
            self._sampling.exception()
            self._sampling = None

    def close(self) -> None:
        """End the thread."""
        self.stop()
        self._thread.shutdown()

    def _result(self) -> None:
        if self._sampling is None:
            return
        try:
            self._sampling.result()
        except NoWeightsNow as error:
            step = self._run.steps_done + 2  # as people count them
            self._run.log.say(f"step {step} is not sampled ahead: {error}")
        finally:
            self._sampling = None

    def _sample(self, step: int) -> None:
        asyncio.run(self._run.sampler.collect_ahead(step, self._progress))

    def _progress(self, *_: object) -> None:
        """Called in the thread at every response and every second."""
        self._run.stop.check()
        if self._unneeded.is_set():
            raise Unneeded
