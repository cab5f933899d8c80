"""One forward and backward pass over a group: shared prefix beside one sequence a response.

    make bench

Peer: plain transformers on right-padded sequences, each with its own copy of prompt and photo, and
all logits kept. Log-probs and gradients are compared before anything is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tercet.core.model import build_tiny
from tercet.core.packing import pack
from tercet.core.vision import EncodedImage, EncodedPrompt
from tercet.train.policy import Policy

RESPONSES, LENGTH, QUESTION = 10, 96, 24
PIXELS = 224
"""Sides of the photo: 64 image tokens."""


@pytest.fixture(scope="module")
def passes() -> dict[str, Callable[[], Tensor]]:
    """Both passes on the same tokens; each returns log-probs after a backward pass."""
    torch.set_num_threads(2)
    parts = build_tiny(["a bird"], hidden_size=256, layers=4, image_size=PIXELS)
    peer = copy.deepcopy(parts.model)
    policy = Policy(parts)
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 255, (PIXELS, PIXELS, 3), dtype=np.uint8)
    arrays = parts.image_processor(images=photo, return_tensors="pt")
    image = EncodedImage(arrays["pixel_values"], arrays["image_grid_thw"])
    pads = int(image.grid_thw.prod()) // 4
    text = torch.from_numpy(rng.integers(7, len(parts.tokenizer), QUESTION))
    ids = torch.cat([torch.full((pads,), parts.banned_ids[0]), text])
    is_image = (ids == parts.banned_ids[0]).int()
    positions, delta = parts.model.model.get_rope_index(
        ids[None], mm_token_type_ids=is_image[None], image_grid_thw=image.grid_thw
    )
    prompt = EncodedPrompt(ids, positions[:, 0], int(delta) + len(ids), (image,))
    tokens = torch.from_numpy(rng.integers(7, len(parts.tokenizer), (RESPONSES, LENGTH)))

    def shared_prefix() -> Tensor:
        policy.zero_grad(set_to_none=True)
        packed = pack([(prompt, tokens.tolist())])
        logprobs = policy(packed, "logprobs", labels=tokens.flatten())
        logprobs.sum().backward()
        return logprobs.detach()

    def one_by_one() -> Tensor:
        peer.zero_grad(set_to_none=True)
        sequences = torch.cat([ids.expand(RESPONSES, -1), tokens], dim=1)
        logits = peer(
            input_ids=sequences,
            mm_token_type_ids=(sequences == parts.banned_ids[0]).int(),
            pixel_values=image.pixel_values.repeat(RESPONSES, 1),
            image_grid_thw=image.grid_thw.repeat(RESPONSES, 1),
            use_cache=False,
        ).logits[:, len(ids) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0].flatten()
        logprobs.sum().backward()
        return logprobs.detach()

    assert torch.allclose(shared_prefix(), one_by_one(), rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(policy.model.parameters(), peer.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-3 * theirs.grad.norm() + 1e-4
    return {"shared_prefix": shared_prefix, "one_by_one": one_by_one}


@pytest.mark.parametrize("name", ["shared_prefix", "one_by_one"])
@pytest.mark.benchmark(group="update pass, 10 responses of 96 tokens, prompt of 88")
def test_update_pass(benchmark, passes, name):
    benchmark.pedantic(passes[name], rounds=8, warmup_rounds=2)
