"""Questions to answers, answers to scores, scores to a table, in memory: for runs and the demo."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tercet.core.types import EvalQuestion, PolicyParts
from tercet.rollout.engine import Engine, Sampling
from tercet.train.evaluation.asking import Asked, Asker
from tercet.train.evaluation.metrics import (
    closed_world_correct,
    open_world_exact,
    open_world_included,
)
from tercet.train.evaluation.styles import Wording

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
