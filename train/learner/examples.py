"""Stage-1 records as examples to train on: tokenised, measured, split into trained and held out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tercet.core.config import SftConfig
from tercet.core.data.records import SftSample
from tercet.core.data.vision import PromptEncoder
from tercet.core.packing import Encode, Prompts
from tercet.core.prompts import THINK, answer_opening, chat_ids
from tercet.core.types import PolicyParts


@dataclass(frozen=True)
class Example:
    """A tokenised record."""

    id: str
    prompt_ids: tuple[int, ...]
    images: tuple[str, ...]
    target_ids: tuple[int, ...]

    def prompts(self, photo: str, encode: Encode) -> Prompts:
        """The prompt with its one target; the photos are always its own."""
        return [(encode(self.prompt_ids, self.images), [self.target_ids])]

    def halves(self) -> tuple:
        """Examples are never cut."""
        return ()

    def __str__(self) -> str:
        return f"sample {self.id!r}: prompt and target"


def tokenize(sample: SftSample, parts: PolicyParts, system_prompt: str | None) -> Example:
    """Prompt and target ids of a conversation; the target ends with the end-of-turn token, once.

    What the chat template begins the answer with (`<think>`) is not repeated in the target.

    Raises:
        ValueError: another token that ends an answer, or one of an image, in the target.
    """
    messages = [{"role": role, "content": content} for role, content in sample.messages]
    prompt = chat_ids(
        parts.tokenizer, messages[:-1], len(sample.images), system_prompt=system_prompt
    )
    end = parts.tokenizer.convert_ids_to_tokens(parts.turn_end)
    answer = _without(end, messages[-1]["content"])
    if (opening := answer_opening(parts.tokenizer, prompt)) and answer.startswith(THINK):
        answer = answer.removeprefix(THINK).removeprefix(opening.removeprefix(THINK))
    target = parts.tokenizer.encode(answer, add_special_tokens=False)
    refused = {*parts.stop_ids, *parts.banned_ids}.intersection(target)
    if refused:
        names = ", ".join(parts.tokenizer.convert_ids_to_tokens(sorted(refused)))
        raise ValueError(f"sample {sample.id!r}: its answer must not hold {names}")
    return Example(sample.id, tuple(prompt), sample.images, (*target, parts.turn_end))


def _without(end: str, answer: str) -> str:
    """An answer without the end-of-turn tokens that may stand at its end already."""
    while (cut := answer.rstrip()).endswith(end):
        answer = cut.removesuffix(end)
    return answer


def short_enough(
    examples: Sequence[Example], encoder: PromptEncoder, config: SftConfig
) -> tuple[list[Example], list[str]]:
    """Examples of at most optim.max_tokens, and for each that is left out the reason.

    Raises:
        ValueError: one is longer and data.on_long is "error", or all are.
    """
    limit, kept, reasons = config.optim.max_tokens, [], []
    for example in examples:
        tokens = encoder.length(example.prompt_ids, example.images) + len(example.target_ids)
        if tokens <= limit:
            kept.append(example)
            continue
        said = f"sample {example.id!r} has {tokens} tokens; optim.max_tokens is {limit}"
        if config.data.on_long == "error":
            raise ValueError(
                f"{said} (samples are never cut: lower model.max_pixels, raise the limit, or leave "
                "it out with data.on_long skip)"
            )
        reasons.append(said)
    if not kept:
        raise ValueError(f"all {len(reasons)} records are too long: {reasons[0]}")
    return kept, reasons


def held_out(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Examples to train on, and those held out: `share` of them, at least one, drawn by the seed.

    Raises:
        ValueError: none would be left to train on.
    """
    count = max(1, round(share * len(examples))) if share else 0
    if count >= len(examples):
        raise ValueError(f"data.held_out {share} leaves no record of {len(examples)} to train on")
    order = np.random.default_rng([seed, len(examples)]).permutation(len(examples))
    chosen = set(order[:count].tolist())
    trained = [example for n, example in enumerate(examples) if n not in chosen]
    return trained, [examples[n] for n in sorted(chosen)]


def with_others_photos(examples: Sequence[Example]) -> list[Example]:
    """The same examples, each with the photos of the next one that has as many of them."""
    alike: dict[int, list[Example]] = defaultdict(list)
    for example in examples:
        alike[len(example.images)].append(example)
    photos = {
        example.id: following.images
        for some in alike.values()
        for example, following in zip(some, some[1:] + some[:1], strict=True)
    }
    return [replace(example, images=photos[example.id]) for example in examples]
