import io
import math
import random
import subprocess
import sys

import pytest
import torch
from torch.nn import Parameter

from tercet.core.config import OptimConfig, TapoOptimConfig
from tercet.train.learner.optim import (
    HALF_UPDATED,
    KahanAdamW,
    Schedule,
    build_optimizer,
    learning_rate,
    optimizer_step,
)

pytestmark = pytest.mark.core


def adamw_float64(start, grads, lr, config):
    """AdamW written out from the paper, on Python's float64."""
    weight, mean, square = start.double(), 0.0, 0.0
    for step, grad in enumerate(grads, 1):
        grad = grad.double()
        mean = config.beta1 * mean + (1 - config.beta1) * grad
        square = config.beta2 * square + (1 - config.beta2) * grad**2
        weight = weight - lr * config.weight_decay * weight
        mean_hat = mean / (1 - config.beta1**step)
        weight = weight - lr * mean_hat / ((square / (1 - config.beta2**step)).sqrt() + config.eps)
    return weight


def shrinking_gradients(steps, size, seed=1):
    grads = torch.randn(steps, size, generator=torch.Generator().manual_seed(seed))
    grads[steps // 3 :] *= 0.1
    return (grads + 0.02).bfloat16()


def weight(optimizer, param):
    return param.detach().double() + optimizer.state[param]["compensation"].double()


def test_float32_parameters_follow_adamw_and_frozen_ones_are_left_out():
    config = OptimConfig(lr=1e-2, weight_decay=0.1)
    start = torch.randn(7, generator=torch.Generator().manual_seed(0))
    bias, frozen = Parameter(start.clone()), Parameter(start.clone(), requires_grad=False)
    optimizer = build_optimizer([("bias", bias), ("frozen", frozen)], config)
    assert type(optimizer) is torch.optim.AdamW
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 1
    grads = torch.randn(20, 7, generator=torch.Generator().manual_seed(1))
    for grad in grads:
        bias.grad = grad.clone()
        assert optimizer_step(optimizer, [bias, frozen], 3e-3, math.inf)[1]
    expected = adamw_float64(start, grads, 3e-3, config)
    assert (bias.double() - expected).abs().max() < 1e-6
    assert (bias.double() - start).abs().max() > 1e-2
    assert torch.equal(frozen, start)


@pytest.mark.parametrize(
    "start, lr, weight_decay, tolerance",
    [(1.0, 1e-6, 0.01, 0.05), (0.5, 1e-6, 0.01, 0.05), (0.02, 1e-4, 0.1, 0.02)],
)
def test_bfloat16_weights_move_as_in_float64(start, lr, weight_decay, tolerance):
    config = OptimConfig(weight_decay=weight_decay)
    grads = shrinking_gradients(900, 200)
    param = Parameter(torch.full((200,), start).bfloat16())
    begin = param.detach().double()
    optimizer = build_optimizer([("weight", param)], config)
    assert type(optimizer) is KahanAdamW
    for grad in grads:
        param.grad = grad.clone()
        optimizer_step(optimizer, [param], lr, math.inf)
    for name in ("exp_avg", "exp_avg_sq", "compensation"):
        assert optimizer.state[param][name].dtype == torch.bfloat16
    expected = adamw_float64(begin, grads, lr, config) - begin
    moved = weight(optimizer, param) - begin
    assert (moved - expected).norm() / expected.norm() < tolerance
    assert abs(moved.mean() / expected.mean() - 1) < 0.01


def test_bfloat16_weights_with_float32_states_are_more_exact_than_float32_ones():
    """Weight and compensation together hold more digits than a float32 weight."""
    config = OptimConfig(weight_decay=0.1, states="float32")
    grads = shrinking_gradients(900, 200)
    errors = []
    for dtype in (torch.bfloat16, torch.float32):
        param = Parameter(torch.full((200,), 0.015625, dtype=dtype))
        begin = param.detach().double()
        optimizer = build_optimizer([("weight", param)], config)
        for grad in grads:
            param.grad = grad.to(dtype)
            optimizer_step(optimizer, [param], 1e-6, math.inf)
        state = optimizer.state[param]
        assert {state[name].dtype for name in state} == {torch.float32}
        moved = param.detach().double() + state.get("compensation", torch.zeros(1)).double() - begin
        expected = adamw_float64(begin, grads, 1e-6, config) - begin
        errors.append((moved - expected).norm() / expected.norm())
    kahan, plain = errors
    assert kahan < 1e-4 < plain  # float32 alone rounds every portion


def test_bfloat16_second_moment_falls_when_gradients_shrink():
    grads = shrinking_gradients(1800, 200)
    param = Parameter(torch.ones(200, dtype=torch.bfloat16))
    optimizer = KahanAdamW([param], 1e-6, (0.9, 0.999), 1e-8, 0.0)
    square = torch.zeros(200, dtype=torch.float64)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
        square = 0.999 * square + 0.001 * grad.double() ** 2
    state = optimizer.state[param]["exp_avg_sq"].double()
    assert square.mean() < 0.3
    assert (state / square - 1).abs().max() < 0.15
    assert abs((state / square - 1).mean()) < 0.01


def test_bfloat16_weight_decay_arrives_although_each_portion_is_below_the_resolution():
    param = Parameter(torch.full((3,), 0.5, dtype=torch.bfloat16))
    optimizer = build_optimizer([("weight", param)], OptimConfig(weight_decay=0.1))
    for _ in range(1000):
        param.grad = torch.zeros_like(param)
        optimizer_step(optimizer, [param], 1e-4, 1.0)
    lost = 0.5 - weight(optimizer, param)
    expected = 0.5 - 0.5 * (1 - 1e-5) ** 1000
    assert ((lost / expected - 1).abs() < 0.01).all()


def test_learning_rate_zero_changes_no_weight_but_the_states():
    param = Parameter(torch.randn(50).bfloat16())
    optimizer = build_optimizer([("weight", param)], OptimConfig())
    for lr, moves in ((1e-3, True), (0.0, False)):
        before = param.detach().clone()
        mean = optimizer.state[param].get("exp_avg", torch.zeros(50)).clone()
        param.grad = torch.ones_like(param)
        optimizer_step(optimizer, [param], lr, 1e9)
        assert torch.equal(before, param) != moves
        assert not torch.equal(mean, optimizer.state[param]["exp_avg"])


def test_a_tensor_updated_in_chunks_is_the_same(monkeypatch):
    results = []
    for chunk in (1 << 24, 8):
        monkeypatch.setattr("tercet.train.learner.optim.CHUNK_ELEMENTS", chunk)
        generator = torch.Generator().manual_seed(0)
        params = [
            Parameter(torch.randn(shape, generator=generator).bfloat16())
            for shape in ((7, 5), (23,), (), (0, 3))
        ]
        params.append(Parameter(torch.randn(6, 4, generator=generator).bfloat16().t()))
        optimizer = KahanAdamW(params, 1e-2, (0.9, 0.999), 1e-8, 0.1)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).bfloat16()
            optimizer.step()
        results.append([param.detach().flatten() for param in params])
    assert torch.equal(torch.cat(results[0]), torch.cat(results[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_optimizer_continues_bit_for_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(12, 31, generator=generator).to(dtype)
    start = torch.randn(31, generator=generator).to(dtype)

    def train(param, optimizer, grads):
        for grad in grads:
            param.grad = grad.clone()
            optimizer_step(optimizer, [param], 1e-3, 2.0)
        return param.detach().clone()

    straight = Parameter(start.clone())
    expected = train(straight, build_optimizer([("w", straight)], OptimConfig()), grads)
    first = Parameter(start.clone())
    optimizer = build_optimizer([("w", first)], OptimConfig())
    half = train(first, optimizer, grads[:5])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = Parameter(half)
    resumed = build_optimizer([("w", second)], OptimConfig())
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(train(second, resumed, grads[5:]), expected)
    for name, value in optimizer.state[first].items():
        assert resumed.state[second][name].dtype == value.dtype


SHARDED = """
import os, sys, torch, torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from tercet.core.config import OptimConfig
from tercet.train.learner.optim import build_optimizer, optimizer_step
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", store=dist.FileStore(folder + "/store", 2), rank=rank, world_size=2)
mesh, full = init_device_mesh("cpu", (2,)), torch.load(folder + "/tensors.pt")
for dtype in (torch.float32, torch.bfloat16):
    shard = lambda t: distribute_tensor(t.to(dtype, copy=True), mesh, [Shard(0)])
    params = [torch.nn.Parameter(shard(t)) for t in full["params"]]
    optimizer, norms = build_optimizer(zip("ab", params), OptimConfig()), []
    for grads in (full["grads"], full["bad"], full["grads"]):
        for param, grad in zip(params, grads):
            param.grad = shard(grad)
        norms.append(optimizer_step(optimizer, params, 1e-2, 0.5))
    result = {"params": [p.detach().full_tensor() for p in params], "norms": norms}
    torch.save(result, f"{folder}/{dtype}_{rank}.pt")
dist.barrier()
os._exit(0)  # gloo's threads now and then abort a process that takes them down
"""


def test_sharded_parameters_take_the_same_steps_as_whole_ones(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 3), (4,)]
    full = {
        name: [torch.randn(shape, generator=generator) for shape in shapes]
        for name in ("params", "grads", "bad")
    }
    full["bad"][0][4, 0] = math.inf  # lies on the second rank only
    torch.save(full, tmp_path / "tensors.pt")
    command = [sys.executable, "-c", SHARDED]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [process.wait(timeout=600) for process in ranks] == [0, 0]
    for dtype in (torch.float32, torch.bfloat16):
        params = [Parameter(t.to(dtype, copy=True)) for t in full["params"]]
        optimizer, norms = build_optimizer(zip("ab", params, strict=True), OptimConfig()), []
        for grads in (full["grads"], full["bad"], full["grads"]):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.to(dtype, copy=True)
            norms.append(optimizer_step(optimizer, params, 1e-2, 0.5))
        assert [stepped for _, stepped in norms] == [True, False, True]
        for rank in (0, 1):
            result = torch.load(tmp_path / f"{dtype}_{rank}.pt")
            assert result["norms"][0][0] == pytest.approx(norms[0][0], rel=1e-6)
            assert [stepped for _, stepped in result["norms"]] == [True, False, True]
            for got, param in zip(result["params"], params, strict=True):
                tolerance = 1e-6 if dtype == torch.float32 else 2**-8
                torch.testing.assert_close(got, param.detach(), rtol=tolerance, atol=1e-7)


def test_gradients_are_clipped_by_their_global_norm():
    config = OptimConfig(eps=1.0)  # so that the size of the gradient shows in the step
    params = [Parameter(torch.zeros(1)), Parameter(torch.zeros(2)), Parameter(torch.zeros(1))]
    optimizer = build_optimizer([(str(i), p) for i, p in enumerate(params)], config)
    params[0].grad, params[1].grad = torch.tensor([3.0]), torch.tensor([0.0, 4.0])
    norm, stepped = optimizer_step(optimizer, params, 0.1, 2.5)
    assert (norm, stepped) == (5.0, True)
    # first Adam step of gradient g: lr * g / (|g| + eps), with g halved
    assert params[0].item() == pytest.approx(-0.1 * 1.5 / 2.5, rel=1e-5)
    assert params[1].tolist() == pytest.approx([0.0, -0.1 * 2.0 / 3.0], rel=1e-5)
    assert all(param.grad is None for param in params)


def test_bfloat16_norm_is_taken_in_float32():
    grad = torch.full((1000,), 1.0, dtype=torch.bfloat16)
    param = Parameter(torch.zeros_like(grad))
    optimizer = build_optimizer([("w", param)], OptimConfig())
    param.grad = grad
    assert optimizer_step(optimizer, [param], 0.0, 1.0)[0] == pytest.approx(1000**0.5, rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_with_a_norm_that_is_not_finite_is_skipped(value):
    param = Parameter(torch.ones(3))
    optimizer = build_optimizer([("w", param)], OptimConfig(lr=0.1))
    param.grad = torch.tensor([1.0, value, 1.0])
    norm, stepped = optimizer_step(optimizer, [param], 0.1, 1.0)
    assert not stepped and not math.isfinite(norm)
    assert torch.equal(param, torch.ones(3)) and param.grad is None and not optimizer.state
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        optimizer_step(optimizer, [param], 0.1, 1.0)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]),
        ("linear", [1.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0]),
        ("cosine", [1.0, 2.0, 2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5, 0.0]),
    ],
)
def test_learning_rate(schedule, expected):
    config = OptimConfig(lr=2.0, schedule=schedule, warmup_steps=2)
    rates = [learning_rate(step, 7, config, False) for step in range(7)]
    assert rates == pytest.approx(expected, abs=1e-12)
    assert learning_rate(9, 7, config, False) == pytest.approx(expected[-1], abs=1e-12)


