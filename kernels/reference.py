"""PyTorch twins of the fused kernels: the head's log-probs and the TAPO loss, by autograd.

Loss of a response token with log-probs a (policy), o (old), n (policy on the negative image), f
(reference policy) and advantage A (Fine-R1, ICLR 2026, eq. 1-4, negated to be minimised):

    pg - kl_coef k3(d) - entropy_coef a - neg_entropy_coef n + ref_kl_coef k3(f - a)

with r = exp(a - o); pg = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), at most clip_dual |A|
where A < 0; k3(d) = e^d - d - 1; and d = n - a (`neg_over_policy`) or a - n (`policy_over_neg`).
A clamp that binds stops the gradient; exactly on its bound the gradient still flows. For
`neg_over_policy`, no reference policy, w = loss_mask / num_loss_tokens and [...] = 1 where no clamp
binds, else 0, the gradients are

    d loss / d a = w (-A r [pg] + kl_coef (e^d - 1) [k3] - entropy_coef)
    d loss / d n = w (          - kl_coef (e^d - 1) [k3] - neg_entropy_coef)   0 when detached

For `policy_over_neg` kl_coef has the other sign in both.

With `entropy_form: exact` the entropies H = -sum p log p of both distributions stand in the place
of -a and -n: the coefficients above lose their last terms, and d loss / d H = w entropy_coef and
w neg_entropy_coef. With `policy_term: cispo` pg = -A c a, with the constant
c = clip(r, 1 - clip_low, 1 + clip_high) whatever A's sign (MiniMax-M1, arXiv 2506.13585, eq. 4).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tercet.core.config import LossConfig
from tercet.core.types import Segments

TERMS = (
    "pg_loss",
    "kl",
    "entropy",
    "neg_entropy",
    "clip_frac_high",
    "clip_frac_low",
    "clip_frac_dual",
    "approx_kl",
    "ref_kl",
    "exact_entropy",
)
"""Metrics of the loss, in the order in which the row operators sum them up."""


def linear_logprobs_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probs of labels under softmax(hidden weight^T / temperature), and its entropy.

    All [R, V] logits exist at once: for many rows, call it once a chunk.

    Args:
        hidden: [R, D] any float dtype: hidden states.
        weight: [V, D] dtype of `hidden`: the head.
        labels: [R] int64 in [0, V).
        temperature: what logits are divided by, positive.

    Returns:
        logprobs: [R] float32 (float64 for float64): natural logarithms.
        entropy: [R] same dtype: exact entropy of the whole distribution, in nats, differentiable.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a label outside [0, V), or a
            temperature that is not positive.
    """
    check_head(hidden, weight, labels, temperature)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(dtype) @ weight.to(dtype).T / temperature  # [R, V]
    log_softmax = logits.log_softmax(-1)
    logprobs = log_softmax.gather(1, labels[:, None]).squeeze(1)
    return logprobs, -(log_softmax.exp() * log_softmax).sum(-1)


