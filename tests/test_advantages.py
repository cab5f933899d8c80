"""Group advantages and row weights against plain Python arithmetic."""

import math
import random
import statistics

import pytest
import torch

from tercet.core.advantages import group_advantages, row_weights

pytestmark = pytest.mark.core


def test_hand_computed_groups():
    """Group a: rewards 1, 0, 0, 1 with mean 0.5 and std sqrt(1/3); b is constant, c alone."""
    rewards = torch.tensor([1, 0.3, 0, 0, 5, 0.3, 1, 0.3], dtype=torch.float64)
    advantages = group_advantages(rewards, ["a", "b", "a", "a", "c", "b", "a", "b"])
    up = 0.5 / (math.sqrt(1 / 3) + 1e-6)
    assert advantages.dtype == torch.float64
    assert advantages.tolist() == pytest.approx([up, 0, -up, -up, 0, 0, up, 0], rel=1e-14)
    assert (advantages[[1, 4, 5, 7]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_random_groups_of_uneven_size(dtype, eps):
    rng = random.Random(0)
    ids = [rng.randrange(7) for _ in range(63)]
    rewards = torch.tensor([rng.random() for _ in ids]).to(dtype)
    advantages = group_advantages(rewards, torch.tensor(ids), eps=eps)
    want = []
    for value, group in zip(rewards.tolist(), ids, strict=True):
        pool = [v for v, g in zip(rewards.tolist(), ids, strict=True) if g == group]
        want.append((value - statistics.fmean(pool)) / (statistics.stdev(pool) + eps))
    assert advantages.dtype == dtype
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 8e-3}[dtype]
    assert advantages.double().tolist() == pytest.approx(want, rel=tolerance, abs=tolerance)


def test_equal_rewards_give_exactly_zero_whatever_their_rounding():
    rewards = torch.full((7,), 0.1)
    assert torch.equal(group_advantages(rewards, [0] * 7), torch.zeros(7))


def test_no_responses():
    assert group_advantages(torch.zeros(0), []).tolist() == []


@pytest.mark.parametrize(
    "rewards, ids, message",
    [
        (torch.tensor([0.0, math.nan]), ["x", "y"], r"group 'y' must be finite, got \[nan\]"),
        (torch.tensor([0.0, math.inf]), [3, 3], "group 3 must be finite"),
        (torch.tensor([0, 1]), [0, 0], "int64"),
        (torch.tensor([0.0, 1.0]), [0], "1 ids"),
        (torch.zeros(2, 2), [0, 0], r"shape \(2, 2\)"),
    ],
)
def test_bad_rewards(rewards, ids, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, ids)


LENGTHS = [3, 1, 4, 0, 5, 9]
GROUPS = ["a", "a", "b", "b", "a", "c"]
MASKED = [False, False, False, False, True, False]


@pytest.mark.parametrize(
    "mean_over, size, weights",
    [
        ("batch", 4, [1, 1, 1, 0, 0, 1]),
        ("group", 4, [1 / 4, 1 / 4, 1 / 4, 0, 0, 1 / 9]),
        ("response", 4, [1 / 3, 1, 1 / 4, 0, 0, 1 / 9]),
        ("virtual_batch", 2, [1 / 4, 1 / 4, 1 / 13, 0, 0, 1 / 13]),
        ("virtual_batch", 3, [1 / 8, 1 / 8, 1 / 8, 0, 0, 1 / 9]),
        ("virtual_batch", 9, [1 / 17, 1 / 17, 1 / 17, 0, 0, 1 / 17]),
    ],
)
def test_row_weights_by_hand(mean_over, size, weights):
    assert row_weights(LENGTHS, GROUPS, MASKED, mean_over, size) == pytest.approx(weights)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def test_the_weighted_mean_is_the_mean_that_was_asked_for():
    rng = random.Random(1)
    lengths = [rng.randrange(0, 8) for _ in range(40)]
    groups = [rng.randrange(6) for _ in lengths]
    masked = [rng.random() < 0.2 for _ in lengths]
    losses = [[rng.random() for _ in range(length)] for length in lengths]
    kept = [n for n in range(40) if lengths[n] and not masked[n]]
    by_group = [[n for n in kept if groups[n] == group] for group in set(groups)]
    batches = [kept[start : start + 4] for start in range(0, len(kept), 4)]

    def token_mean(members):
        return mean(loss for n in members for loss in losses[n])

    wanted = {
        "batch": token_mean(kept),
        "group": mean(token_mean(members) for members in by_group if members),
        "response": mean(token_mean([n]) for n in kept),
        "virtual_batch": mean(token_mean(members) for members in batches),
    }
    for mean_over, want in wanted.items():
        weights = row_weights(lengths, groups, masked, mean_over, 4)
        above = sum(weights[n] * sum(losses[n]) for n in range(40))
        below = sum(weights[n] * lengths[n] for n in range(40))
        assert above / below == pytest.approx(want, rel=1e-13)
    assert len({round(want, 9) for want in wanted.values()}) == 4


def test_denominators():
    def below(mean_over):
        weights = row_weights(LENGTHS, GROUPS, MASKED, mean_over, 3)
        return sum(w * length for w, length in zip(weights, LENGTHS, strict=True))

    assert [below(m) for m in ("batch", "group", "response", "virtual_batch")] == pytest.approx(
        [17, 3, 4, 2]
    )


def test_nothing_counts():
    for mean_over in ("batch", "group", "response", "virtual_batch"):
        assert row_weights([0, 3], ["a", "a"], [False, True], mean_over) == [0.0, 0.0]
        assert row_weights([], [], [], mean_over) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([1, 2], ["a"], [False, False]), "got 2, 1 and 2"),
        (([-1], ["a"], [False]), r"negative, got \[-1\]"),
        (([1], ["a"], [False], "token"), "mean_over must be one of batch, group"),
        (([1], ["a"], [False], "virtual_batch", 0), "mean_over_size must be at least 1, got 0"),
    ],
)
def test_bad_row_weights(arguments, message):
    with pytest.raises(ValueError, match=message):
        row_weights(*arguments)
