"""How far a figure can be trusted: intervals of shares, of means and of averages of figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959964
"""Of a two-sided 95 % interval."""
DRAWS, DRAWS_AT_ONCE = 2000, 50

Interval = tuple[float, float]


def wilson(share: float, n: int) -> Interval:
    """Wilson's 95 % interval of a share (Wilson, 1927).

    Args:
        share: in [0, 1]; the mean over trials where there are several.
        n: questions, at least one: further trials on one question add none.
    """
    centre = share + Z**2 / (2 * n)
    width = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    scale = 1 + Z**2 / n
    return max(0.0, (centre - width) / scale), min(1.0, (centre + width) / scale)


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """95 % interval of a mean: percentiles of the means of DRAWS samples with replacement.

    Args:
        values: one a question, at least one.
        seed: of the draws.
    """
    return percentiles(bootstrap_means(values, seed))


def bootstrap_means(values: Sequence[float] | np.ndarray, seed: int = 0) -> np.ndarray:
    """[DRAWS] float64: the means of samples of the values with replacement."""
    rng, values = np.random.default_rng(seed), np.asarray(values, np.float64)
    means = [
        values[rng.integers(0, len(values), (DRAWS_AT_ONCE, len(values)))].mean(axis=1)
        for _ in range(DRAWS // DRAWS_AT_ONCE)
    ]
    return np.concatenate(means)


def percentiles(draws: np.ndarray) -> Interval:
    """The 2.5th and 97.5th percentile."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def of_average(values: Sequence[float], intervals: Sequence[Interval]) -> Interval:
    """95 % interval of the average of independent figures, from theirs (MOVER; Zou, Donner, 2008).

    Args:
        values: the figures, at least one.
        intervals: the 95 % interval of each.
    """
    average, k = sum(values) / len(values), len(values)
    below = math.sqrt(sum((v - low) ** 2 for v, (low, _) in zip(values, intervals, strict=True)))
    above = math.sqrt(sum((high - v) ** 2 for v, (_, high) in zip(values, intervals, strict=True)))
    return average - below / k, average + above / k


def standard_error(trials: Sequence[float]) -> float | None:
    """Standard error of the mean over trials; None for a single one."""
    if len(trials) < 2:
        return None
    return float(np.std(trials, ddof=1) / math.sqrt(len(trials)))
