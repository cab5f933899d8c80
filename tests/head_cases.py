"""Inputs of the head and loss, and what float64 and plain PyTorch make of them."""

from __future__ import annotations

import os
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from tercet.core.config import LossConfig
from tercet.kernels.reference import linear_logprobs_reference, tapo_loss_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, on the CPU."""
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, gpu])]
GRADS = ("hidden", "neg_hidden", "weight")
REFERENCE_ROWS = 64  # rows whose [R, V] logits the references hold at once


def make_case(rows, vocabulary, dtype, device="cpu", dim=32, seed=0, spread=0.5) -> dict:
    """Arguments of `fused_linear_tapo_loss` in which every clamp binds somewhere."""
    noise = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=noise, dtype=torch.float64)

    hidden, neg_hidden, weight = normal(rows, dim), normal(rows, dim), normal(vocabulary, dim)
    neg_hidden = 0.7 * hidden + 0.7 * neg_hidden
    case = {
        "hidden": hidden.to(dtype),
        "neg_hidden": neg_hidden.to(dtype),
        "weight": (weight * 2 / dim**0.5).to(dtype),
        "labels": torch.randint(0, vocabulary, (rows,), generator=noise),
        "advantages": normal(rows),
        "loss_mask": torch.rand(rows, generator=noise) * (torch.rand(rows, generator=noise) > 0.2),
    }
    with torch.no_grad():
        logprobs = in_double(case, "hidden")
    case["old_logprobs"] = logprobs - spread * normal(rows)
    wide = torch.promote_types(dtype, torch.float32)
    for name in ("advantages", "loss_mask", "old_logprobs"):
        case[name] = case[name].to(wide)
    return {name: value.to(device) for name, value in case.items()}


def with_loss(options: dict) -> dict:
    """Options of the loss gathered in one LossConfig; without any, the default is left to act."""
    names = {field.name for field in fields(LossConfig)} & options.keys()
    rest = {name: value for name, value in options.items() if name not in names}
    return rest | ({"loss": LossConfig(**{n: options[n] for n in names})} if names else {})


def in_double(case: dict, name: str, temperature: float = 1.0) -> Tensor:
    """Log-probs of a branch in float64, a few rows at a time."""
    weight = case["weight"].double()
    parts = zip(
        case[name].double().split(REFERENCE_ROWS),
        case["labels"].split(REFERENCE_ROWS),
        strict=True,
    )
    scored = [linear_logprobs_reference(h, weight, of, temperature)[0] for h, of in parts]
    return torch.cat(scored)


def run(function, case: dict, upstream: float = 1.0, frozen=(), **options):
    """Loss, metrics and gradients {name: tensor} of a loss function on a case."""
    case = dict(case)
    for name in GRADS:
        if case.get(name) is not None:
            leaf = case[name].detach().clone()
            case[name] = leaf.requires_grad_(name not in frozen)
    loss, metrics = function(**case, **with_loss(options))
    (loss * upstream).backward()
    return loss.detach(), metrics, {n: case[n].grad for n in GRADS if case.get(n) is not None}


def reference(
    hidden, neg_hidden, weight, labels, temperature=1.0, dtype=torch.float64, plain=False, **rest
):
    """The loss as the references define it; plain: with logits in the dtype of the weight."""

    def score(h):
        if not plain:
            w = weight.to(dtype)
            pairs = zip(
                h.to(dtype).split(REFERENCE_ROWS), labels.split(REFERENCE_ROWS), strict=True
            )
            scored = [linear_logprobs_reference(x, w, of, temperature) for x, of in pairs]
            empty = h.new_empty(0, dtype=dtype)
            return [torch.cat(of) for of in zip(*scored, strict=True)] if scored else [empty] * 2
        log_p = ((h @ weight.T).float() / temperature).log_softmax(-1)
        return log_p.gather(1, labels[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)

    if neg_hidden is not None:
        rest["neg_logprobs"], rest["neg_entropy"] = score(neg_hidden)
    rows = {n: x.to(dtype) if isinstance(x, Tensor) else x for n, x in rest.items()}
    order = ("old_logprobs", "neg_logprobs", "advantages")
    first = [rows.pop(name, None) for name in order]
    logprobs, rows["entropy"] = score(hidden)
    if rest.get("loss", LossConfig()).entropy_form == "sampled":
        rows |= {"entropy": None, "neg_entropy": None}
    return tapo_loss_reference(logprobs, *first, **rows)


def error(values: Tensor, exact: Tensor) -> float:
    """Largest absolute difference."""
    return (values.double() - exact.double()).abs().max().item() if exact.numel() else 0.0


def assert_accurate(name: str, ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """flash-attention's rule: at most twice plain PyTorch's error, and 1e-4 of the largest."""
    largest = exact.abs().max().item() if exact.numel() else 0.0
    bound = 2 * error(plain, exact) + 1e-4 * largest
    assert error(ours, exact) <= bound, f"{name}: {error(ours, exact):.3g} over {bound:.3g}"
