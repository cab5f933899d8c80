"""Evaluation during training: greedy answers about some held-out photos, now and then."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from tercet.core.config import TapoConfig
from tercet.core.data.manifest import Manifest
from tercet.core.data.triplets import eval_questions
from tercet.core.draws import seeded_order
from tercet.core.types import EvalQuestion, Partition, PolicyParts
from tercet.rollout.engine import Engine
from tercet.train.evaluation.answers import ask, table

if TYPE_CHECKING:
    from tercet.train.learner.policy import Policy
    from tercet.train.learner.ranks import Ranks
    from tercet.train.learner.run_log import RunLog, SilentLog

FIGURE = "eval_{}"


class Run(Protocol):
    """What it uses of a run of TAPO."""

    config: TapoConfig
    manifest: Manifest
    parts: PolicyParts
    engine: Engine
    policy: Policy
    ranks: Ranks
    log: RunLog | SilentLog
    steps_done: int
    total_steps: int


class HeldOut:
    """The held-out photos that a run is evaluated on, the same all the way.

    Args:
        run: its options say how often and on how many; none where `run.eval_every` is 0.

    Raises:
        ValueError: there are no held-out photos, or `run.keep_best` names a figure of a partition
            that has none.
    """

    def __init__(self, run: Run):
        self._run, self._config = run, run.config.run
        self.questions: list[EvalQuestion] = []
        if not self._config.eval_every:
            return
        names = []
        for partition in ("seen", "unseen"):
            drawn = draw(run.manifest, partition, self._config.eval_photos)
            self.questions += drawn
            names += [FIGURE.format(partition)] if drawn else []
        if not names:
            raise ValueError("run.eval_every needs held-out photos, and triplets.json has none")
        best = self._config.keep_best
        if best and best.startswith(FIGURE.format("")) and best not in names:
            raise ValueError(f"run.keep_best is {best!r}; evaluations give {', '.join(names)}")

    def figures(self) -> dict[str, float]:
        """Share of photos named right by partition, where an evaluation is due after this step.

        Right is an answer that holds the right name and no other known one. A collective.
        """
        run, step = self._run, self._run.steps_done + 1
        if not self.questions or step % self._config.eval_every and step < run.total_steps:
            return {}
        return run.ranks.share(self._ask, run.policy.gather_weights)

    def _ask(self) -> dict[str, float]:
        run = self._run
        with run.log.phase("eval", total=len(self.questions), unit="answers") as phase:
            answers = ask(
                run.engine,
                run.parts,
                self.questions,
                prompt="stage2",
                names=run.manifest.names,
                system_prompt=run.config.model.system_prompt,
                max_tokens=run.config.rollout.max_response_tokens,
                on_answer=phase.advance,
            )
        found = table(answers)
        return {FIGURE.format(name): row["exact"] / 100 for name, row in found.items()}


def draw(manifest: Manifest, partition: Partition, most: int) -> Sequence[EvalQuestion]:
    """So many questions of a partition, of as many sub-categories as can be; always the same."""
    if not manifest.test[partition]:
        return []
    classes = {(p.super_category, p.sub_category) for p in manifest.test[partition]}
    per_class = -(-most // len(classes))
    root = manifest.common_folder()
    questions = eval_questions(manifest, partition, per_class)
    found = {os.path.relpath(q.image, root): q for q in questions}
    return [found[key] for key in seeded_order(found, 0, "held out")[:most]]
