"""Progress of a long wait: a bar in a terminal, else a line now and then; rate and time left."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_EVERY_S = 30.0
"""Where nobody watches: seconds from one line to the next."""


class Steps:
    """Counts steps of one kind and shows how fast they come; a context manager.

    Args:
        what: for instance "answers".
        total: how many there will be.
        console: where it is shown; None: standard error.
    """

    def __init__(self, what: str, total: int, console: Console | None = None):
        self.what, self.total, self.done = what, total, 0
        self._console = console or Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            speed_estimate_period=600,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(what, total=total, rate="")
        self._start = self._said = time.monotonic()

    def __enter__(self) -> Steps:
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def advance(self, steps: int = 1) -> None:
        self.done += steps
        now = time.monotonic()
        rate = self.done / max(now - self._start, 1e-9)
        self._bar.update(self._task, advance=steps, rate=f"{rate:.3g}")
        if not self._console.is_terminal and now - self._said >= LINE_EVERY_S:
            self._said = now
            left = (self.total - self.done) / max(rate, 1e-9)
            self._console.print(
                f"{self.what}: {self.done:,} of {self.total:,}, {rate:.3g} a second, "
                f"{left / 60:.0f} minutes left"
            )
