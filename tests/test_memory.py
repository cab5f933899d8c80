"""Planned memory beside what PyTorch's profiler sees of real updates on a CPU."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
from support import shape_of
from torch.autograd.graph import saved_tensors_hooks

from tercet.core.config import LossConfig, ModelConfig, TapoOptimConfig
from tercet.core.costs import Shape
from tercet.core.models import FAMILIES, build_tiny
from tercet.core.packing import pack
from tercet.core.types import EncodedImage, EncodedPrompt, MicroBatch, PackedBatch
from tercet.kernels.rows import BLOCK_LOGITS
from tercet.kernels.varlen import VISION_NAME
from tercet.train.fit.memory import (
    Activations,
    Breakdown,
    ElementBytes,
    Load,
    Memory,
    Parameters,
    decoder_layer_bytes,
    kv_bytes_per_token,
    vision_block_bytes,
)
from tercet.train.fit.sizes import count, element_bytes
from tercet.train.learner.lora import add_lora
from tercet.train.learner.optim import build_optimizer, optimizer_step
from tercet.train.learner.policy import Policy

TOLERANCE = 0.15
CHUNK_ROWS = 256


def make_policy(
    architecture: str,
    dtype: torch.dtype,
    *,
    checkpointing: bool = False,
    lora_rank: int = 0,
    vocabulary: int = 0,
    **sizes,
) -> Policy:
    """A policy in training, its vision tower with the attention that it has on a GPU."""
    sizes = {"hidden_size": 192, "layers": 3, "vision_size": 128, "vision_layers": 2} | sizes
    parts = build_tiny(["a bird"], architecture=architecture, **sizes)
    if vocabulary:
        parts.model.resize_token_embeddings(vocabulary, mean_resizing=False)
    parts.model.to(dtype)
    if lora_rank:
        add_lora(parts.model, ModelConfig(lora_rank=lora_rank))
    policy = Policy(parts, LossConfig(), chunk_rows=CHUNK_ROWS)
    parts.model.set_attn_implementation({"vision_config": VISION_NAME})
    if checkpointing:
        parts.model.gradient_checkpointing_enable({"use_reentrant": False})
    return policy.train()


def make_pack(policy: Policy, side: int, prompts: int, responses: int, length: int) -> PackedBatch:
    """Photos of side x side patches, questions of 12 tokens, responses of one length."""
    config, generator = policy.model.config, torch.Generator().manual_seed(0)
    grid, pads = torch.tensor([[1, side, side]]), side**2 // 4
    pixels = torch.randn(side**2, shape_of(config).patch, generator=generator)
    image = EncodedImage(lambda: pixels, grid)
    ids = torch.cat([torch.full((pads,), config.image_token_id), torch.arange(7, 19)])
    positions, delta = policy.model.model.get_rope_index(
        ids[None],
        mm_token_type_ids=(ids == config.image_token_id).int()[None],
        image_grid_thw=grid,
    )
    prompt = EncodedPrompt(ids, positions[:, 0], int(delta) + len(ids), (image,))
    return pack([(prompt, [[9] * length] * responses)] * prompts)


def make_batch(policy: Policy, **sizes) -> MicroBatch:
    update, negative = make_pack(policy, **sizes), make_pack(policy, **sizes)
    rows = len(update.hidden_index)
    return MicroBatch(
        update=update,
        negative=negative,
        labels=torch.full((rows,), 9),
        advantages=torch.ones(rows),
        loss_mask=torch.ones(rows),
        num_loss_tokens=float(rows),
        old_logprobs=torch.full((rows,), -5.0),
        neg_logprobs=None,
        is_weights=None,
    )


def sums_of_memory(call) -> list[int]:
    """Bytes above those at the start, after each allocation and release."""
    gc.collect()  # what an earlier test left must not be released meanwhile
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())]
    return list(itertools.accumulate(sizes))


def planned(policy: Policy, batch: MicroBatch, branches: str) -> tuple[float, float]:
    """Bytes of a micro-batch at the head and in the backward pass, above what stays."""
    model = policy.model
    shape, b = shape_of(model.config), model.dtype.itemsize
    counted = count(model)
    memory = Memory(shape, counted, element_bytes(model.dtype))
    update, negative = (
        Activations(
            shape,
            Load(len(p.input_ids), len(p.pixel_values), len(p.hidden_index)),
            b,
            model.is_gradient_checkpointing,
            counted.trains_vision,
            counted.ranks,
        )
        for p in (batch.update, batch.negative)
    )
    both = (update, negative if branches == "joint" else None)
    head = memory.at_head(*both, CHUNK_ROWS).total - memory.resident.total
    # On a CPU row operators work on blocks, and a 16-bit head is made float32.
    head += (
        3 * 4 * min(BLOCK_LOGITS, CHUNK_ROWS * shape.vocabulary)
        + (b == 2) * 4 * shape.vocabulary * shape.hidden
    )
    return head, memory.in_backward(*both).total - memory.resident.total


def measured(policy: Policy, batch: MicroBatch, branches: str) -> int:
    """Most bytes of a micro-batch whose gradients are there already, with its photos."""
    policy.accumulate(batch, branches)
    photos = batch.update.pixel_values.nbytes * (2 if branches == "joint" else 1)
    return max(sums_of_memory(lambda: policy.accumulate(batch, branches))) + photos


@pytest.mark.parametrize("branches", ["joint", "one_at_a_time"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_an_update(architecture, checkpointing, branches):
    policy = make_policy(architecture, torch.float32, checkpointing=checkpointing)
    batch = make_batch(policy, side=12, prompts=2, responses=5, length=64)
    plan, found = max(planned(policy, batch, branches)), measured(policy, batch, branches)
    assert plan == pytest.approx(found, rel=TOLERANCE), plan / found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_update_in_bfloat16(checkpointing):
    options = {"layers": 2, "vision_layers": 1}
    policy = make_policy("qwen2_5_vl", torch.bfloat16, checkpointing=checkpointing, **options)
    batch = make_batch(policy, side=8, prompts=1, responses=3, length=192)
    plan, found = max(planned(policy, batch, "joint")), measured(policy, batch, "joint")
    assert plan == pytest.approx(found, rel=TOLERANCE), plan / found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_update_with_lora(checkpointing):
    policy = make_policy("qwen2_5_vl", torch.float32, checkpointing=checkpointing, lora_rank=16)
    batch = make_batch(policy, side=12, prompts=2, responses=5, length=64)
    plan, found = max(planned(policy, batch, "joint")), measured(policy, batch, "joint")
    assert plan == pytest.approx(found, rel=TOLERANCE), plan / found


@pytest.mark.parametrize("architecture", FAMILIES)
def test_an_update_that_is_mostly_photos(architecture):
    policy = make_policy(architecture, torch.float32, hidden_size=64, layers=1, vision_layers=4)
    batch = make_batch(policy, side=32, prompts=1, responses=1, length=8)
    found = measured(policy, batch, "one_at_a_time")
    assert max(planned(policy, batch, "one_at_a_time")) == pytest.approx(found, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("dtype", "branches"), [(torch.float32, "joint"), (torch.bfloat16, "one_at_a_time")]
)
def test_an_update_that_is_mostly_the_head(dtype, branches):
    sizes = {"hidden_size": 64, "layers": 1, "vision_layers": 1, "vision_size": 64}
    policy = make_policy("qwen2_5_vl", dtype, checkpointing=True, vocabulary=49_152, **sizes)
    batch = make_batch(policy, side=4, prompts=1, responses=8, length=64)
    head, backward = planned(policy, batch, branches)
    found = measured(policy, batch, branches)
    assert head > 2 * backward
    assert head == pytest.approx(found, rel=TOLERANCE), head / found


@pytest.mark.parametrize(
    ("dtype", "states"),
    [(torch.float32, "bfloat16"), (torch.bfloat16, "bfloat16"), (torch.bfloat16, "float32")],
)
def test_the_optimiser(dtype, states):
    sizes = {"hidden_size": 256, "layers": 1, "vision_layers": 1, "vision_size": 64}
    policy = make_policy("qwen2_5_vl", dtype, vocabulary=32_768, **sizes)
    model = policy.model
    memory = Memory(shape_of(model.config), count(model), element_bytes(dtype, states))
    optimizer = build_optimizer(model.named_parameters(), TapoOptimConfig(states=states))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    grads = sum(parameter.grad.nbytes for parameter in model.parameters())
    sums = sums_of_memory(lambda: optimizer_step(optimizer, list(model.parameters()), 1e-6, 1.0))
    stays, step = memory.resident, memory.in_step()
    assert grads == stays.gradients
    assert stays.parameters == sum(parameter.nbytes for parameter in model.parameters())
    states = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    assert sum(state.nbytes for state in states) == stays.optimiser
    assert max(sums) == pytest.approx(step.optimiser, rel=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_what_autograd_keeps_of_a_layer(architecture, dtype):
    """To the byte, but for rotations, which all layers share, and the bounds of sequences."""
    policy = make_policy(architecture, dtype)
    model, packed = policy.model, make_pack(policy, 8, 1, 2, 20)
    shape, b = shape_of(model.config), dtype.itemsize
    rotation = 2 * b * shape.head_dim
    layer = kept_by(policy, model.model.language_model.layers[1], packed)
    tokens = len(packed.input_ids)
    assert layer == tokens * (decoder_layer_bytes(shape, b) + rotation)
    rotation = 2 * 4 * shape.vision_hidden // shape.vision_heads
    if architecture != "qwen2_5_vl":
        rotation -= 2 * 2 * (4 - b)  # a CPU keeps LayerNorm's mean and deviation in its dtype
    block = kept_by(policy, model.model.visual.blocks[1], packed)
    assert block == len(packed.pixel_values) * (vision_block_bytes(shape, b) + rotation)


def kept_by(policy: Policy, module: torch.nn.Module, packed: PackedBatch) -> int:
    """Bytes of the distinct tensors that autograd keeps of a module, parameters left out."""
    known = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, torch.Tensor] = {}
    forward = module.forward

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in known and tensor.is_floating_point():
            kept[place] = tensor
        return tensor

    def watched(*args, **kwargs):
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            return forward(*args, **kwargs)

    module.forward = watched
    policy(packed, "logprobs", labels=torch.full((len(packed.hidden_index),), 9))
    del module.forward
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


SHAPE = Shape(2, 8, 24, 4, 2, 2, False, 100, 1, 4, 2, 12, 3, 4, 0, 1, 0, 2, 6)
COUNTED = Parameters(10_000, 2_000, 4_000, 800, 9_000, 1_500, 3_900, 800)


def test_sharded_parts_by_hand():
    memory = Memory(SHAPE, COUNTED, ElementBytes(2, 2, 6, 2, 36), True, 4)
    assert memory.resident == Breakdown(5_000, 4_500, 13_500)
    update = Activations(SHAPE, Load(10, 0, 6), 2, True)
    head = memory.at_head(update, None, 4)
    assert head.parameters == 5_000 + 2 * 2_000  # the root is whole
    # Six rows' hidden states and gradients, four rows of logits, the head's float32 gradient.
    assert head.head == 4 * 100 * 4 + 4 * 2 * 8 * 2 + 2 * 6 * 8 * 2 + 800 * 4
    backward = memory.in_backward(update, None)
    assert backward.parameters == 5_000 + 2 * (2_000 + 2 * 4_000)
    assert backward.gradients == 4_500 + 2 * (1_500 + 2 * 3_900)
    step = memory.in_step()
    assert step.optimiser == 13_500 + 200 * 36
    sampling = memory.in_generate(7_000)
    assert sampling == Breakdown(5_000 + 2 * 800, 0, 13_500, server=7_000)
    assert sampling.total == 5_000 + 1_600 + 13_500 + 7_000


def test_joint_branches_are_gone_through_one_after_the_other():
    memory = Memory(SHAPE, COUNTED, ElementBytes(2, 2, 6, 2), True, 4)
    branch = Activations(SHAPE, Load(10, 0, 6), 2, True)
    joint = memory.in_backward(branch, branch)
    assert joint.gradients == memory.in_backward(branch, None).gradients
    assert joint.head == 2 * 6 * 8 * 2  # rows' gradients of both
    assert joint.activations == branch.in_backward + branch.kept
    larger = Activations(SHAPE, Load(100, 0, 6), 2, True)
    assert memory.in_backward(branch, larger).activations == larger.in_backward


def test_no_gradient_waits_for_the_other_branch():
    """Of a model that is large beside its activations; in one pass all of it would wait."""
    policy = make_policy("qwen2_5_vl", torch.float32, layers=8, hidden_size=256)
    batch = make_batch(policy, side=4, prompts=1, responses=1, length=8)
    apart, joint = (measured(policy, batch, how) for how in ("one_at_a_time", "joint"))
    gradients = sum(parameter.nbytes for parameter in policy.parameters())
    assert gradients > 4 * apart
    assert joint < 2.2 * apart


def test_frozen_vision_keeps_no_blocks_and_a_frozen_head_no_gradient():
    load = Load(10, 40, 6)
    trained, frozen = Activations(SHAPE, load, 2, False), Activations(SHAPE, load, 2, False, False)
    assert trained.kept - frozen.kept == 40 * vision_block_bytes(SHAPE, 2)
    memory = Memory(SHAPE, COUNTED._replace(trained_head=0), ElementBytes(2, 2, 6, 2))
    whole = Memory(SHAPE, COUNTED, ElementBytes(2, 2, 6, 2))
    assert whole.at_head(frozen, None, 4).head - memory.at_head(frozen, None, 4).head == 4 * 800


def test_keys_and_values_of_a_token():
    assert kv_bytes_per_token(SHAPE, 2) == 2 * 2 * 2 * 2 * 2
