"""What the head and the loss compute row by row, between the GEMMs: in PyTorch.

Three operators work on a chunk of response rows:

    row_logprobs   logits -> log-prob of the label, log-sum-exp and exact entropy of each row
    tapo_rows      log-probs -> d loss / d log-prob of each row, and the sums over rows from which
                   loss and metrics are computed
    logits_grad_   logits -> d loss / d logits, in the logits' own memory

These are for CPUs and for float64; `rows_triton` has the same three as Triton kernels, and
`operators(tensor)` gives the module that suits a tensor.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType

import torch
from torch import Tensor

from tercet.core.config import LossConfig
from tercet.kernels.reference import TERMS, unchecked_tapo_loss

BLOCK_LOGITS = 1 << 19
"""Logits processed at once on a CPU: 2 MiB, so that they stay in the cache between passes."""


def operators(like: Tensor) -> ModuleType:
    """`rows_triton` for float32 on a GPU or in Triton's interpreter, else this module."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if like.dtype != torch.float64 and (like.is_cuda or interpreted):
        from tercet.kernels import rows_triton

        return rows_triton
    return sys.modules[__name__]


def row_logprobs(
    logits: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of each row's label under softmax(logits / temperature).

    Args:
        logits: [R, V] float32 or float64.
        labels: [R] int64.
        temperature: what logits are divided by.

    Returns:
        logprobs, log-sum-exp and entropy, each [R] in the dtype of `logits`. In `rows_triton` the
        log-prob of a label outside [0, V) is NaN: an error would have to wait for the device.
    """
    size = max(1, BLOCK_LOGITS // logits.shape[1])
    done = []
    for block, chosen in zip(logits.split(size), labels.split(size), strict=True):
        highest = block.amax(-1)
        below = (block - highest[:, None]).mul_(1 / temperature)
        weights = below.exp()
        total = weights.sum(-1)
        log_total = total.log()
        logprobs = below.gather(1, chosen[:, None]).squeeze(1) - log_total
        entropy = log_total - torch.linalg.vecdot(weights, below) / total
        done.append(torch.stack([logprobs, highest / temperature + log_total, entropy]))
    return torch.cat(done, 1).unbind()


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
    """Gradient of the logits, which are overwritten.

    With p = softmax(logits / temperature) and H its entropy, d logits is
    (d_logprobs (onehot - p) - d_entropy p (log p + H)) / temperature.

    Args:
        logits: [R, V] float32 or float64.
        labels: [R] int64 in [0, V).
        lse, entropy: [R] log-sum-exp and entropy that `row_logprobs` returns.
        d_logprobs: [R] gradient of the log-probs.
        d_entropy: [R] gradient of the entropy, or None for 0.
        temperature: what logits are divided by.
        dtype: that of the result, no wider than that of `logits`.

    Returns:
        [R, V] of `dtype`; its memory is that of `logits`.
    """
    scale = (d_logprobs / temperature)[:, None]
    log_softmax = logits.mul_(1 / temperature).sub_(lse[:, None])
    if d_entropy is None:
        grad = log_softmax.exp_().mul_(-scale)
    else:
        weight = (d_entropy / temperature)[:, None]
        softmax = log_softmax.exp()
        grad = log_softmax.add_(entropy[:, None]).mul_(weight).add_(scale).mul_(softmax).neg_()
    return grad.scatter_add_(1, labels[:, None], scale).to(dtype)


def tapo_rows(
    logprobs: Tensor,
    entropy: Tensor,
    loss: LossConfig,
    *,
    neg_logprobs: Tensor | None,
    loss_mask: Tensor | None,
    **rows: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """d loss / d log-prob of each row, by autograd of the loss's definition, and sums over rows.

    Args:
        logprobs: [R] float32 or float64: policy on the image of the update.
        entropy: [R] its exact entropies, summed up for the metrics.
        loss: coefficients, clamps and forms of the loss.
        neg_logprobs, loss_mask: [R] as in `tapo_loss_reference`.
        rows: its old_logprobs, advantages, is_weights and ref_logprobs, each [R] or None.

    Returns:
        coefficients: [R] d loss / d logprobs, times num_loss_tokens.
        neg_coefficients: [R] the same for neg_logprobs; None where no gradient flows into them.
        sums: [len(TERMS)] sums over the rows, times their weights.
    """
    leaves = [logprobs.detach().requires_grad_()]
    if neg_logprobs is not None:
        neg_logprobs = neg_logprobs.detach().requires_grad_()
        leaves.append(neg_logprobs)
    with torch.enable_grad():
        value, metrics = unchecked_tapo_loss(
            leaves[0],
            neg_logprobs=neg_logprobs,
            loss=loss,
            num_loss_tokens=1.0,
            loss_mask=loss_mask,
            **rows,
        )
    coefficients = torch.autograd.grad(value, leaves, allow_unused=True)
    if loss_mask is not None:
        entropy = torch.where(loss_mask != 0, entropy * loss_mask, 0)
    metrics["exact_entropy"] = entropy.sum()
    zero = torch.zeros_like(value.detach())
    sums = torch.stack([metrics.get(name, zero).to(zero.dtype) for name in TERMS])
    return coefficients[0], (*coefficients, None)[1], sums
