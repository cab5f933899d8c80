"""GRPO and its kin: settings of the one loss, each equal to its formula, value and gradient.

Advantages and row weights are made as in a step, the loss by its definition; the formulas are
written here response by response, in float64.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tercet.core.advantages import group_advantages, sequence_old_logprobs, set_advantages
from tercet.core.config import LossConfig
from tercet.core.packing import Piece, response_index, weigh_rows
from tercet.core.types import Group, Response, Triplet
from tercet.kernels.reference import tapo_loss_reference

pytestmark = pytest.mark.core

PLAIN = {"kl_coef": 0.0, "entropy_coef": 0.0, "neg_entropy_coef": 0.0}
UNBOUND = {"clip_dual": None, "log_ratio_clamp": None, "kl_log_clamp": None, "kl_clamp": None}
LENGTHS, REWARDS = [[3, 1, 7], [2, 5, 4]], [[1.0, 0.1, 0.0], [0.0, 0.9, 1.0]]
LONGEST = 16


def draw(seed: int, spread: float) -> list[Tensor]:
    """Log-probs (a leaf), old and reference log-probs of all rows."""
    noise = torch.Generator().manual_seed(seed)
    rows = sum(map(sum, LENGTHS))
    a = -1 - 2 * torch.rand(rows, generator=noise, dtype=torch.float64)
    old, ref = (
        a + spread * torch.randn(rows, generator=noise, dtype=torch.float64) for _ in range(2)
    )
    return [a.requires_grad_(), old, ref]


def ours(a: Tensor, old: Tensor, ref: Tensor, **options) -> Tensor:
    """The loss of a mini-batch of two groups with these options."""
    loss, groups = LossConfig(**PLAIN | UNBOUND | options), []
    for number, (lengths, rewards) in enumerate(zip(LENGTHS, REWARDS, strict=True)):
        triplet = Triplet(f"t{number}", "", "", "", "", "", "")
        group = Group(f"g{number}", triplet, (), [])
        for length, reward in zip(lengths, rewards, strict=True):
            tokens = (0,) * length
            group.responses.append(
                Response("anchor", tokens, (0.0,) * length, "stop", 0, reward=reward)
            )
        groups.append(group)
    set_advantages(groups, loss.advantage_std)
    pieces = [Piece(group, tuple(range(3))) for group in groups]
    total = weigh_rows(pieces, loss, "keep", LONGEST)
    responses = [r for group in groups for r in group.responses]

    def rows(name: str) -> Tensor:
        values = [[getattr(r, name)] * len(r.token_ids) for r in responses]
        return torch.tensor(sum(values, []), dtype=torch.float64)

    if loss.ratio_of == "sequence":
        old = sequence_old_logprobs(a, old, response_index(responses))
    given = {"loss_mask": rows("row_weight"), "num_loss_tokens": total, "loss": loss}
    given |= {"ref_logprobs": ref if loss.needs_reference else None}
    return tapo_loss_reference(a, old, None, rows("advantage"), **given)[0]


def by_response(rows: Tensor) -> list[Tensor]:
    return list(rows.split(sum(LENGTHS, [])))


def advantages(divide: bool = True) -> list[Tensor]:
    found = []
    for rewards in REWARDS:
        pool = torch.tensor(rewards, dtype=torch.float64)
        found += [*((pool - pool.mean()) / (pool.std() + 1e-6 if divide else 1.0))]
    return found


def clipped(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def terms(a, old, low, high, divide=True) -> list[Tensor]:
    """The clipped term of each token, by response."""
    ratios = by_response((a - old).exp())
    pairs = zip(ratios, advantages(divide), strict=True)
    return [clipped(ratio, advantage, low, high) for ratio, advantage in pairs]


def grpo(a, old, ref, beta=0.0):
    """1/G sum_i 1/|o_i| sum_t (min(...) - beta k3) (DeepSeekMath, eq. 3)."""
    d = by_response(ref - a)
    pairs = zip(terms(a, old, 0.2, 0.2), d, strict=True)
    return torch.stack([(x - beta * (y.exp() - y - 1)).mean() for x, y in pairs]).mean()


def dr_grpo(a, old, ref):
    """No division by the standard deviation, nor by a response's own length."""
    found = terms(a, old, 0.2, 0.2, divide=False)
    return torch.stack([x.sum() / LONGEST for x in found]).mean()


def dapo(a, old, ref):
    """1 / sum_i |o_i| over all tokens, the upper bound higher (DAPO, eq. 8)."""
    return torch.cat(terms(a, old, 0.2, 0.28)).mean()


def gspo(a, old, ref):
    """1/G sum_i min(s_i A_i, clip(s_i) A_i), s_i = exp(mean_t log r_t) (GSPO, eq. 5 and 7)."""
    ratios = [x.mean().exp() for x in by_response(a - old)]
    pairs = zip(ratios, advantages(), strict=True)
    return torch.stack([clipped(s, of, 0.03, 0.04) for s, of in pairs]).mean()


def cispo(a, old, ref):
    """1 / sum_i |o_i| sum sg(clip(r)) A log pi (MiniMax-M1, eq. 4)."""
    weights = by_response((a - old).exp().clamp(1 - 0.2, 1 + 0.28).detach())
    pairs = zip(weights, advantages(), by_response(a), strict=True)
    return torch.cat([w * of * x for w, of, x in pairs]).mean()


CASES = {
    "grpo": (grpo, {"mean_over": "response", "clip_high": 0.2}),
    "grpo with beta": (
        lambda *rows: grpo(*rows, beta=0.04),
        {"mean_over": "response", "clip_high": 0.2, "ref_kl_coef": 0.04},
    ),
    "dr_grpo": (
        dr_grpo,
        {"mean_over": "constant", "clip_high": 0.2, "advantage_std": False},
    ),
    "dapo": (dapo, {}),
    "gspo": (
        gspo,
        {"ratio_of": "sequence", "mean_over": "response", "clip_low": 0.03, "clip_high": 0.04},
    ),
    "cispo": (cispo, {"policy_term": "cispo"}),
}


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.4])
@pytest.mark.parametrize("name", CASES)
def test_an_objective_equals_its_formula(name, spread):
    formula, options = CASES[name]
    rows = draw(1, spread)
    want = -formula(*rows)
    (want_grad,) = torch.autograd.grad(want, rows[0])
    found = ours(*rows, **options)
    (grad,) = torch.autograd.grad(found, rows[0])
    assert found.item() == pytest.approx(want.item(), rel=1e-12, abs=1e-14)
    torch.testing.assert_close(grad, want_grad, rtol=1e-12, atol=1e-14)
    if (name, spread) in (("dapo", 0.4), ("grpo", 0.4), ("gspo", 0.05)):
        # Some tokens are held by a bound, not all.
        assert 0 < int((want_grad == 0).sum()) < len(want_grad)


def test_the_objectives_differ():
    rows = draw(1, 0.4)
    values = {round(float(ours(*rows, **options)), 9) for _, options in CASES.values()}
    assert len(values) == len(CASES)


def test_advantages_without_the_standard_deviation():
    rewards = torch.tensor([1.0, 0.0, 0.5, 2.0, 2.0], dtype=torch.float64)
    found = group_advantages(rewards, [0, 0, 0, 1, 1], divide_by_std=False)
    torch.testing.assert_close(found, torch.tensor([0.5, -0.5, 0, 0, 0], dtype=torch.float64))


def test_old_logprobs_of_no_rows():
    empty = torch.zeros(0)
    found = sequence_old_logprobs(empty, empty, torch.zeros(0, dtype=torch.int64))
    assert found.shape == (0,)
