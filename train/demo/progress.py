"""Says which stage of the demo begins, and how much time is left of the whole."""

from __future__ import annotations

import time
from collections.abc import Sequence

SKIPPED = 0.1
"""A stage that took less of its planned time than this was there already."""


class Progress:
    """Prints a line at the beginning of every stage.

    Args:
        stages: (name, planned seconds) in order; the plan only has to be right in proportion.
    """

    def __init__(self, stages: Sequence[tuple[str, float]]):
        self._stages, self._next = list(stages), 0
        self._spent = self._planned = 0.0
        """Seconds of the stages that were run, and what was planned for them."""
        self._began: float | None = None

    def begin(self) -> None:
        """Say which stage begins and how long it and the rest will take."""
        self._end_stage()
        name, _ = self._stages[self._next]
        self._next += 1
        print(
            f"[{self._next}/{len(self._stages)}] {name}: {self._left()} left of the whole",
            flush=True,
        )

    def _end_stage(self) -> None:
        now = time.perf_counter()
        if self._began is not None:
            planned, spent = self._stages[self._next - 1][1], now - self._began
            if spent > SKIPPED * planned:
                self._spent, self._planned = self._spent + spent, self._planned + planned
        self._began = now

    def _left(self) -> str:
        pace = self._spent / self._planned if self._planned else 1.0
        seconds = pace * sum(planned for _, planned in self._stages[self._next - 1 :])
        return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {seconds:.0f} s"