def test_learning_rate_edges():
    config = TapoOptimConfig(lr=2.0, schedule="linear", skip_first_rollout_lr=True)
    assert learning_rate(0, 3, config, True) == 0.0
    assert [learning_rate(step, 3, config, False) for step in range(3)] == [2.0, 1.0, 0.0]
    assert learning_rate(0, 1, config, False) == 2.0  # the only step is not thrown away
    assert learning_rate(0, 1, OptimConfig(lr=2.0, warmup_steps=4), True) == 0.5
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        learning_rate(-1, 3, config, False)


def rates(schedule: Schedule, parts: list[int], first: int = 0) -> list[float]:
    """Of every mini-batch of steps that have so many of them."""
    found = []
    for step, minibatches in enumerate(parts, first):
        for minibatch in range(minibatches):
            found.append(schedule.rate(step, minibatch, minibatches))
            schedule.taken += 1
    return found


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 4, 5, 40])
@pytest.mark.parametrize("minibatches", [1, 3, 7])
def test_full_steps_have_the_rates_of_their_numbers(name, warmup, minibatches):
    """Bit for bit."""
    config = TapoOptimConfig(lr=3e-4, schedule=name, warmup_steps=warmup)
    total = 10 * minibatches
    expected = [learning_rate(step, total, config, step < minibatches) for step in range(total)]
    assert rates(Schedule(config, 10), [minibatches] * 10) == expected


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_short_steps_have_the_rates_of_their_place(name):
    """Whatever the numbers of mini-batches: the warm-up rises over steps that were taken, then the
    rate falls all the time, and the last mini-batch has 0."""
    generator = random.Random(0)
    for _ in range(200):
        parts = [generator.choice([0, 1, 1, 2, 3, 5]) for _ in range(8)] + [
            generator.choice([1, 3])
        ]
        warmup = generator.choice([0, 0, 1, 3])
        config = TapoOptimConfig(lr=1.0, schedule=name, warmup_steps=warmup)
        found = rates(Schedule(config, len(parts)), parts)
        assert found[:warmup] == [(n + 1) / warmup for n in range(warmup)][: len(found)]
        rest = found[warmup:]
        assert rest == sorted(rest, reverse=True) and rest[:1] in ([], [1.0])
        assert len(rest) < 2 or rest[-1] == pytest.approx(0.0, abs=1e-12)


