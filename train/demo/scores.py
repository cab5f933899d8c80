"""What a demo policy does on held-out pictures: accuracy with intervals, and what explains it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from PIL import Image

from tercet.core.config import ModelConfig, RunConfig
from tercet.core.data.manifest import Manifest
from tercet.core.data.triplets import eval_questions
from tercet.core.data.vision import PromptEncoder
from tercet.core.models import load_policy
from tercet.core.names import names_in
from tercet.core.prompts import chat_ids, extract_answer, stage2_text
from tercet.core.rewards import fine_r1_strict
from tercet.core.types import PolicyParts, Request
from tercet.rollout.engine import Engine, Sampling
from tercet.rollout.local import LocalEngine
from tercet.train.demo.margins import margins_of
from tercet.train.demo.species import ATTRIBUTES, QUESTIONS, SUPER_CATEGORY, Names, species_of
from tercet.train.evaluation.held_out import Result, ask
from tercet.train.learner.device import set_up

PARTITIONS = ("seen", "unseen")
ACCURACIES = ("seen", "unseen", "seen_closed", "unseen_closed")
GREYS = range(40, 200, 20)
"""Brightness of the blank pictures, 0 to 255."""
GREY_RESPONSES = 8
"""Sampled responses to each question about each blank picture."""
MAX_TOKENS = 40
PIXEL_BYTES = 32 * 1024**2


@dataclass(frozen=True)
class Scores:
    """One policy's scores on held-out pictures, with greedy decoding."""

    hits: dict[str, str]
    """For each of ACCURACIES a "1" or "0" a question. An open answer is right if the response
    ends with one answer, in which the true name is the only known one."""
    attributes: dict[str, float]
    """Share of open answers whose one known name has the true value of the attribute."""
    grey: float
    """Share of seen names among those sampled (temperature 1) about blank grey pictures."""
    form: float
    """Share of open responses in the form `<think>...</think><answer>...</answer>`."""
    length: float
    """Mean tokens of an open response."""
    margins: dict[str, float] = field(default_factory=dict)
    """By partition the mean of `margins_of`, in nats; empty where it was not asked for."""

    def accuracy(self, name: str) -> float:
        """Accuracy (%) of one of ACCURACIES."""
        return 100 * mean(map(int, self.hits[name]))


def write_greys(folder: Path, size: int) -> list[str]:
    """Write a blank picture of each brightness in GREYS; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{grey:03}.png" for grey in GREYS]
    for grey, path in zip(GREYS, paths, strict=True):
        Image.new("RGB", (size, size), (grey,) * 3).save(path)
    return [str(path) for path in paths]


def evaluate(
    model: Path, manifest: Manifest, greys: Sequence[str], names: Names, margins: bool = False
) -> Scores:
    """Scores of a checkpoint on the manifest's held-out pictures.

    Args:
        model: the checkpoint.
        manifest: of the drawn world.
        greys: paths of blank pictures.
        names: kind of the world's names.
        margins: whether margins are computed too.
    """
    parts = load_policy(ModelConfig(path=str(model)), set_up(RunConfig()))
    encoder = PromptEncoder(parts, PIXEL_BYTES)
    engine = LocalEngine(parts, encoder, max_rows=64)
    questions = [q for partition in PARTITIONS for q in eval_questions(manifest, partition)]
    known, hits = tuple(manifest.names[SUPER_CATEGORY]), dict.fromkeys(ACCURACIES, "")
    answers = ask(engine, parts, questions, prompt="stage2", names={}, max_tokens=MAX_TOKENS)
    results = fine_r1_strict(
        [{"response": a.output, "ground_truth": a.question.truth, "names": known} for a in answers]
    )
    for answer, result in zip(answers, results, strict=True):
        hits[answer.question.partition] += str(int(result["accuracy"]))
    closed = ask(engine, parts, questions, prompt="closed_world", names={}, max_tokens=MAX_TOKENS)
    for answer in closed:
        hits[f"{answer.question.partition}_closed"] += str(int(answer.scores["closed"]))
    seen = {photo.sub_category for photo in manifest.test["seen"]}
    sampled = _sample_greys(engine, parts, greys)
    named = [name for text in sampled for name in _named(text, known)]
    return Scores(
        hits,
        _attribute_shares(answers, known, names),
        mean(name in seen for name in named) if named else 0.0,
        mean(result["format"] for result in results),
        mean(len(parts.tokenizer.encode(a.output)) + 1 for a in answers),
        margins_of(parts, encoder, manifest, names) if margins else {},
    )


def _named(text: str, known: Sequence[str]) -> list[str]:
    """The known name in a response's answer, where it is the only one; else nothing."""
    found = names_in(extract_answer(text, "first") or "", known)
    return found if len(found) == 1 else []


def _attribute_shares(
    results: Sequence[Result], known: Sequence[str], names: Names
) -> dict[str, float]:
    values = {species.name: species.values for species in species_of(names)}
    pairs = [(values[r.question.truth], _named(r.output, known)) for r in results]
    return {
        attribute: mean(any(values[name][i] == true[i] for name in named) for true, named in pairs)
        for i, attribute in enumerate(ATTRIBUTES)
    }


def _sample_greys(engine: Engine, parts: PolicyParts, greys: Sequence[str]) -> list[str]:
    """Sampled responses to every question about every blank picture."""

    async def collect() -> list[str]:
        requests = []
        for key in greys:
            for template in QUESTIONS:
                asked = stage2_text(template.format(super_category=SUPER_CATEGORY))
                messages = [{"role": "user", "content": f"<image>{asked}"}]
                ids, number = tuple(chat_ids(parts.tokenizer, messages, 1)), str(len(requests))
                request = Request(number, number, ids, (key,), n=GREY_RESPONSES, seed=0, step=0)
                requests.append(request)
        found = engine.generate(requests, Sampling(temperature=1.0, max_tokens=MAX_TOKENS))
        return [
            parts.tokenizer.decode(done.token_ids, skip_special_tokens=True) async for done in found
        ]

    return asyncio.run(collect())
