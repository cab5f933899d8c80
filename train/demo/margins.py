"""The margin: how much likelier the right response is on its picture than on a similar one."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from statistics import mean

import torch

from tercet.core.data.manifest import Manifest
from tercet.core.data.records import SftSample
from tercet.core.data.vision import PromptEncoder
from tercet.core.packing import plain_batch, prompts_of
from tercet.core.prompts import IMAGE_MARKER, stage2_text
from tercet.core.types import Photo, PolicyParts
from tercet.train.demo.species import SUPER_CATEGORY, Names, chain_of_thought, species_of
from tercet.train.learner.examples import Example, tokenize
from tercet.train.learner.policy import Policy

ROWS = 16
"""Pictures in one forward pass."""


def margins_of(
    parts: PolicyParts, encoder: PromptEncoder, manifest: Manifest, names: Names
) -> dict[str, float]:
    """By partition, the mean over held-out pictures x of log pi(o | x) - log pi(o | x_neg), nats.

    o is the whole right response: the exact chain of thought, the true name and the end of the
    answer. x_neg is a held-out picture of the sub-category that the manifest lists as the most
    similar one, seen or unseen.

    Args:
        parts: the policy; its attention is switched to that of training.
        encoder: of the policy's prompts.
        manifest: of the drawn world, with `look_alikes`.
        names: kind of the world's names.
    """
    species = {one.name: one for one in species_of(names)}
    policy, found = Policy(parts), {}
    for partition, photos in manifest.test.items():
        pairs = _pairs(manifest, photos)
        examples = []
        for photo, _ in pairs:
            said = chain_of_thought(species[photo.sub_category])
            turns = (("user", IMAGE_MARKER + stage2_text(photo.question)), ("assistant", said))
            examples.append(tokenize(SftSample(photo.image, turns, (photo.image,)), parts, None))
        others = [
            replace(example, images=(other.image,))
            for example, (_, other) in zip(examples, pairs, strict=True)
        ]
        found[partition] = mean(
            here - there
            for here, there in zip(
                _logprobs(policy, encoder, examples),
                _logprobs(policy, encoder, others),
                strict=True,
            )
        )
    return found


def _pairs(manifest: Manifest, photos: list[Photo]) -> list[tuple[Photo, Photo]]:
    """Each photo with the one that has its place among those of the most similar sub-category."""
    of: dict[str, list[Photo]] = defaultdict(list)
    for photo in (photo for some in manifest.test.values() for photo in some):
        of[photo.sub_category].append(photo)
    nearest = manifest.look_alikes[SUPER_CATEGORY]
    return [
        (photo, of[nearest[photo.sub_category][0]][of[photo.sub_category].index(photo)])
        for photo in photos
    ]


@torch.no_grad()
def _logprobs(policy: Policy, encoder: PromptEncoder, examples: list[Example]) -> list[float]:
    """Log-prob of each example's whole target."""
    found: list[float] = []
    for begin in range(0, len(examples), ROWS):
        some = examples[begin : begin + ROWS]
        batch = plain_batch(prompts_of(some, "own", encoder), 1.0)
        rows = policy(batch.update, "logprobs", labels=batch.labels)
        found += [float(of.sum()) for of in rows.split([len(e.target_ids) for e in some])]
    return found
