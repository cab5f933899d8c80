"""Questions to answers, answers to scores, scores to a table."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tercet.core.data.manifest import Manifest
from tercet.core.data.records import read_eval
from tercet.core.data.triplets import eval_questions
from tercet.core.prompts import chat_ids, closed_world_text, open_world_text, stage2_text
from tercet.core.types import EvalQuestion, PolicyParts, Request
from tercet.rollout.engine import Engine, Sampling
from tercet.train.evaluation.metrics import (
    closed_world_correct,
    open_world_exact,
    open_world_included,
)

PROMPTS: dict[str, Callable[[EvalQuestion], str]] = {
    "stage2": lambda q: stage2_text(q.question),
    "open_world": lambda q: open_world_text(q.question),
    "closed_world": lambda q: closed_world_text(q.question, list(q.options)),
}
Prompt = Literal["stage2", "open_world", "closed_world"]


@dataclass(frozen=True)
class Answer:
    """A question with the model's answer and its scores."""

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
) -> list[Answer]:
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
    """

    def request(i: int, question: EvalQuestion) -> Request:
        messages = [{"role": "user", "content": "<image>" + PROMPTS[prompt](question)}]
        ids = chat_ids(parts.tokenizer, messages, 1, system_prompt=system_prompt)
        return Request(str(i), str(i), tuple(ids), (question.image,), n=1, seed=0, step=0)

    async def collect() -> dict[int, str]:
        outputs = {}
        requests = [request(i, q) for i, q in enumerate(questions)]
        sampling = Sampling(temperature=0, max_tokens=max_tokens)
        async for completion in engine.generate(requests, sampling):
            outputs[int(completion.request_id)] = parts.tokenizer.decode(
                completion.token_ids, skip_special_tokens=True
            )
        return outputs

    outputs = asyncio.run(collect())
    return [
        Answer(q, outputs[i], _scores(q, outputs[i], prompt, names.get(q.super_category)))
        for i, q in enumerate(questions)
    ]


def _scores(question: EvalQuestion, output: str, prompt: str, names) -> dict[str, float]:
    if prompt == "closed_world":
        return {"closed": float(closed_world_correct(output, question.truth))}
    cars = question.super_category in ("car", "cars")
    scores = {"included": float(open_world_included(output, question.truth, cars))}
    if names:
        scores["exact"] = float(open_world_exact(output, question.truth, names))
    return scores


def table(answers: Sequence[Answer]) -> dict[str, dict[str, float]]:
    """By partition: the mean of every score in percent, and the number of answers as `n`."""
    by_partition: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        by_partition[answer.question.partition or "all"].append(answer)
    return {
        partition: {"n": float(len(group))}
        | {name: 100 * sum(a.scores[name] for a in group) / len(group) for name in group[0].scores}
        for partition, group in sorted(by_partition.items())
    }


def questions_of(path: str, per_class: int | None) -> tuple[list[EvalQuestion], dict]:
    """Questions and known names of a triplets.json, or the questions of a JSON Lines file."""
    if path.endswith(".jsonl"):
        return read_eval(path), {}
    manifest = Manifest.read(path)
    partitions = [partition for partition in ("seen", "unseen") if manifest.test[partition]]
    questions = [
        q for partition in partitions for q in eval_questions(manifest, partition, per_class)
    ]
    return questions, manifest.names
