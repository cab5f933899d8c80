"""What the sampling of a step gave: its groups, counts, and figures over all responses."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tercet.core.types import Group, Response

REDRAWN = (2, 0.01)
"""Responses of a step that may be drawn again because of what was drawn: so many, and so large a
share of all. A time-out, for instance, leaves out the long ones."""


@dataclass
class StepGroups:
    """The groups of one step, with counts of what was sampled for them."""

    groups: list[Group]
    first: int = 0
    """Number of the first new group; not 0 where the step is sampled a second time."""
    prompts_sent: int = 0
    groups_done: int = 0
    groups_kept: int = 0
    filled_up: int = 0
    """Groups that did not pass but are trained on all the same (`keep_last_round`)."""
    reward_seconds: float = 0.0
    """Seconds spent waiting for rewards, from a batch's last response to its last reward; 0 with
    streaming, where nothing waits for rewards."""
    redrawn: Counter[str] | None = None
    """Responses that were drawn again, by the reason; None: the engine does not tell."""
    rewarded: list[Group] = field(default_factory=list)
    """Every group that was sampled for the step, whether it passed or not."""
    seconds: float = 0.0
    """Seconds that the sampling took."""
    passing: set[str] = field(default_factory=set)
    """Ids of those that passed, carried ones included."""

    @property
    def sampled(self) -> list[Response]:
        """Every response that was sampled, whether its group passed or not, so that mean reward and
        accuracy are not those of the passing groups alone."""
        return [response for group in self.rewarded for response in group.responses]

    @property
    def acceptance(self) -> float:
        """Share of the sampled groups that passed."""
        return self.groups_kept / max(1, self.groups_done)

    @property
    def kept(self) -> str:
        """How many of the groups that were sampled for this step passed, in words."""
        return f"{self.groups_kept} of {self.groups_done} groups kept"

    @property
    def tokens(self) -> int:
        """Response tokens that were sampled."""
        return sum(len(response.token_ids) for response in self.sampled)

    def figures(self) -> dict[str, float]:
        """Figures over every response that was sampled, kept or not."""
        sampled = self.sampled
        if not sampled:
            return {}
        figures = {
            "reward": sum(r.reward for r in sampled) / len(sampled),
            "response_length": self.tokens / len(sampled),
            "cut_off": sum(r.finish_reason == "length" for r in sampled) / len(sampled),
            "acceptance": self.acceptance,
            "groups": float(len(self.groups)),
            "filled_up": float(self.filled_up),
            "tokens_per_s": self.tokens / self.seconds,
        }
        kept = [len(r.token_ids) for group in self.groups for r in group.responses]
        if kept:
            figures["kept_length"] = sum(kept) / len(kept)
        if self.redrawn is not None:
            figures["redrawn"] = self.redrawn.total() / len(sampled)
        for name in sorted({name for r in sampled for name in r.metrics}):
            values = [r.metrics[name] for r in sampled if name in r.metrics]
            figures[name] = sum(values) / len(values)
        return figures

    def count_redrawn(self, redrawn: Counter[str], step: int) -> None:
        """Take over how many responses the engine has drawn again, by the reason.

        Raises:
            ValueError: they are not rare: the step would train on other responses than the
                policy gives.
        """
        self.redrawn, (few, share) = redrawn, REDRAWN
        if redrawn.total() > few + share * len(self.sampled):
            reasons = ", ".join(f"{n} for {reason}" for reason, n in redrawn.most_common())
            raise ValueError(
                f"step {step}: for {len(self.sampled)} responses {redrawn.total()} were drawn "
                f"again ({reasons}); training on what is left would favour short responses: raise "
                "rollout.request_timeout_s, lower rollout.max_response_tokens, or add servers"
            )
