"""A step's numbers beside those of real packs, and its times beside a calculation by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tercet.core.config import LossConfig, ModelConfig, ParallelConfig, TapoConfig, TapoOptimConfig
from tercet.core.costs import PromptLoad, Shape, forward_flops
from tercet.core.packing import Piece, mini_batches, pack, prompts_of
from tercet.core.rollout_config import RolloutConfig
from tercet.core.types import EncodedImage, EncodedPrompt, Group, Response, Triplet
from tercet.train.fit.memory import Load
from tercet.train.fit.roofline import BUS, Card, Engines, Lengths, Step, Volume, phases
from tercet.train.learner.micro_batches import split

pytestmark = pytest.mark.core
SHAPE = Shape(2, 8, 24, 4, 2, 2, False, 100, 1, 4, 2, 12, 3, 4, 0, 1, 0, 2, 6)
LENGTHS = Lengths(prompt=20, photo=16, response=30)


def make_step(gpus: int = 2, budget: int = 300, update_on: str = "anchor", **loss) -> Step:
    config = TapoConfig(
        rollout=RolloutConfig(
            n_anchor=5,
            n_positive=5,
            groups_per_step=12,
            max_prompt_tokens=20,
            max_response_tokens=30,
        ),
        optim=TapoOptimConfig(groups_per_minibatch=6),
        loss=LossConfig(update_on=update_on, **loss),
        parallel=ParallelConfig(micro_batch_tokens=budget),
    )
    return Step(config, SHAPE, LENGTHS, gpus)


def encode(ids: tuple[int, ...], images: tuple[str, ...]) -> EncodedPrompt:
    """A prompt of 20 tokens with a photo of 64 patches."""
    image = EncodedImage(lambda: torch.zeros(64, SHAPE.patch), torch.tensor([[1, 8, 8]]))
    return EncodedPrompt(
        torch.zeros(20, dtype=torch.int64), torch.zeros(3, 20).long(), 20, (image,)
    )


def make_groups() -> list[Group]:
    triplet = Triplet("t", "x", "p", "n", "What?", "bird", "auk")
    roles = ["anchor"] * 5 + ["positive"] * 5
    made = []
    for n in range(12):
        responses = [Response(role, (1,) * 30, (0.0,) * 30, "stop", 0) for role in roles]
        made.append(Group(f"g{n}", triplet, (1,) * 20, responses))
    return made


@pytest.mark.parametrize("update_on", ["anchor", "own"])
@pytest.mark.parametrize("budget", [70, 120, 200, 350, 700, 10_000])
def test_micro_batches_are_those_of_the_packing(budget, update_on):
    step = make_step(budget=budget, update_on=update_on)
    batches = mini_batches(make_groups(), 6, "group")
    assert step.minibatches == len(batches) == 2
    mine: list[Piece] = batches[0][:3]  # of two GPUs
    assert step.groups_a_gpu == 3
    assert step.microbatches == len(list(split(mine, [update_on], encode, budget)))


def test_the_load_is_that_of_a_pack():
    step = make_step(budget=1000)
    pieces = mini_batches(make_groups(), 3, "group")[0]
    packed = pack(prompts_of(pieces, "anchor", encode))
    assert step.load("update") == Load(
        len(packed.input_ids), len(packed.pixel_values), len(packed.hidden_index)
    )
    own = pack(prompts_of(pieces, "own", encode))
    both = make_step(budget=2000, update_on="own")
    assert both.load("update").tokens == len(own.input_ids)
    assert both.load("update").patches == 2 * both.load("negative").patches == 6 * 64
    # A smaller budget is filled.
    assert make_step(budget=500).load("update").tokens == 500


def test_numbers_of_a_step():
    step = make_step()
    assert (step.groups, step.group_size, step.responses, step.sampled_prompts) == (12, 10, 120, 24)
    assert step.group_tokens == 20 + 10 * 29
    assert step.old_share == 0.5
    assert make_step(is_cap=2.0).old_share == 1


@pytest.mark.parametrize(
    ("loss", "branches", "checkpointing", "update", "negative", "apart"),
    [
        ({}, "joint", False, 3, 3, 0),
        ({}, "joint", True, 4, 4, 0),
        ({}, "one_at_a_time", True, 4, 5, 0),
        ({"neg_grad": "detach"}, "joint", True, 4, 1, 0),
        ({"neg_grad": "detach", "neg_at": "step_start"}, "joint", False, 3, 0, 1),
        ({"kl_coef": 0.0, "neg_entropy_coef": 0.0}, "joint", False, 3, 0, 0),
    ],
)
def test_flops_of_the_phases(loss, branches, checkpointing, update, negative, apart):
    """In forward passes; recomputed layers count once more, the head does not."""
    step = make_step(**loss)
    parallel = replace(step.config.parallel, branches=branches)
    model = ModelConfig(gradient_checkpointing=checkpointing)
    step = replace(step, config=replace(step.config, parallel=parallel, model=model))
    forward = forward_flops(SHAPE, [PromptLoad(20, [(1, 8, 8)], [30] * 10)])
    found = step.phase_flops()
    head = sum(n - (checkpointing and n > 1) for n in (update, negative))
    expected = (update + negative) * (forward.vision + forward.body) + head * forward.head
    assert found["update"] == pytest.approx(12 * expected, rel=1e-12)
    assert found["negative"] == apart * 12 * forward.total
    assert found["old"] == 6 * forward.total
    halves = [PromptLoad(20, [(1, 8, 8)], [30] * 5)] * 2
    assert found["generate"] == pytest.approx(12 * forward_flops(SHAPE, halves).total, rel=1e-12)


def test_lora_and_a_frozen_tower_need_less():
    step = make_step(kl_coef=0.0, neg_entropy_coef=0.0)
    forward = forward_flops(SHAPE, [PromptLoad(20, [(1, 8, 8)], [30] * 10)])
    lora = replace(step, config=replace(step.config, model=ModelConfig(lora_rank=4)))
    expected = forward.vision + 2 * forward.body + 2 * forward.head
    assert lora.phase_flops()["update"] == pytest.approx(12 * expected)
    frozen = replace(step, config=replace(step.config, model=ModelConfig(freeze_vision=True)))
    expected = forward.vision + 3 * forward.body + 3 * forward.head
    assert frozen.phase_flops()["update"] == pytest.approx(12 * expected)


def test_decoding_by_hand():
    """120 responses on 2 servers, 15 at once: 4 rounds of 30 tokens each."""
    weights = 2 * (2 * 8 * 6 * 2 + 3 * 8 * 24) + 100 * 8
    read = 2 * weights + 15 * (20 + 15) * (2 * 2 * 2 * 2 * 2)
    slow_memory, slow_cores = Card(1, 1.0, 1e-6), Card(1, 1e-12, 1e3)
    found = Engines(2, 1, 15, 2).decode(make_step(), slow_memory)
    assert found == pytest.approx((4 * 30 * read, 4 * 30 * read / 1e3))
    _, seconds = Engines(2, 1, 15, 2).decode(make_step(), slow_cores)
    assert seconds == pytest.approx(4 * 30 * 2 * weights * 15)
    halved, _ = Engines(2, 2, 15, 2).decode(make_step(), slow_memory)
    assert halved == pytest.approx(4 * 30 * read / 2)


def test_phases_take_the_slower_of_computing_and_moving():
    step = make_step(budget=10_000)  # one micro-batch a mini-batch
    flops, away = step.phase_flops(), 1 / 2
    fast, slow = Card(1, 1e6, 1e6), Card(1, 1e-9, 1e6)
    engines = Engines(2, 1, 15, 2)
    by_moving = {p.name: p for p in phases(step, fast, engines, Volume(1e12, 4e11, 1e12), 2)}
    assert list(by_moving) == ["generate", "old", "update"]
    # Both branches gather twice, and deal gradients out once.
    moved = 2 * away * (4 * 1e12 + 2 * 4e11)
    assert by_moving["update"].moved == pytest.approx(moved)
    assert by_moving["update"].seconds == pytest.approx(moved / BUS)
    assert by_moving["old"].moved == pytest.approx(away * 1e12)
    by_computing = {p.name: p for p in phases(step, slow, engines, Volume(1e3, 4e2, 1e3), 2)}
    assert by_computing["update"].seconds == pytest.approx(flops["update"] / 2 / 1e3)
    rollout = replace(step.config.rollout, engine="sglang", weight_sync="disk")
    synced = replace(step, config=replace(step.config, rollout=rollout))
    sync = phases(synced, fast, engines, Volume(1e12, 4e11, 3e12), 2)[-1]
    assert (sync.name, sync.seconds) == ("sync", pytest.approx((away + 2) * 3e12 / BUS))
