"""The operators of `rows` as Triton kernels: all of the head and the loss except the GEMMs.

    row_logprobs   one program per row, over tiles of BLOCK logits; reads 4 V bytes a row. Each lane
                   keeps its own running maximum m, sum of e^(z - m) and sum of (z - m) e^(z - m);
                   lanes are combined once, after the last tile.
                   entropy = log-sum-exp - sum of p z.
    logits_grad_   one program per row; reads 4 V bytes and writes 2 V (bf16) or 4 V bytes.
                   A 16-bit result is written to the front half of the row that it is read from: a
                   barrier between reading and writing a tile keeps one warp from overwriting
                   logits that another has not read.
    tapo_rows      one program per 1,024 rows; 40 bytes a row (Fine-R1, ICLR 2026, eq. 1-4;
                   equation and gradient are at the top of `reference`).

All arithmetic is float32. Row offsets are 64-bit: R V passes 2^31 at 14,135 rows of V = 151,936.
There are no atomics: the same input gives the same bits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tercet.core.config import LossConfig
from tercet.kernels.reference import TERMS

BLOCK = 2048
"""Logits of a tile."""
WARPS = 8
ROWS = 1024
"""Rows of a program of `tapo_rows`."""


@triton.jit
def row_logprobs_kernel(
    logits, labels, logprobs, lse, entropy, vocabulary, inv_temperature, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    # Finite where no logit has been seen yet, so that no lane ever computes inf - inf.
    highest = tl.full([BLOCK], -1e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocabulary
        z = tl.load(logits + column, mask=inside, other=0.0) * inv_temperature
        z = tl.where(inside, z, -1e38)
        new = tl.maximum(highest, z)
        fade = tl.exp(highest - new)
        weight = tl.where(inside, tl.exp(z - new), 0.0)
        moment = fade * (moment + total * (highest - new)) + weight * (z - new)
        total = fade * total + weight
        highest = new
    top = tl.max(highest, 0)
    fade = tl.exp(highest - top)
    moment = tl.sum(fade * (moment + total * (highest - top)), 0)
    total = tl.sum(fade * total, 0)
    # tl.max may drop a NaN; these sums keep it.
    row_lse = top + tl.log(total)
    label = tl.load(labels + row)
    known = (label >= 0) & (label < vocabulary)
    chosen = tl.load(logits + label, mask=known, other=float("nan")) * inv_temperature
    tl.store(logprobs + row, chosen - row_lse)
    tl.store(lse + row, row_lse)
    tl.store(entropy + row, tl.log(total) - moment / total)


@triton.jit
def logits_grad_kernel(
    logits,
    grad,  # the same memory, viewed in the result's dtype
    labels,
    lse,
    entropy,
    d_logprobs,
    d_entropy,
    vocabulary,
    grad_stride,
    inv_temperature,
    HAS_D_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    grad += row * grad_stride
    label = tl.load(labels + row)
    row_lse = tl.load(lse + row)
    scale = tl.load(d_logprobs + row) * inv_temperature
    if HAS_D_ENTROPY:
        row_entropy = tl.load(entropy + row)
        entropy_scale = tl.load(d_entropy + row) * inv_temperature
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocabulary
        log_softmax = tl.load(logits + column, mask=inside, other=0.0) * inv_temperature - row_lse
        softmax = tl.exp(log_softmax)
        value = scale * (tl.where(column == label, 1.0, 0.0) - softmax)
        if HAS_D_ENTROPY:
            value -= entropy_scale * softmax * (log_softmax + row_entropy)
        tl.debug_barrier()
        tl.store(grad + column, value.to(grad.dtype.element_ty), mask=inside)


@triton.jit
def _exp_minus_1_minus(x):
    """e^x - 1 - x, without cancellation near 0."""
    series = 1 / 720 + x * (1 / 5040 + x * (1 / 40320 + x / 362880))
    series = 0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * series)))
    return tl.where(tl.abs(x) < 0.5, x * x * series, tl.exp(x) - 1 - x)


@triton.jit
def _held(x, bound):
    """x held to +-bound; NaN stays NaN, which minimum and maximum would drop."""
    return tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))


@triton.jit
def _k3(log_ratio, log_clamp, clamp):
    """e^d - d - 1 of log-ratios held to +-log_clamp, held to clamp; and its slope."""
    d = _held(log_ratio, log_clamp)
    k3 = _exp_minus_1_minus(d)
    stopped = (k3 > clamp) | (tl.abs(log_ratio) > log_clamp)
    return tl.where(k3 > clamp, clamp, k3), tl.where(stopped, 0.0, k3 + d)


@triton.jit
def _policy_term(a, log_ratio, advantage, clip_low, clip_high, clip_dual, clamp, CISPO):
    """Policy loss, its slope by the log-prob a, and where the upper and the lower bound hold."""
    ratio = tl.exp(_held(log_ratio, clamp))
    negative = advantage < 0
    if CISPO:
        high = ratio > 1 + clip_high
        low = ratio < 1 - clip_low
        slope = -advantage * tl.where(high, 1 + clip_high, tl.where(low, 1 - clip_low, ratio))
        return slope * a, slope, high, low
    upper = tl.where(negative, clip_dual, 1 + clip_high)
    high = ratio > upper
    low = negative & (ratio < 1 - clip_low)
    bounded = tl.where(high, upper, tl.where(low, 1 - clip_low, ratio))
    stopped = high | low | (tl.abs(log_ratio) > clamp)
    pg_loss = -advantage * bounded
    return pg_loss, tl.where(stopped, 0.0, pg_loss), high, low


@triton.jit
def tapo_rows_kernel(
    logprobs,
    old_logprobs,
    neg_logprobs,
    ref_logprobs,
    advantages,
    loss_mask,
    is_weights,
    entropy,
    coefficients,
    neg_coefficients,
    terms,  # [len(TERMS), rows], in the order of TERMS
    rows,
    clip_low,
    clip_high,
    clip_dual,
    log_ratio_clamp,
    kl_coef,
    kl_sign,
    kl_log_clamp,
    kl_clamp,
    entropy_coef,
    neg_entropy_coef,
    ref_kl_coef,
    HAS_OLD: tl.constexpr,
    HAS_NEG: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_IS_WEIGHTS: tl.constexpr,
    CISPO: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    weight = tl.full([ROWS], 1.0, tl.float32)
    if HAS_MASK:
        weight = tl.load(loss_mask + row, mask=inside, other=0.0)
    # Rows of weight 0 are never read: they may hold NaN.
    used = inside & (weight != 0)
    a = tl.load(logprobs + row, mask=used, other=0.0)
    advantage = tl.load(advantages + row, mask=used, other=0.0)
    log_ratio = tl.zeros([ROWS], tl.float32)
    if HAS_OLD:
        log_ratio = a - tl.load(old_logprobs + row, mask=used, other=0.0)
    pg_loss, coefficient, high, low = _policy_term(
        a, log_ratio, advantage, clip_low, clip_high, clip_dual, log_ratio_clamp, CISPO
    )
    if HAS_IS_WEIGHTS:
        is_weight = tl.load(is_weights + row, mask=used, other=0.0)
        pg_loss *= is_weight
        coefficient *= is_weight
    coefficient -= entropy_coef
    terms += row
    if HAS_NEG:
        n = tl.load(neg_logprobs + row, mask=used, other=0.0)
        k3, slope = _k3(kl_sign * (n - a), kl_log_clamp, kl_clamp)
        push = kl_sign * kl_coef * slope
        coefficient += push
        neg_coefficient = tl.where(used, -weight * (push + neg_entropy_coef), 0.0)
        tl.store(neg_coefficients + row, neg_coefficient, mask=inside)
        tl.store(terms + 1 * rows, tl.where(used, weight * k3, 0.0), mask=inside)
        tl.store(terms + 3 * rows, tl.where(used, -weight * n, 0.0), mask=inside)
    if HAS_REF:
        reference = tl.load(ref_logprobs + row, mask=used, other=0.0)
        ref_kl, slope = _k3(reference - a, kl_log_clamp, kl_clamp)
        coefficient -= ref_kl_coef * slope
        tl.store(terms + 8 * rows, tl.where(used, weight * ref_kl, 0.0), mask=inside)
    tl.store(coefficients + row, tl.where(used, weight * coefficient, 0.0), mask=inside)
    tl.store(terms, tl.where(used, weight * pg_loss, 0.0), mask=inside)
    tl.store(terms + 2 * rows, tl.where(used, -weight * a, 0.0), mask=inside)
    tl.store(terms + 4 * rows, tl.where(used & high & (advantage > 0), weight, 0.0), mask=inside)
    tl.store(terms + 5 * rows, tl.where(used & low, weight, 0.0), mask=inside)
    tl.store(terms + 6 * rows, tl.where(used & high & (advantage < 0), weight, 0.0), mask=inside)
    approx_kl = _exp_minus_1_minus(_held(log_ratio, log_ratio_clamp))
    tl.store(terms + 7 * rows, tl.where(used, weight * approx_kl, 0.0), mask=inside)
    exact = tl.load(entropy + row, mask=used, other=0.0)
    tl.store(terms + 9 * rows, tl.where(used, weight * exact, 0.0), mask=inside)


def row_logprobs(
    logits: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows, vocabulary = logits.shape
    outputs = [torch.empty_like(labels, dtype=torch.float32) for _ in range(3)]
    if rows:
        row_logprobs_kernel[(rows,)](
            logits,
            labels.contiguous(),
            *outputs,
            vocabulary,
            1 / temperature,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return tuple(outputs)


def logits_grad_(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    entropy: Tensor,
    d_logprobs: Tensor,
    d_entropy: Tensor | None,
    temperature: float,
    dtype: torch.dtype,
) -> Tensor:
    rows, vocabulary = logits.shape
    grad = logits.view(dtype)
    if rows:
        logits_grad_kernel[(rows,)](
            logits,
            grad,
            labels.contiguous(),
            lse,
            entropy,
            d_logprobs,
            lse if d_entropy is None else d_entropy,
            vocabulary,
            grad.stride(0),
            1 / temperature,
            HAS_D_ENTROPY=d_entropy is not None,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return grad[:, :vocabulary]


def tapo_rows(
    logprobs: Tensor,
    entropy: Tensor,
    loss: LossConfig,
    *,
    old_logprobs: Tensor | None,
    neg_logprobs: Tensor | None,
    advantages: Tensor,
    loss_mask: Tensor | None,
    is_weights: Tensor | None,
    ref_logprobs: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    rows = len(logprobs)
    given = (old_logprobs, neg_logprobs, ref_logprobs, advantages, loss_mask, is_weights)
    # An absent tensor's pointer is never read: the log-probs' stands in.
    given = [logprobs if x is None else x.to(torch.float32).contiguous() for x in given]
    coefficients, neg_coefficients = torch.empty_like(logprobs), torch.empty_like(logprobs)
    terms = torch.zeros(len(TERMS), rows, device=logprobs.device)
    if rows:
        tapo_rows_kernel[(triton.cdiv(rows, ROWS),)](
            logprobs,
            *given,
            entropy,
            coefficients,
            neg_coefficients,
            terms,
            rows,
            **_numbers(loss),
            HAS_OLD=old_logprobs is not None,
            HAS_NEG=neg_logprobs is not None,
            HAS_REF=ref_logprobs is not None,
            HAS_MASK=loss_mask is not None,
            HAS_IS_WEIGHTS=is_weights is not None,
            CISPO=loss.policy_term == "cispo",
            ROWS=ROWS,
            num_warps=4,
        )
    flows = neg_logprobs is not None and loss.neg_grad == "flow"
    return coefficients, neg_coefficients if flows else None, terms.sum(1)


def _numbers(loss: LossConfig) -> dict[str, float]:
    """The kernel's arguments of these names; a clamp that is off is infinite.

    The entropies' coefficients are those of the sampled form.
    """
    sampled = loss.entropy_form == "sampled"
    numbers = {
        "clip_low": loss.clip_low,
        "clip_high": loss.clip_high,
        "clip_dual": loss.clip_dual,
        "log_ratio_clamp": loss.log_ratio_clamp,
        "kl_coef": loss.kl_coef,
        "kl_sign": 1.0 if loss.kl_ratio == "neg_over_policy" else -1.0,
        "kl_log_clamp": loss.kl_log_clamp,
        "kl_clamp": loss.kl_clamp,
        "entropy_coef": loss.entropy_coef * sampled,
        "neg_entropy_coef": loss.neg_entropy_coef * sampled,
        "ref_kl_coef": loss.ref_kl_coef,
    }
    return {name: math.inf if x is None else float(x) for name, x in numbers.items()}
