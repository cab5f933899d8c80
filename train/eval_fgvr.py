"""Evaluation on held-out photos: greedy answers, closed-world and open-world accuracy.

    python -m tercet.train.eval_fgvr --model.path CHECKPOINT --data triplets.json --out eval.json

`--data` is a triplets.json (its held-out photos) or JSON Lines of questions. Closed-world: the
options are in the prompt; right when the answer includes the true one. Open-world: right when
exactly one known name occurs in the answer and it is the true one (`exact`), or when the true name
occurs (`included`, the published text inclusion).
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import jsonargparse

from tercet.core.config import ModelConfig, RunConfig
from tercet.core.data import EvalQuestion, read_eval
from tercet.core.model import PolicyParts, load_policy
from tercet.core.prompts import chat_ids, closed_world_text, open_world_text, stage2_text
from tercet.core.scoring import closed_world_correct, open_world_exact, open_world_included
from tercet.core.triplets import Manifest, eval_questions
from tercet.core.types import Request
from tercet.core.vision import PromptEncoder
from tercet.rollout.engine import Engine, Sampling
from tercet.rollout.local import LocalEngine
from tercet.train.command_line import set_up
from tercet.train.loop import command

PROMPTS: dict[str, Callable[[EvalQuestion], str]] = {
    "stage2": lambda q: stage2_text(q.question),
    "open_world": lambda q: open_world_text(q.question),
    "closed_world": lambda q: closed_world_text(q.question, list(q.options)),
}
Prompt = Literal["stage2", "open_world", "closed_world"]


@dataclass(frozen=True)
class Answer:
    """A question with what the model said to it."""

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
    progress: Callable[[int], None] = lambda answers: None,
) -> list[Answer]:
    """Greedy answers with their scores, in the order of the questions.

    Args:
        engine: where answers come from.
        parts: for the tokenizer.
        questions: about held-out photos.
        prompt: wording; `closed_world` shows the options and gives the score `closed`, the others
            give `exact` and `included`.
        names: known names by super-category, for `exact`; without them it is left out.
        system_prompt: system message of every prompt.
        max_tokens: longest answer.
        progress: called with the number of answers that just came in.
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
            progress(1)
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
    """Mean of every score, by world, in percent, with the number of answers as `n`."""
    by_world: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        by_world[answer.question.world or "all"].append(answer)
    return {
        world: {"n": float(len(group))}
        | {name: 100 * sum(a.scores[name] for a in group) / len(group) for name in group[0].scores}
        for world, group in sorted(by_world.items())
    }


def questions_of(path: str, per_class: int | None) -> tuple[list[EvalQuestion], dict]:
    """Questions and known names of a triplets.json, or the questions of a JSON Lines file."""
    if path.endswith(".jsonl"):
        return read_eval(path), {}
    manifest = Manifest.read(path)
    worlds = [world for world in ("seen", "unseen") if manifest.test[world]]
    questions = [q for world in worlds for q in eval_questions(manifest, world, per_class)]
    return questions, manifest.names


def main() -> None:
    parser = jsonargparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=ModelConfig, default=ModelConfig())
    parser.add_argument("--data", type=str, required=True, help="triplets.json or JSON Lines")
    parser.add_argument("--prompt", type=Prompt, default="open_world")
    parser.add_argument("--per_class", type=int | None, default=None, help="photos a sub-category")
    parser.add_argument("--max_tokens", type=int, default=2048)
    parser.add_argument("--max_rows", type=int, default=256)
    parser.add_argument("--device", type=str, default="auto")
    parser.add_argument("--out", type=str, default="eval.json", help="every answer, and the table")
    options = parser.instantiate(parser.parse_args())
    device = set_up(RunConfig(device=options.device))
    parts = load_policy(options.model, device)
    engine = LocalEngine(parts, PromptEncoder(parts), max_rows=options.max_rows)
    questions, names = questions_of(options.data, options.per_class)
    answers = ask(
        engine,
        parts,
        questions,
        prompt=options.prompt,
        names=names,
        system_prompt=options.model.system_prompt,
        max_tokens=options.max_tokens,
    )
    result = {"table": table(answers), "answers": [asdict(answer) for answer in answers]}
    Path(options.out).write_text(json.dumps(result, indent=1), encoding="utf-8")
    for world, scores in result["table"].items():
        print(world, "  ".join(f"{name} {value:.1f}" for name, value in scores.items()))
    print(f"written: {options.out}")


if __name__ == "__main__":
    command(main)
