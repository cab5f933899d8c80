"""A reward that is a weighted sum of parts, such as {format: 0.1, accuracy: 0.9}.

A part maps the rows of a group to a number each. One that depends on another machine (a judge) may
fail for a group: it is left out of that group then, for all of its responses alike, and the other
parts' weights are scaled up to the same sum. Metrics count how often that happens.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from tercet.core.reward_calls import Results, RewardError, Rows
from tercet.core.reward_process import RewardProcess
from tercet.core.rewards import CORRECT, PARTS

LEFT_OUT = "_left_out"
"""What follows a part's name in the metric that is 1 where it was left out, else 0."""


class PartFailed(Exception):
    """A part has no value for a group; it is left out there."""


class WeightedReward:
    """A reward function (see core.rewards) that sums up weighted parts.

    Results hold `overall`, each part's value by its name, and `accuracy` where one of the parts
    says whether an answer is correct. A part of `more` also has `<name>_left_out`. Where no part of
    any weight is left, `overall` is 0 for the whole group: its advantages are 0.

    Args:
        weights: by part: a name of `known` or of `more`, or `module:function`, whose `overall`
            counts.
        correct: the part that says whether an answer is correct (> 0.5); None: the first of CORRECT
            that is there.
        timeout_s: longest that a `module:function` may take for a group.
        known: parts by name that have a value for every group.
        more: further parts by name, plain or coroutine functions; they raise PartFailed where they
            have no value for a group.

    Raises:
        ValueError: an unknown part, a weight that is negative or not finite, weights that sum to 0,
            a `correct` that is no part, or a module that cannot be imported.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        correct: str | None = None,
        timeout_s: float = 900.0,
        known: Mapping[str, Callable] = PARTS,
        more: Mapping[str, Callable] = MappingProxyType({}),
    ):
        check_weights(weights, correct, {*known, *more})
        self._weights, self._timeout_s, self._may_fail = dict(weights), timeout_s, set(more)
        self._correct = correct or next((part for part in CORRECT if part in weights), None)
        known = {**known, **more}
        self._parts: dict[str, Callable | RewardProcess] = {}
        try:
            for part in weights:
                self._parts[part] = known[part] if part in known else RewardProcess(part)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the processes of functions of the user's."""
        for part in self._parts.values():
            if isinstance(part, RewardProcess):
                part.close()

    async def __call__(self, rows: Rows) -> Results:
        """Results of a whole group's rows."""
        found = await asyncio.gather(*(self._values(part, rows) for part in self._parts))
        values = {name: of for name, of in zip(self._parts, found, strict=True) if of is not None}
        left = sum(self._weights[name] for name in values)
        scale = sum(self._weights.values()) / left if left else 0.0
        results = []
        for n in range(len(rows)):
            result = {name: of[n] for name, of in values.items()}
            total = math.fsum(self._weights[name] * value for name, value in result.items())
            if self._correct in values:
                result["accuracy"] = values[self._correct][n]
            for name in self._may_fail & self._weights.keys():
                result[name + LEFT_OUT] = float(name not in values)
            results.append({"overall": scale * total, **result})
        return results

    async def _values(self, name: str, rows: Rows) -> list[float] | None:
        """A part's values for a group; None where it is left out."""
        part = self._parts[name]
        if isinstance(part, RewardProcess):
            try:
                return [result["overall"] for result in await part.call(rows, self._timeout_s)]
            except RewardError as error:
                raise ValueError(f"part {name!r}: {error}") from error
        try:
            values = part(rows)
            return list(await values if asyncio.iscoroutine(values) else values)
        except PartFailed:
            return None


def check_weights(weights: Mapping[str, float], correct: str | None, known: set[str]) -> None:
    """Raises ValueError for weights that have no meaning, naming the part."""
    for part, weight in weights.items():
        if part not in known and not all(part.partition(":")):
            raise ValueError(
                f"rollout.reward: a part must be {', '.join(sorted(known))} or module:function, "
                f"got {part!r}"
            )
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(
                f"rollout.reward: the weight of {part} must be at least 0, got {weight}"
            )
    if not sum(weights.values()):
        raise ValueError(f"rollout.reward: the weights must not sum to 0, got {dict(weights)}")
    if correct is not None and correct not in weights:
        raise ValueError(
            f"rollout.correct_part must be one of {', '.join(weights)}, got {correct!r}"
        )
