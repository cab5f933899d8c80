"""Greedy answers about held-out photos and their scores, in memory: for runs and the demo."""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

from tercet.core.config import TapoConfig
from tercet.core.data.manifest import Manifest
from tercet.core.data.triplets import eval_questions
from tercet.core.draws import seeded_order
from tercet.core.types import EvalQuestion, Partition, PolicyParts
from tercet.rollout.engine import Engine, Sampling
from tercet.train.evaluation.asking import Asked, Asker
from tercet.train.evaluation.metrics import (
    closed_world_correct,
    open_world_exact,
    open_world_included,
)
from tercet.train.evaluation.styles import Wording

if TYPE_CHECKING:
    from tercet.train.learner.policy import Policy
    from tercet.train.learner.ranks import Ranks
    from tercet.train.logs.run_log import RunLog, SilentLog

FIGURE = "eval_{}"
Prompt = Literal["stage2", "open_world", "closed_world"]


@dataclass(frozen=True)
class Result:
    """A question, what the model said, and its scores."""

    question: EvalQuestion
    output: str
    scores: dict[str, float]


def ask(
    engine: Engine,
    parts: PolicyParts,
    questions: Sequence[EvalQuestion],
    *,
    prompt: Prompt,
    names: Mapping[str, Sequence[str]],
    system_prompt: str | None = None,
    max_tokens: int = 2048,
    on_answer: Callable[[], None] = lambda: None,
) -> list[Result]:
    """Greedy answers with their scores, in the order of the questions.

    Args:
        engine: samples the answers.
        parts: for the tokenizer.
        questions: about held-out photos.
        prompt: wording. `closed_world` shows the options and gives the score `closed`; the others
            give `exact` and `included`.
        names: known names by super-category, for `exact`, which is left out without them.
        system_prompt: system message of every prompt.
        max_tokens: longest answer.
        on_answer: called for each.
    """
    mode = "closed" if prompt == "closed_world" else "open"
    sampling = Sampling(temperature=0, max_tokens=max_tokens)
    wording = Wording("stage2" if prompt == "stage2" else "released")
    asker = Asker(engine, parts, wording, sampling, system_prompt)
    wanted = [Asked(replace(q, line=n), mode) for n, q in enumerate(questions)]

    async def collect() -> dict[int, str]:
        found = {}
        async for answer in asker.answers(wanted):
            found[answer.line] = answer.output
            on_answer()
        return found

    outputs = asyncio.run(collect())
    return [
        Result(q, outputs[n], _scores(q, outputs[n], prompt, names.get(q.super_category)))
        for n, q in enumerate(questions)
    ]


def _scores(question: EvalQuestion, output: str, prompt: str, names) -> dict[str, float]:
    if prompt == "closed_world":
        return {"closed": float(closed_world_correct(output, question.truth))}
    cars = question.super_category in ("car", "cars")
    scores = {"included": float(open_world_included(output, question.truth, cars))}
    if names:
        scores["exact"] = float(open_world_exact(output, question.truth, names))
    return scores


def table(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """By partition: the mean of every score in percent, and the number of answers as `n`."""
    by_partition: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_partition[result.question.partition or "all"].append(result)
    return {
        partition: {"n": float(len(group))}
        | {name: 100 * sum(r.scores[name] for r in group) / len(group) for name in group[0].scores}
        for partition, group in sorted(by_partition.items())
    }


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
