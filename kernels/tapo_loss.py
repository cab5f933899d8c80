"""The head and the TAPO loss in one pass: loss, metrics and every gradient, without [R, V].

Fine-R1 (ICLR 2026), eq. 1-4; equation and gradient are at the top of `reference`. The gradient of
the loss by a row's log-prob depends on that row alone, so a chunk of rows goes through all of it:

    logits = hidden weight^T            one GEMM for both branches, float32 out
    log-prob, log-sum-exp, entropy      row_logprobs: reads the logits once
    c = d loss / d log-prob             tapo_rows: a few numbers a row
    d logits = c (onehot - p) / temperature         logits_grad_: in the logits' own memory;
               with exact entropies also - d_entropy p (log p + H) / temperature
    d hidden = d logits weight;  d weight += d logits^T hidden      two GEMMs

6 R V D FLOPs a branch, with nothing computed twice. Memory: one chunk of float32 logits and one
float32 gradient of the weight. The backward pass only multiplies by grad_output; for 16-bit models
also by 1 / num_loss_tokens, as gradients so small would be lost in 16 bits. A chunk holds the same
rows of both branches, because a row's two log-probs together give its two coefficients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tercet.core.config import LossConfig
from tercet.kernels.linear_logprobs import Head, chunks, linear_logprobs
from tercet.kernels.reference import (
    TERMS,
    check_head,
    check_rows,
    check_terms,
    entropy_slopes,
    loss_value,
    require_positive,
)
from tercet.kernels.rows import operators

RowStep = Callable[
    [slice, Tensor, Tensor], tuple[Sequence[Tensor], Sequence[Tensor] | None, Tensor]
]
"""(rows of a chunk, log-probs [B, r], entropies [B, r]) -> d loss / d log-probs of each branch,
d loss / d entropies (None: 0), and sums over the chunk."""
SUMS = (*TERMS, "exact_neg_entropy")
"""What a pass sums up."""


class _Precomputed(torch.autograd.Function):
    """A loss with known gradients; the backward pass scales them."""

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
        if scale.device.type == "cpu" and scale == 1:  # reading it on a GPU would wait for it
            scale = None
        grads = [None] * (len(ctx.needs_input_grad) - 5)
        if d_hidden is not None:
            grads = list((d_hidden if scale is None else d_hidden * scale).unbind())
        if d_weight is not None and (scale is not None or d_weight.dtype != ctx.dtype):
            factor = 1.0 if scale is None else scale
            d_weight = torch.mul(d_weight, factor, out=torch.empty_like(d_weight, dtype=ctx.dtype))
        return None, None, None, None, d_weight, *grads


@dataclass(frozen=True)
class _Done:
    """What a pass returns; gradients are None where none are needed."""

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
        """The loss, differentiable by these gradients."""
        return _Precomputed.apply(loss, self.scale, self.d_hidden, self.d_weight, weight, *branches)


@dataclass(frozen=True)
class _Pass:
    """One pass over the head: all that its branches share."""

    weight: Tensor
    """[V, D]."""
    labels: Tensor
    """[R] int64."""
    temperature: float
    chunk_rows: int | None
    loss_mask: Tensor | None
    """[R] row weights in max(float32, the weight's dtype)."""
    num_loss_tokens: float

    @classmethod
    def of(
        cls,
        branches: Sequence[Tensor],
        weight: Tensor,
        labels: Tensor,
        temperature: float,
        chunk_rows: int | None,
        loss_mask: Tensor | None,
        num_loss_tokens: float,
    ) -> _Pass:
        """Raises ValueError where shapes, dtypes, devices or numbers do not fit."""
        for hidden in branches:
            check_head(hidden, weight, labels, temperature)
        require_positive("num_loss_tokens", num_loss_tokens)
        if loss_mask is not None:
            loss_mask = loss_mask.to(torch.promote_types(weight.dtype, torch.float32))
        return cls(weight, labels, temperature, chunk_rows, loss_mask, num_loss_tokens)

    def run(self, branches: Sequence[Tensor], row_step: RowStep, scale: float) -> _Done:
        """Log-probs, sums and scale times the gradients of B branches [R, D], chunk by chunk."""
        weight, operator, count = self.weight, operators(self.weight), len(branches)
        needs_hidden = torch.is_grad_enabled() and any(x.requires_grad for x in branches)
        needs_weight = torch.is_grad_enabled() and weight.requires_grad
        head = Head(weight, needs_weight)
        # 16-bit gradients would lose small numbers: they are scaled last.
        now, later = (1.0, scale) if weight.dtype.itemsize == 2 else (scale, 1.0)

        def one_chunk(part: slice) -> tuple[Tensor, Tensor, Tensor | None]:
            hidden = torch.cat([self.without_masked(x, part) for x in branches])
            logits, chosen = head.logits(hidden), self.labels[part].repeat(count)
            values, lse, entropy = operator.row_logprobs(logits, chosen, self.temperature)
            by_branch = values.view(count, -1)
            coefficients, slopes, sums = row_step(part, by_branch, entropy.view(count, -1))
            d_hidden = None
            if needs_hidden or needs_weight:
                d_values = torch.cat(list(coefficients)) * now
                d_entropy = None if slopes is None else torch.cat(list(slopes)) * now
                given = (logits, chosen, lse, entropy, d_values, d_entropy, self.temperature)
                d_logits = operator.logits_grad_(*given, head.weight.dtype)
                d_hidden = head.backward(d_logits, hidden, needs_hidden)
            return by_branch, sums, d_hidden

        with torch.no_grad():
            parts = chunks(len(self.labels), weight, self.chunk_rows, count)
            logprobs, sums, d_hidden = zip(*map(one_chunk, parts), strict=True)
            if needs_hidden:
                shaped = [chunk.view(count, -1, weight.shape[1]) for chunk in d_hidden]
            return _Done(
                torch.stack(sums).sum(0),
                torch.cat(logprobs, 1),
                torch.cat(shaped, 1) if needs_hidden else None,
                head.grad,
                later,
            )

    def without_masked(self, hidden: Tensor, part: slice = slice(None)) -> Tensor:
        """Hidden states with 0 in rows of weight 0: NaN times 0 would be NaN in d weight."""
        if self.loss_mask is None:
            return hidden[part]
        return torch.where(self.loss_mask[part, None] != 0, hidden[part], 0)

    def named(self, branches: Sequence[Tensor]) -> dict[str, Tensor]:
        """Each branch's log-probs [R] by name, 0 in rows of weight 0."""
        if self.loss_mask is not None:
            branches = [torch.where(self.loss_mask != 0, rows, 0) for rows in branches]
        return dict(zip(("logprobs", "neg_logprobs"), branches, strict=False))


def _tapo_loss(
    head: _Pass,
    branches: Sequence[Tensor],
    rows: dict[str, Tensor | None],
    loss: LossConfig,
    return_logprobs: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The TAPO loss of one or both branches.

    `rows` are the other rows of `tapo_rows`, and neg_entropy, a constant.
    """
    slopes = entropy_slopes(loss)

    def row_step(part: slice, logprobs: Tensor, entropy: Tensor):
        chunk = {name: None if x is None else x[part] for name, x in rows.items()}
        neg_entropy = chunk.pop("neg_entropy")
        if len(branches) == 2:
            chunk["neg_logprobs"], neg_entropy = logprobs[1], entropy[1]
        *found, sums = operators(head.weight).tapo_rows(logprobs[0], entropy[0], loss, **chunk)
        weight = torch.ones_like(entropy[0]) if head.loss_mask is None else head.loss_mask[part]
        of_negative = torch.zeros_like(weight) if neg_entropy is None else neg_entropy
        total = torch.where(weight != 0, weight * of_negative, 0).sum()
        by_branch = None if slopes is None else [slope * weight for slope in slopes]
        sums = torch.cat([sums, total[None].to(sums.dtype)])
        return found[: len(branches)], by_branch and by_branch[: len(branches)], sums

    done = head.run(branches, row_step, 1 / head.num_loss_tokens)
    metrics = dict(zip(SUMS, (done.sums / head.num_loss_tokens).unbind(), strict=True))
    value = loss_value(metrics, loss)
    if rows["ref_logprobs"] is None:
        del metrics["ref_kl"]
    if slopes is None:
        del metrics["exact_neg_entropy"]
    if return_logprobs:
        constant = [] if rows["neg_logprobs"] is None else [rows["neg_logprobs"].detach()]
        metrics |= head.named([*done.logprobs, *constant])
    return done.attach(value, branches, head.weight), metrics


def _weighted_logprobs(
    head: _Pass,
    branches: Sequence[Tensor],
    coefficients: Tensor | Sequence[Tensor],
    scale: float,
    return_logprobs: bool,
    d_entropy: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """scale times the sum of coefficients times log-probs, and the metrics known with it.

    d_entropy, of a single branch, add themselves times the exact entropy.
    """
    coefficients = [coefficients] if isinstance(coefficients, Tensor) else list(coefficients)
    if len(coefficients) != len(branches):
        raise ValueError(
            f"coefficients must be one [R] a branch: {len(branches)}, got {len(coefficients)}"
        )
    dtype = torch.promote_types(head.weight.dtype, torch.float32)
    like = torch.empty_like(head.labels, dtype=dtype)
    for rows in coefficients:
        check_rows(like, coefficients=rows, loss_mask=head.loss_mask, d_entropy=d_entropy)
    given = [rows.detach().to(dtype) for rows in coefficients]

    def row_step(part: slice, logprobs: Tensor, entropy: Tensor):
        chunk = [rows[part] for rows in given]
        total = sum((c * a).sum() for c, a in zip(chunk, logprobs, strict=True))
        counted = entropy[0] if head.loss_mask is None else entropy[0] * head.loss_mask[part]
        if d_entropy is None:
            return chunk, None, torch.stack([total, counted.sum()])
        slopes = d_entropy[part].detach().to(dtype)
        total = total + (slopes * entropy[0]).sum()
        return chunk, [slopes], torch.stack([total, counted.sum()])

    done = head.run(branches, row_step, scale)
    loss, exact_entropy = done.sums.unbind()
    metrics = {"exact_entropy": exact_entropy / head.num_loss_tokens}
    if return_logprobs:
        metrics |= head.named(done.logprobs)
    return done.attach(loss * scale, branches, head.weight), metrics


def fused_linear_tapo_loss(
    hidden: Tensor,
    neg_hidden: Tensor | None,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor | None,
    *,
    loss: LossConfig = LossConfig(),
    num_loss_tokens: float,
    temperature: float = 1.0,
    neg_logprobs: Tensor | None = None,
    neg_entropy: Tensor | None = None,
    coefficients: Tensor | tuple[Tensor, Tensor] | None = None,
    d_entropy: Tensor | None = None,
    chunk_rows: int | None = None,
    return_logprobs: bool = False,
    loss_mask: Tensor | None = None,
    is_weights: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """TAPO loss of response rows from their hidden states, in one pass over the head.

    Equals `tapo_loss_reference` on the log-probs and the exact entropies that
    `linear_logprobs_reference` gives of each branch.

    Args:
        hidden: [R, D] bf16, fp16, fp32 or fp64: policy on the image of the update.
        neg_hidden: [R, D] policy on the negative image, the same responses; None: see
            `neg_logprobs`.
        weight: [V, D] the head; without requires_grad its gradient's GEMM is left out.
        labels: [R] int64 response tokens.
        old_logprobs: [R] policy at the start of the step; None: the current ones, so that r = 1.
        advantages: [R]; not needed with `coefficients`.
        loss: coefficients, clamps and forms of the loss.
        num_loss_tokens: what sums are divided by: `loss_mask` summed over the whole mini-batch and
            all ranks.
        temperature: what logits are divided by.
        neg_logprobs: [R] constants in place of neg_hidden; None with it: no KL and Hneg terms.
        neg_entropy: [R] the same, exact entropies, where the loss takes those.
        coefficients: [R] d loss / d logprobs in place of the formula; with neg_hidden a pair, the
            second d loss / d neg_logprobs. The loss is then the sum of coefficients times
            log-probs: its gradient is right, its value is not.
        d_entropy: [R] with `coefficients` of one branch: d loss / d exact entropy.
        chunk_rows: rows of both branches whose logits exist at once; None: what suits the device.
        return_logprobs: add `logprobs` (and `neg_logprobs`) to the metrics: [R] detached, 0 in rows
            of weight 0.
        loss_mask: [R] row weights; rows of weight 0 may hold NaN in every argument but `labels`.
        is_weights: [R] importance weights of the policy term alone; None: 1.
        ref_logprobs: [R] reference policy; None drops its KL.

    Returns:
        loss: 0-d float32 (float64 for float64).
        metrics: those of `tapo_loss_reference` and exact_entropy (of the update's image; where
            the loss takes exact ones also exact_neg_entropy); with `coefficients` exact_entropy
            alone. 0-d, on the device.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a number that must be positive, a
            coefficient other than 0 for a term without log-probs, both neg_hidden and
            neg_logprobs, and on a CPU a label outside [0, V) (on a GPU the loss is NaN).
    """
    branches = [hidden] if neg_hidden is None else [hidden, neg_hidden]
    given = (weight, labels, temperature, chunk_rows, loss_mask, num_loss_tokens)
    head = _Pass.of(branches, *given)
    if neg_hidden is not None and neg_logprobs is not None:
        raise ValueError("give neg_hidden or neg_logprobs, not both")
    if coefficients is not None:
        return _weighted_logprobs(head, branches, coefficients, 1.0, return_logprobs, d_entropy)
    rows = {"old_logprobs": old_logprobs, "neg_logprobs": neg_logprobs, "advantages": advantages}
    rows |= {"loss_mask": head.loss_mask, "is_weights": is_weights, "ref_logprobs": ref_logprobs}
    rows["neg_entropy"] = neg_entropy
    check_rows(torch.empty_like(labels, dtype=torch.float32), **rows)
    computed = {} if neg_hidden is None else dict.fromkeys(("neg_logprobs", "neg_entropy"), hidden)
    check_terms(loss, **rows | computed, entropy=hidden)
    if neg_hidden is not None and loss.neg_grad == "detach":
        branches, given = [hidden], (head.without_masked(neg_hidden), weight, labels, temperature)
        with torch.no_grad():
            found = linear_logprobs(*given, chunk_rows=chunk_rows)
        rows["neg_logprobs"], rows["neg_entropy"] = found
    return _tapo_loss(head, branches, rows, loss, return_logprobs)


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
    if loss_mask is None:
        loss_mask = torch.ones_like(labels)
    given = (weight, labels, temperature, chunk_rows, loss_mask, num_loss_tokens)
    head = _Pass.of([hidden], *given)
    scale = 1 / num_loss_tokens
    loss, metrics = _weighted_logprobs(head, [hidden], [-head.loss_mask], scale, False)
    return loss, {"cross_entropy": loss.detach()} | metrics