def tapo_loss_reference(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    neg_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    loss: LossConfig = LossConfig(),
    num_loss_tokens: float,
    loss_mask: Tensor | None = None,
    is_weights: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    neg_entropy: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """TAPO loss of response rows (equation at the top of this file) and its metrics.

    Gradients flow into `logprobs` and `entropy` and, with `loss.neg_grad` "flow", into
    `neg_logprobs` and `neg_entropy`; every other tensor is a constant. Sums are taken in float32,
    or in float64 for float64 log-probs.

    Args:
        logprobs: [R] any float dtype: policy on the image of the update.
        old_logprobs: [R] policy at the start of the step; None: the current ones, so that r = 1.
        neg_logprobs: [R] policy on the negative image; None drops the KL and Hneg terms.
        advantages: [R].
        loss: coefficients, clamps and forms of the loss.
        num_loss_tokens: what sums are divided by: `loss_mask` summed over the whole mini-batch and
            all ranks.
        loss_mask: [R] float or bool: row weight; None: 1. Rows of weight 0 may hold anything, NaN
            included.
        is_weights: [R] importance weights of the policy term alone; None: 1.
        ref_logprobs: [R] reference policy; None drops its KL.
        entropy, neg_entropy: [R] exact entropies on both images, for `loss.entropy_form` "exact".

    Returns:
        loss: 0-d; 0 with zero gradients when R = 0.
        metrics: 0-d, detached, weighted by `loss_mask` and divided by `num_loss_tokens`, so that
            they add up over micro-batches and ranks: pg_loss, kl and ref_kl (k3 after its clamps;
            ref_kl only with `ref_logprobs`), entropy and neg_entropy (-a and -n), clip_frac_high,
            clip_frac_low and clip_frac_dual (rows held by each bound), approx_kl (r - 1 - log r).
            kl and neg_entropy are 0 without `neg_logprobs`.
            exact_entropy and exact_neg_entropy where they are given.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, num_loss_tokens not positive, or a
            coefficient other than 0 for a term whose log-probs are None.
    """
    rows = {"old_logprobs": old_logprobs, "neg_logprobs": neg_logprobs, "advantages": advantages}
    rows |= {"loss_mask": loss_mask, "is_weights": is_weights, "ref_logprobs": ref_logprobs}
    rows |= {"entropy": entropy, "neg_entropy": neg_entropy}
    check_rows(logprobs, **rows)
    check_terms(loss, **rows)
    require_positive("num_loss_tokens", num_loss_tokens)
    return unchecked_tapo_loss(logprobs, loss=loss, num_loss_tokens=num_loss_tokens, **rows)


def unchecked_tapo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    neg_logprobs: Tensor | None,
    advantages: Tensor,
    loss: LossConfig,
    num_loss_tokens: float,
    loss_mask: Tensor | None,
    is_weights: Tensor | None,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None = None,
    neg_entropy: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`tapo_loss_reference` without its checks, for callers that have made them."""
    weight = torch.ones_like(logprobs) if loss_mask is None else loss_mask.detach()
    weight = weight.to(torch.promote_types(logprobs.dtype, torch.float32))

    def select(rows: Tensor) -> Tensor:
        # Before any arithmetic: NaN times 0 is NaN, in the backward pass too.
        return torch.where(weight != 0, rows.to(weight.dtype), 0.0)

    a = select(logprobs)
    old = a.detach() if old_logprobs is None else select(old_logprobs.detach())
    terms = _policy_terms(a, old, select(advantages.detach()), loss)
    if is_weights is not None:
        terms["pg_loss"] = terms["pg_loss"] * select(is_weights.detach())
    terms |= {"entropy": -a, "kl": torch.zeros_like(a), "neg_entropy": torch.zeros_like(a)}
    if neg_logprobs is not None:
        n = select(neg_logprobs.detach() if loss.neg_grad == "detach" else neg_logprobs)
        d = n - a if loss.kl_ratio == "neg_over_policy" else a - n
        terms |= {"kl": _k3(d, loss), "neg_entropy": -n}
    if ref_logprobs is not None:
        terms["ref_kl"] = _k3(select(ref_logprobs.detach()) - a, loss)
    if entropy is not None:
        terms["exact_entropy"] = select(entropy)
    if neg_entropy is not None:
        constant = loss.neg_grad == "detach"
        terms["exact_neg_entropy"] = select(neg_entropy.detach() if constant else neg_entropy)
    metrics = {name: (weight * rows).sum() / num_loss_tokens for name, rows in terms.items()}
    return loss_value(metrics, loss), {name: value.detach() for name, value in metrics.items()}


def loss_value(metrics: dict[str, Tensor], loss: LossConfig) -> Tensor:
    """The loss from its terms, each summed over the rows; what is not there counts as 0."""
    form = "exact_" if loss.entropy_form == "exact" else ""
    value = metrics["pg_loss"] - loss.kl_coef * metrics["kl"]
    value = value + loss.entropy_coef * metrics.get(f"{form}entropy", 0)
    value = value + loss.neg_entropy_coef * metrics.get(f"{form}neg_entropy", 0)
    return value + loss.ref_kl_coef * metrics.get("ref_kl", 0)


def entropy_slopes(loss: LossConfig) -> tuple[float, float] | None:
    """d loss / d exact entropy on both images, before row weights; None with the sampled form."""
    if loss.entropy_form == "sampled":
        return None
    return loss.entropy_coef, loss.neg_entropy_coef * (loss.neg_grad == "flow")


def _policy_terms(
    logprobs: Tensor, old: Tensor, advantages: Tensor, loss: LossConfig
) -> dict[str, Tensor]:
    """Policy loss of each row, which bound holds its ratio, and its share of approx_kl."""
    log_ratio = _clamp(logprobs - old, loss.log_ratio_clamp)
    ratio, negative = log_ratio.exp(), advantages < 0
    if loss.policy_term == "cispo":
        weight = ratio.detach().clamp(1 - loss.clip_low, 1 + loss.clip_high)
        high, low = ratio > 1 + loss.clip_high, ratio < 1 - loss.clip_low
        return _terms(-advantages * weight * logprobs, high, low, advantages, log_ratio)
    # -min(r A, clip(r) A), at most clip_dual |A|, is -A times r between bounds set by A's sign.
    upper = torch.full_like(ratio, 1 + loss.clip_high)
    upper = upper.masked_fill(negative, loss.clip_dual or math.inf)
    lower = torch.full_like(ratio, -math.inf).masked_fill(negative, 1 - loss.clip_low)
    high, low = ratio > upper, ratio < lower
    # exp never sees a held row: its overflow times a zero gradient would be NaN.
    free = log_ratio.masked_fill(high | low, 0.0).exp()
    bounded = torch.where(high, upper, torch.where(low, lower, free))
    return _terms(-advantages * bounded, high, low, advantages, log_ratio)


def _terms(
    pg_loss: Tensor, high: Tensor, low: Tensor, advantages: Tensor, log_ratio: Tensor
) -> dict[str, Tensor]:
    return {
        "pg_loss": pg_loss,
        "clip_frac_high": high & (advantages > 0),
        "clip_frac_low": low,
        "clip_frac_dual": high & (advantages < 0),
        "approx_kl": torch.expm1(log_ratio) - log_ratio,
    }


def _k3(log_ratio: Tensor, loss: LossConfig) -> Tensor:
    """e^d - d - 1 of each row, with d held to +-kl_log_clamp and the result to kl_clamp."""
    d = _clamp(log_ratio, loss.kl_log_clamp)
    if loss.kl_clamp is None:
        return torch.expm1(d) - d
    high = torch.expm1(d) - d > loss.kl_clamp
    free = d.masked_fill(high, 0.0)
    return (torch.expm1(free) - free).masked_fill(high, loss.kl_clamp)


def _clamp(values: Tensor, bound: float | None) -> Tensor:
    """Values held to +-bound."""
    if bound is None:
        return values
    # Unlike that of torch.clamp, the gradient of a NaN is NaN.
    return torch.where(values > bound, bound, torch.where(values < -bound, -bound, values))


def check_head(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> None:
    """Raises ValueError where a head's arguments do not fit; labels on a GPU are not read."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "hidden must be [R, D] and weight [V, D], got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if not hidden.is_floating_point() or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden and weight must share a float dtype, got {hidden.dtype} and {weight.dtype}"
        )
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 of shape {tuple(hidden.shape[:1])}, got {labels.dtype} of shape "
            f"{tuple(labels.shape)}"
        )
    if not hidden.device == weight.device == labels.device:
        raise ValueError(
            "hidden, weight and labels must be on one device, got "
            f"{hidden.device}, {weight.device} and {labels.device}"
        )
    require_positive("temperature", temperature)
    if labels.is_cuda:  # reading them would wait for the device
        return
    outside = (labels < 0) | (labels >= weight.shape[0])
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"labels must lie in [0, {weight.shape[0]}), got {int(labels[row])} in row {row}"
        )


