"""FLOPs beside PyTorch's own counter on the model itself."""

from __future__ import annotations

import re

import pytest
import torch
from support import shape_of, tiny
from torch.utils.flop_counter import FlopCounterMode

from tercet.core.costs import Flops, PromptLoad, forward_flops, vision_flops
from tercet.core.models import FAMILIES

pytestmark = pytest.mark.core


def counted(call, parts: str = "Global") -> int:
    """What modules execute whose name ends with the pattern."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    found = counter.get_flop_counts().items()
    return sum(sum(of.values()) for name, of in found if re.search(f"{parts}$", name))


@pytest.mark.parametrize("architecture", FAMILIES)
def test_vision_tower_with_ragged_windows(architecture):
    model = tiny(architecture).model
    model.set_attn_implementation({"vision_config": "eager"})
    shape, grids = shape_of(model.config), [(1, 12, 20), (1, 6, 8)]
    patches = torch.randn(sum(t * h * w for t, h, w in grids), shape.patch)
    found = counted(lambda: model.model.visual(patches, torch.tensor(grids)))
    assert vision_flops(shape, grids) == found


@pytest.mark.parametrize("architecture", FAMILIES)
def test_language_model_and_head(architecture):
    """The counter counts all pairs of a causal attention, we count half."""
    model = tiny(architecture).model
    model.set_attn_implementation({"text_config": "eager"})
    shape, length = shape_of(model.config), 40
    ids = torch.full((1, length), 9)
    parts = r"(language_model\.layers\.\d+|lm_head)"  # positions take a product in some versions
    found = counted(lambda: model(input_ids=ids, use_cache=False), parts)
    ours = forward_flops(shape, [PromptLoad(length, [], [])])
    masked = shape.layers * 4 * shape.heads * shape.head_dim * length**2 / 2
    assert ours.body + masked + 2 * length * shape.hidden * shape.vocabulary == found


def test_responses_share_a_prompt_and_one_alone_is_a_sequence():
    shape = shape_of(tiny().model.config)
    grids = [(1, 8, 8)]
    alone = forward_flops(shape, [PromptLoad(30, grids, [12])])
    sequence = forward_flops(shape, [PromptLoad(41, grids, [])])  # 30 + 12, the last one not fed
    assert alone.body == pytest.approx(sequence.body, rel=1e-12)
    assert alone.head == 2 * 12 * shape.hidden * shape.vocabulary
    shared = forward_flops(shape, [PromptLoad(30, grids, [12, 12, 12])])
    prompt = forward_flops(shape, [PromptLoad(30, grids, [])])
    assert shared.body == pytest.approx(3 * alone.body - 2 * prompt.body, rel=1e-12)
    assert shared.vision == prompt.vision == vision_flops(shape, grids)
    assert Flops(1, 2, 3).total == 6
