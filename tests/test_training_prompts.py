"""Prompts of a run: options from similar sub-categories, their letters, and what is refused."""

from __future__ import annotations

import pytest
from test_sampler import Script, build, collect
from test_sampler import anchors as anchors  # fixtures
from test_sampler import encoder as encoder
from test_sampler import parts as parts


def test_options_are_the_most_similar_shuffled_by_seed(parts, encoder, anchors):
    """The prompt and the reward see the same options, and the letter is the true one's."""
    nearest = {a.super_category: {} for a in anchors}
    for a in anchors:
        nearest[a.super_category][a.sub_category] = [f"other {n}" for n in range(5)]
    seen = []

    def watching(rows):
        seen.extend(rows)
        return [{"overall": 0.0, "accuracy": float(n == 0)} for n, _ in enumerate(rows)]

    orders = set()
    for seed in (0, 1, 0):
        seen.clear()
        config = {"prompt": "choice", "choices": 4}
        sampler = build(parts, encoder, anchors, watching, seed=seed, nearest=nearest, **config)
        groups = collect(sampler).groups
        for row in seen:
            assert sorted(row["options"]) == sorted(
                [row["ground_truth"], "other 0", "other 1", "other 2"]
            )
            assert row["options"]["ABCD".index(row["letter"])] == row["ground_truth"]
        for group in groups:
            text = parts.tokenizer.decode(group.prompt_ids)
            options = sampler.prompts.options(group.triplet)
            assert "\n".join(f"{x}. {o}" for x, o in zip("ABCD", options, strict=True)) in text
        orders.add(tuple(row["options"] for row in seen))
    assert len(orders) == 2


def test_prompts_that_cannot_be_made_are_named(parts, encoder, anchors):
    for options, said in (
        ({"prompt": "choice"}, "the data names no sub-categories similar to"),
        (
            {"prompt": "both", "choices": 0},
            "rollout.choices must be at least 2 with .* got 0",
        ),
        ({"prompt": "attribute", "choices": 1}, "rollout.choices must be 0 or at least 2, got 1"),
        ({"prompt": "nothing.txt"}, "rollout.prompt must be stage2, .* got 'nothing.txt'"),
    ):
        with pytest.raises(ValueError, match=said):
            build(parts, encoder, anchors, Script(), **options).check_prompts(anchors)
    shown = build(parts, encoder, anchors, Script(), prompt="attribute", choices=0)
    assert shown.prompts.options(anchors[0]) == () and shown.prompts.letter(anchors[0]) is None