def test_a_schedule_goes_on_where_it_was_saved():
    config = OptimConfig(lr=1.0, schedule="linear", warmup_steps=2)
    parts = [3, 1, 2, 3, 3]
    whole = rates(Schedule(config, 5), parts)
    for cut in range(1, 5):
        first, second = Schedule(config, 5), Schedule(config, 5)
        found = rates(first, parts[:cut])
        second.restore({"steps_done": cut} | first.state())
        assert found + rates(second, parts[cut:], cut) == whole
    earlier = Schedule(config, 5)  # versions that stored less
    earlier.restore({"steps_done": 2, "optimizer_steps": 6})
    full = [learning_rate(step, 15, config, False) for step in range(15)]
    assert rates(earlier, [3, 3, 3], 2) == full[6:]
    earlier.restore({"steps_done": 3})
    assert earlier.taken == 3


def test_a_skipped_step_does_not_warm_up():
    schedule = Schedule(OptimConfig(lr=1.0, warmup_steps=2), 9)
    assert schedule.rate(0) == schedule.rate(1) == 0.5
    schedule.taken = 1
    assert schedule.rate(2) == 1.0


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), RuntimeError("no device")])
def test_an_error_in_the_optimisers_own_step_is_marked(monkeypatch, error):
    param = Parameter(torch.zeros(1))
    optimizer = build_optimizer([("w", param)], OptimConfig())
    monkeypatch.setattr(optimizer, "step", lambda: (_ for _ in ()).throw(error))
    param.grad = torch.ones(1)
    with pytest.raises((ValueError, RuntimeError), match="out of memory in the opt|no dev") as seen:
        optimizer_step(optimizer, [param], 0.1, 1.0)
    assert seen.value.__notes__ == [HALF_UPDATED]
    with pytest.raises(ValueError, match="no parameter has a gradient") as seen:
        optimizer_step(optimizer, [Parameter(torch.zeros(1))], 0.1, 1.0)
    assert not hasattr(seen.value, "__notes__")


@pytest.mark.parametrize(
    "field, value",
    [
        ("lr", -1.0),
        ("lr", math.nan),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("eps", 0.0),
        ("weight_decay", -0.1),
        ("max_grad_norm", 0.0),
        ("warmup_steps", -1),
        ("schedule", "step"),
    ],
)
def test_an_option_out_of_range_is_named(field, value):
    config = OptimConfig()
    setattr(config, field, value)
    with pytest.raises(ValueError, match=rf"optim\.{field} must be .*, got {value!r}"):
        build_optimizer([("w", Parameter(torch.ones(1)))], config)


def test_parameters_that_cannot_be_trained_are_named():
    single, half = Parameter(torch.ones(1)), Parameter(torch.ones(1, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="nothing to train"):
        build_optimizer([("w", single.requires_grad_(False))], OptimConfig())
    single.requires_grad_(True)
    with pytest.raises(ValueError, match=r"head is torch.bfloat16 but body is torch.float32"):
        build_optimizer([("body", single), ("head", half)], OptimConfig())
    with pytest.raises(ValueError, match="w is torch.float16"):
        build_optimizer([("w", Parameter(torch.ones(1).half()))], OptimConfig())
