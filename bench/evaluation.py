"""Questions a second of the evaluation, beside transformers' generate in a loop of batch 2.

    make bench-evaluation

The loop is what the released evaluation script does: two prompts of a kind at a time, padded on the
left, each photo encoded again for each prompt. A small random policy answers closed-world and
open-world questions about the same photos; answers of all ways must agree before a row is written.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tercet.bench import measure
from tercet.bench.rollout import CPU_FLAGS, noise_photos, serving
from tercet.core.data.vision import PromptEncoder, load_image
from tercet.core.models import build_tiny
from tercet.core.types import EvalQuestion, PolicyParts
from tercet.rollout.engine import Engine, Sampling
from tercet.rollout.local import LocalEngine
from tercet.train.evaluation.asking import Asked, Asker, every_answer
from tercet.train.evaluation.styles import Wording

RESULTS = Path(__file__).parent / "results" / "evaluation.csv"
NAMES = ("Crested Auklet", "Least Auklet", "Parakeet Auklet", "Rhinoceros Auklet")
MODES = ("closed", "open")
BATCH = 2
LOOP = f"transformers' generate, batches of {BATCH}"


@dataclass
class Row:
    """A row of the ledger; a question is asked once in each mode."""

    way: str
    questions: int
    tokens: int
    """Most tokens of an answer; a random policy rarely ends before."""
    questions_per_s: float
    slowest: float
    fastest: float
    ratio: float
    """Questions a second over those of transformers' loop, by the medians."""


def make_policy() -> PolicyParts:
    """A random policy of 5 M parameters, two thirds of them in the language model."""
    texts = [f"Which bird is this? {name} think answer options" for name in NAMES]
    return build_tiny(texts, hidden_size=256, layers=5, vision_size=160, vision_layers=4)


def make_questions(photos: Sequence[str]) -> list[EvalQuestion]:
    return [
        EvalQuestion(
            image=photo,
            question="What species is the bird in this photo?",
            options=NAMES,
            truth=NAMES[0],
            super_category="bird",
            partition="seen",
            dataset="bird",
            path=photo,
            file="bench",
            line=line,
        )
        for line, photo in enumerate(photos, 1)
    ]


def by_engine(engine: Engine, parts: PolicyParts, wanted: Sequence[Asked], tokens: int) -> dict:
    """Text of each answer by its key, from an engine."""
    asker = Asker(engine, parts, Wording("released"), Sampling(0.0, max_tokens=tokens))

    async def collect() -> dict:
        return {answer.key: answer.output async for answer in asker.answers(wanted)}

    return asyncio.run(collect())


@torch.no_grad()
def by_transformers(parts: PolicyParts, wanted: Sequence[Asked], tokens: int) -> dict:
    """Text of each answer by its key, from a plain loop."""
    asker, found = Asker(None, parts, Wording("released"), Sampling(0.0)), {}
    pad = parts.tokenizer.pad_token_id
    image = parts.banned_ids[0]
    for mode in MODES:
        left = [asked for asked in wanted if asked.mode == mode]
        for start in range(0, len(left), BATCH):
            part = left[start : start + BATCH]
            photos = [load_image(asked.question.image) for asked in part]
            seen = parts.image_processor(images=photos, return_tensors="pt")
            prompts = []
            for asked, grid in zip(part, seen["image_grid_thw"], strict=True):
                ids = list(asker._request(asked).prompt_ids)
                place = ids.index(image)
                prompts.append(ids[:place] + [image] * (int(grid.prod()) // 4) + ids[place + 1 :])
            longest = max(map(len, prompts))
            ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
            output = parts.model.generate(
                input_ids=ids,
                attention_mask=mask,
                mm_token_type_ids=(ids == image).int(),
                **seen,
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=pad,
                bad_words_ids=[[token] for token in parts.banned_ids],
            )
            for asked, row in zip(part, output[:, longest:], strict=True):
                found[asked.key] = parts.tokenizer.decode(row, skip_special_tokens=True)
    return found


def rows(ways: dict, wanted: Sequence[Asked], options: argparse.Namespace) -> list[Row]:
    """Check that all ways agree, then time them in turns.

    Raises:
        RuntimeError: they do not.
    """
    answers = {name: call() for name, call in ways.items()}
    for name, found in answers.items():
        other = sum(found[asked.key] != answers[LOOP][asked.key] for asked in wanted)
        if other:
            raise RuntimeError(f"{name}: {other} of {len(wanted)} answers differ from {LOOP}")
    taken = measure.interleaved(ways, options.rounds, 0, False)
    speed = {name: [1e3 * len(wanted) / ms for ms in spent] for name, spent in taken.items()}
    base = speed[LOOP][1]
    return [
        Row(name, options.questions, options.tokens, mid, low, high, mid / base)
        for name, (high, mid, low) in speed.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", help="interpreter with sglang; without it no server is timed")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--sglang_args", default=CPU_FLAGS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    parts = make_policy()
    with tempfile.TemporaryDirectory() as folder:
        questions = make_questions(noise_photos(Path(folder), options.questions, 112))
        wanted = every_answer(questions, MODES, 1)
        local = LocalEngine(parts, PromptEncoder(parts))
        ways = {
            LOOP: lambda: by_transformers(parts, wanted, options.tokens),
            "in-process engine": lambda: by_engine(local, parts, wanted, options.tokens),
        }
        if options.python:
            with serving(parts, options, Path(folder)) as engine:
                ways["SGLang server"] = lambda: by_engine(engine, parts, wanted, options.tokens)
                found = rows(ways, wanted, options)
        else:
            found = rows(ways, wanted, options)
    for row in found:
        print(row)
    measure.append(RESULTS, found, measure.conditions("cpu", measure.commit()))


if __name__ == "__main__":
    main()
