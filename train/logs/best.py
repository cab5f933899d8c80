"""The best checkpoint of a run so far, by a figure of its steps, and whether the run goes stale."""

from __future__ import annotations

import math

from tercet.core.config import RunConfig

SOMETIMES = "eval_"
"""What the names of figures begin with that not every step has."""


class BestSoFar:
    """Remembers the values of the figure that run.keep_best names.

    Args:
        config: keep_best and stop_after are used.
    """

    def __init__(self, config: RunConfig):
        self._figure, self._stop_after = config.keep_best, config.stop_after
        self._values: list[float] = []
        """Since the last checkpoint."""
        self._best: tuple[str, float] | None = None  # name of its folder, mean of its values
        self._highest, self._since = -math.inf, 0
        """The highest value, and how many came after it."""

    @property
    def stale(self) -> bool:
        """Whether run.stop_after values in a row were not above all before them."""
        return self._stop_after is not None and self._since >= self._stop_after

    def note(self, figures: dict[str, float]) -> None:
        """Remember the value of a step; one that does not have it does not count.

        Raises:
            ValueError: no step had it, and this one is whole (it may lack a reward or be skipped).
        """
        name, whole = self._figure, figures.keys() & {"reward", "cross_entropy"}
        if name in figures:
            self._values.append(figures[name])
            better = figures[name] > self._highest
            self._highest, self._since = max(self._highest, figures[name]), self._since + 1
            self._since = 0 if better else self._since
        elif not name or name.startswith(SOMETIMES):
            return
        elif whole and not (figures.get("skipped_steps") or self._values or self._best):
            known = ", ".join(sorted(figures))
            raise ValueError(f"run.keep_best is {name!r}; figures are {known}")

    def rate(self, folder: str) -> None:
        """Make a new checkpoint the best if the mean of its values is above the best so far."""
        if self._values:
            mean = sum(self._values) / len(self._values)
            if self._best is None or mean > self._best[1]:
                self._best = (folder, mean)
            self._values = []

    def state(self) -> dict[str, tuple | None]:
        """What a checkpoint holds of it."""
        return {"best": self._best, "highest": (self._highest, self._since)}

    def restore(self, state: dict) -> None:
        """Take over what a checkpoint holds."""
        self._highest, self._since = state.get("highest", (-math.inf, 0))
        if state["best"]:
            best, value = state["best"]  # earlier versions stored the step, not the name
            self._best = (f"step_{best:06d}" if isinstance(best, int) else best, value)