def check_rows(logprobs: Tensor, **others: Tensor | None) -> None:
    """Raises ValueError where rows do not fit `logprobs` in shape, dtype or device."""
    if logprobs.dim() != 1 or not logprobs.is_floating_point():
        raise ValueError(
            f"logprobs must be [R] floats, got {logprobs.dtype} of shape {tuple(logprobs.shape)}"
        )
    if others.get("advantages", logprobs) is None:
        raise ValueError("advantages must be [R] floats, got None")
    for name, rows in others.items():
        if rows is None:
            continue
        is_number = rows.is_floating_point() or (name == "loss_mask" and rows.dtype == torch.bool)
        if not is_number or rows.shape != logprobs.shape or rows.device != logprobs.device:
            raise ValueError(
                f"{name} must be floats of shape {tuple(logprobs.shape)} on {logprobs.device}, got "
                f"{rows.dtype} of shape {tuple(rows.shape)} on {rows.device}"
            )


def check_terms(loss: LossConfig, **rows: Tensor | None) -> None:
    """Raises ValueError for a coefficient other than 0 whose rows are None."""
    exact = loss.entropy_form == "exact"
    for name, needed in (
        ("kl_coef", "neg_logprobs"),
        ("neg_entropy_coef", "neg_logprobs"),
        ("ref_kl_coef", "ref_logprobs"),
        *((("entropy_coef", "entropy"), ("neg_entropy_coef", "neg_entropy")) if exact else ()),
    ):
        coefficient = getattr(loss, name)
        if coefficient and rows[needed] is None:
            raise ValueError(f"{name} is {coefficient}, but {needed} is None: it must be 0 then")


def require_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def prefix_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float
) -> Tensor:
    """Shared-prefix attention by one dense [T, T] mask, on any device.

    Args:
        q: [T, heads, head_dim] any float dtype.
        k: [T, key_heads, head_dim]; key_heads divides heads.
        v: [T, key_heads, head_dim].
        segments: the pack's prompts and responses.
        scale: what q . k is multiplied by.

    Returns:
        [T, heads, head_dim] in q's dtype.
    """
    length, device = len(q), q.device
    token = torch.arange(length, device=device)
    own = torch.searchsorted(segments.cu_seqlens.long(), token, right=True)
    seen = (own[:, None] == own) & (token[:, None] >= token)
    for start, stop, first, last in zip(
        segments.cu_seqlens_q[:-1].tolist(),
        segments.cu_seqlens_q[1:].tolist(),
        segments.cu_seqlens_k[:-1].tolist(),
        segments.cu_seqlens_k[1:].tolist(),
        strict=True,
    ):
        responses = segments.response_index[start:stop, None]
        seen[responses, segments.prompt_index[first:last]] = True
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = scaled_dot_product_attention(*heads_first, attn_mask=seen, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)
