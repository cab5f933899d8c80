"""The head and the TAPO loss in one pass: loss, metrics and every gradient, without [R, V].

Fine-R1 (ICLR 2026), eq. 1-4, as written down in `reference`. The gradient of the loss by a row's
log-prob depends on that row's own numbers only, so everything happens chunk by chunk of rows:

    logits = hidden weight^T            one GEMM for both branches, float32 out
    log-prob, log-sum-exp, entropy      row_logprobs: reads the chunk once
    c = d loss / d log-prob             tapo_rows: a few numbers a row
    d logits = c (onehot - p) / temperature         logits_grad_: in the logits' own memory
    d hidden = d logits weight;  d weight += d logits^T hidden      two GEMMs

6 R V D FLOPs a branch, none twice; memory: one chunk of float32 logits and one float32 gradient of
the weight. The backward pass only multiplies by grad_output / num_loss_tokens (so gradients of
16-bit models are of the size of advantages until then). A row on the update's image and the same
row on the negative image stand in one chunk, as both log-probs make both coefficients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tercet.kernels.linear_logprobs import Head, chunks, linear_logprobs
from tercet.kernels.reference import (
    TERMS,
    KlRatio,
    check_bounds,
    check_choices,
    check_head,
    check_rows,
    check_terms,
    require_positive,
)
from tercet.kernels.rows import operators

RowStep = Callable[[slice, Tensor, Tensor], tuple[Sequence[Tensor], Tensor]]
"""(rows of a chunk, log-probs [B, r], entropies [B, r]) -> d loss / d log-probs of each branch, and
sums over the chunk."""


def fused_linear_tapo_loss(
    hidden: Tensor,
    neg_hidden: Tensor | None,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor | None,
    *,
    num_loss_tokens: float,
    temperature: float = 1.0,
    neg_logprobs: Tensor | None = None,
    coefficients: Tensor | tuple[Tensor, Tensor] | None = None,
    chunk_rows: int | None = None,
    return_logprobs: bool = False,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    clip_dual: float | None = 3.0,
    log_ratio_clamp: float | None = 20.0,
    kl_coef: float = 0.01,
    kl_ratio: KlRatio = "neg_over_policy",
    kl_log_clamp: float | None = 20.0,
    kl_clamp: float | None = 10.0,
    entropy_coef: float = 0.03,
    neg_entropy_coef: float = 0.03,
    neg_grad: Literal["flow", "detach"] = "flow",
    loss_mask: Tensor | None = None,
    is_weights: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    ref_kl_coef: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """TAPO loss of response rows from their hidden states, in one pass over the head.

    Equals `linear_logprobs_reference` on both branches and `tapo_loss_reference` on what they
    give; options not named here are that function's.

    Args:
        hidden: [R, D] bf16, fp16, fp32 or fp64: policy on the image of the update.
        neg_hidden: [R, D] policy on the negative image, the same responses; None: see
            `neg_logprobs`.
        weight: [V, D] the head; without requires_grad its gradient's GEMM is left out.
        labels: [R] int64 response tokens.
        old_logprobs: [R] policy at the start of the step; None: the current ones, so that r = 1.
        advantages: [R]; not needed with `coefficients`.
        num_loss_tokens: what sums are divided by: `loss_mask` summed over the whole mini-batch and
            all ranks.
        temperature: what logits are divided by.
        neg_logprobs: [R] constants in place of neg_hidden; None with it: no KL and Hneg terms.
        coefficients: [R] d loss / d logprobs in place of the formula; with neg_hidden a pair, the
            second d loss / d neg_logprobs. The loss is then the sum of coefficients times
            log-probs: of the right gradient, not of the right value.
        chunk_rows: rows of both branches whose logits exist at once; None: what suits the device.
        return_logprobs: add `logprobs` (and `neg_logprobs`) to the metrics: [R] detached, 0 in rows
            of weight 0.
        loss_mask: [R] row weights; rows of weight 0 may hold NaN in every argument but `labels`.

    Returns:
        loss: 0-d float32 (float64 for float64).
        metrics: those of `tapo_loss_reference` and exact_entropy (of the update's image); with
            `coefficients` exact_entropy alone. 0-d, on the device.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an option out of its range, a
            coefficient other than 0 for a term without log-probs, both neg_hidden and
            neg_logprobs, and on a CPU a label outside [0, V) (on a GPU the loss is NaN).
    """
    check_head(hidden, weight, labels, temperature)
    if neg_hidden is not None:
        check_head(neg_hidden, weight, labels, temperature)
        if neg_logprobs is not None:
            raise ValueError("give neg_hidden or neg_logprobs, not both")
    require_positive("num_loss_tokens", num_loss_tokens)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    loss_mask = loss_mask if loss_mask is None else loss_mask.to(dtype)
    head = dict(labels=labels, temperature=temperature, chunk_rows=chunk_rows, loss_mask=loss_mask)
    if coefficients is not None:
        given = [coefficients] if isinstance(coefficients, Tensor) else list(coefficients)
        branches = [hidden] if neg_hidden is None else [hidden, neg_hidden]
        return _weighted_logprobs(
            branches, weight, given, 1.0, return_logprobs, num_loss_tokens=num_loss_tokens, **head
        )
    rows = dict(
        old_logprobs=old_logprobs,
        neg_logprobs=neg_logprobs,
        advantages=advantages,
        loss_mask=loss_mask,
        is_weights=is_weights,
        ref_logprobs=ref_logprobs,
    )
    options = dict(
        clip_low=clip_low,
        clip_high=clip_high,
        clip_dual=clip_dual,
        log_ratio_clamp=log_ratio_clamp,
        kl_coef=kl_coef,
        kl_ratio=kl_ratio,
        kl_log_clamp=kl_log_clamp,
        kl_clamp=kl_clamp,
        entropy_coef=entropy_coef,
        neg_entropy_coef=neg_entropy_coef,
        neg_grad=neg_grad,
        ref_kl_coef=ref_kl_coef,
    )
    check_rows(torch.empty_like(labels, dtype=dtype), **rows)
    negative = neg_hidden if neg_logprobs is None else neg_logprobs
    check_terms(negative, kl_coef, neg_entropy_coef, ref_logprobs, ref_kl_coef, entropy_coef)
    check_bounds(clip_low, clip_high, clip_dual, log_ratio_clamp, kl_log_clamp, kl_clamp)
    check_choices(neg_grad, kl_ratio)
    if neg_hidden is not None and neg_grad == "detach":
        with torch.no_grad():
            kept = _without_masked(neg_hidden, loss_mask)
            rows["neg_logprobs"], _ = linear_logprobs(
                kept, weight, labels, temperature, chunk_rows=chunk_rows
            )
        neg_hidden = None
    branches = [hidden] if neg_hidden is None else [hidden, neg_hidden]

    def row_step(part: slice, logprobs: Tensor, entropy: Tensor):
        chunk = {name: None if x is None else x[part] for name, x in rows.items()}
        if neg_hidden is not None:
            chunk["neg_logprobs"] = logprobs[1]
        *found, sums = operators(hidden).tapo_rows(logprobs[0], entropy[0], **chunk, **options)
        return found[: len(branches)], sums

    done = _one_pass(branches, weight, row_step, 1 / num_loss_tokens, **head)
    metrics = dict(zip(TERMS, (done.sums / num_loss_tokens).unbind(), strict=True))
    loss = metrics["pg_loss"] - kl_coef * metrics["kl"] + entropy_coef * metrics["entropy"]
    loss = loss + neg_entropy_coef * metrics["neg_entropy"] + ref_kl_coef * metrics["ref_kl"]
    if ref_logprobs is None:
        del metrics["ref_kl"]
    if return_logprobs:
        given = [] if rows["neg_logprobs"] is None else [rows["neg_logprobs"].detach()]
        metrics |= _named_logprobs([*done.logprobs, *given], loss_mask)
    return done.attach(loss, branches, weight), metrics


def fused_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    num_loss_tokens: float,
    temperature: float = 1.0,
    loss_mask: Tensor | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy (stage 1) by the same pass: -sum of loss_mask log-probs / num_loss_tokens.

    Args:
        hidden: [R, D] bf16, fp16, fp32 or fp64.
        weight: [V, D] the head.
        labels: [R] int64.
        num_loss_tokens: what the sum is divided by.
        temperature: what logits are divided by.
        loss_mask: [R] row weights; None: 1.
        chunk_rows: rows whose logits exist at once; None: what suits the device.

    Returns:
        loss: 0-d float32 (float64 for float64).
        metrics: cross_entropy and exact_entropy, 0-d, divided by num_loss_tokens.

    Raises:
        ValueError: as `fused_linear_tapo_loss`.
    """
    check_head(hidden, weight, labels, temperature)
    require_positive("num_loss_tokens", num_loss_tokens)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if loss_mask is None:
        loss_mask = torch.ones_like(labels, dtype=dtype)
    loss_mask = loss_mask.to(dtype)
    head = dict(labels=labels, temperature=temperature, chunk_rows=chunk_rows, loss_mask=loss_mask)
    loss, metrics = _weighted_logprobs(
        [hidden],
        weight,
        [-loss_mask],
        1 / num_loss_tokens,
        False,
        num_loss_tokens=num_loss_tokens,
        **head,
    )
    return loss, {"cross_entropy": loss.detach()} | metrics


def _weighted_logprobs(
    branches: Sequence[Tensor],
    weight: Tensor,
    coefficients: Sequence[Tensor],
    scale: float,
    return_logprobs: bool,
    *,
    num_loss_tokens: float,
    loss_mask: Tensor | None,
    **head,
) -> tuple[Tensor, dict[str, Tensor]]:
    """scale times the sum of coefficients times log-probs, and what is known beside it."""
    if len(coefficients) != len(branches):
        raise ValueError(
            f"coefficients must be one [R] a branch: {len(branches)}, got {len(coefficients)}"
        )
    labels = head["labels"]
    like = torch.empty_like(labels, dtype=torch.promote_types(weight.dtype, torch.float32))
    for rows in coefficients:
        check_rows(like, coefficients=rows, loss_mask=loss_mask)
    given = [rows.detach().to(like.dtype) for rows in coefficients]

    def row_step(part: slice, logprobs: Tensor, entropy: Tensor):
        chunk = [rows[part] for rows in given]
        total = sum((c * a).sum() for c, a in zip(chunk, logprobs, strict=True))
        counted = entropy[0] if loss_mask is None else entropy[0] * loss_mask[part]
        return chunk, torch.stack([total, counted.sum()])

    done = _one_pass(branches, weight, row_step, scale, loss_mask=loss_mask, **head)
    loss, exact_entropy = done.sums.unbind()
    metrics = {"exact_entropy": exact_entropy / num_loss_tokens}
    if return_logprobs:
        metrics |= _named_logprobs(done.logprobs, loss_mask)
    return done.attach(loss * scale, branches, weight), metrics


def _named_logprobs(branches: Sequence[Tensor], loss_mask: Tensor | None) -> dict[str, Tensor]:
    if loss_mask is not None:
        branches = [torch.where(loss_mask != 0, rows, 0) for rows in branches]
    return dict(zip(("logprobs", "neg_logprobs"), branches, strict=False))


@dataclass(frozen=True)
class _Done:
    """What a pass leaves behind; gradients are None where nobody needs them."""

    sums: Tensor
    logprobs: Tensor
    """[B, R]."""
    d_hidden: Tensor | None
    """[B, R, D] in the dtype of the hidden states."""
    d_weight: Tensor | None
    """[V, D] in max(float32, the weight's dtype)."""
    scale: float
    """What both gradients must still be multiplied by."""

    def attach(self, loss: Tensor, branches: Sequence[Tensor], weight: Tensor) -> Tensor:
        """The loss, with its gradients behind it."""
        return _Precomputed.apply(loss, self.scale, self.d_hidden, self.d_weight, weight, *branches)


def _one_pass(
    branches: Sequence[Tensor],
    weight: Tensor,
    row_step: RowStep,
    scale: float,
    *,
    labels: Tensor,
    temperature: float,
    chunk_rows: int | None,
    loss_mask: Tensor | None,
) -> _Done:
    """Log-probs, sums and scale times the gradients of B branches [R, D], chunk by chunk."""
    operator, rows, count = operators(weight), len(labels), len(branches)
    needs_hidden = torch.is_grad_enabled() and any(x.requires_grad for x in branches)
    needs_weight = torch.is_grad_enabled() and weight.requires_grad
    head = Head(weight, needs_weight)
    # 16-bit gradients would lose small numbers: they are scaled last.
    now, later = (1.0, scale) if weight.dtype.itemsize == 2 else (scale, 1.0)

    def one_chunk(part: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        mask = None if loss_mask is None else loss_mask[part]
        hidden = torch.cat([_without_masked(x[part], mask) for x in branches])
        logits, chosen = head.logits(hidden), labels[part].repeat(count)
        values, lse, entropy = operator.row_logprobs(logits, chosen, temperature)
        by_branch = values.view(count, -1)
        coefficients, sums = row_step(part, by_branch, entropy.view(count, -1))
        d_hidden = None
        if needs_hidden or needs_weight:
            d_values = torch.cat(list(coefficients)) * now
            d_logits = operator.logits_grad_(
                logits, chosen, lse, entropy, d_values, None, temperature, head.weight.dtype
            )
            d_hidden = head.backward(d_logits, hidden, needs_hidden)
        return by_branch, sums, d_hidden

    with torch.no_grad():
        parts = [one_chunk(part) for part in chunks(rows, weight, chunk_rows, count)]
        logprobs, sums, d_hidden = zip(*parts, strict=True)
        if needs_hidden:
            shaped = [chunk.view(count, -1, weight.shape[1]) for chunk in d_hidden]
        return _Done(
            torch.stack(sums).sum(0),
            torch.cat(logprobs, 1),
            torch.cat(shaped, 1) if needs_hidden else None,
            head.grad,
            later,
        )


def _without_masked(hidden: Tensor, loss_mask: Tensor | None) -> Tensor:
    """Hidden states with 0 in rows of weight 0: a NaN times 0 would reach the weight's gradient."""
    return hidden if loss_mask is None else torch.where(loss_mask[:, None] != 0, hidden, 0)


class _Precomputed(torch.autograd.Function):
    """A loss whose gradients are known already; the backward pass scales them."""

    @staticmethod
    def forward(ctx, loss, scale, d_hidden, d_weight, weight, *branches):
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.scale, ctx.dtype = scale, weight.dtype
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        d_hidden, d_weight = ctx.saved_tensors
        scale = grad_output * ctx.scale
        if scale.device.type == "cpu" and scale == 1:  # on a GPU, to look would be to wait
            scale = None
        grads = [None] * (len(ctx.needs_input_grad) - 5)
        if d_hidden is not None:
            grads = list((d_hidden if scale is None else d_hidden * scale).unbind())
        if d_weight is not None and (scale is not None or d_weight.dtype != ctx.dtype):
            factor = 1.0 if scale is None else scale
            d_weight = torch.mul(d_weight, factor, out=torch.empty_like(d_weight, dtype=ctx.dtype))
        return None, None, None, None, d_weight, *grads
