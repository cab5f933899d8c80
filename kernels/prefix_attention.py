"""Shared-prefix attention: a group's prompt is computed once, its responses hang on it.

A token attends causally to its own segment (prompt or response); a response's token also attends
to its whole prompt. These are two variable-length attention calls over disjoint keys,

    out_a, lse_a = causal(q, k, v)                  every segment by itself
    out_b, lse_b = full(q[responses], k[prompts])   each response's token over its prompt

merged exactly by their log-sum-exps: lse = log(e^lse_a + e^lse_b), out = sum of e^(lse_i - lse)
out_i. In the backward pass each call's own flash backward is given the *merged* output and
log-sum-exp: its probabilities exp(s - lse) and its row term dO . out are then those of the whole
attention, so the two gradients add up to the exact one (as in ring attention).

Both calls are PyTorch's flash attention for CPUs, which returns the log-sum-exp; on other devices
the dense-masked twin of kernels/reference.py stands in. transformers reaches this as the registered
attention `tercet_prefix`, with `segments=` passed through the model's forward; without segments it
is transformers' own SDPA.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from tercet.core.types import Segments
from tercet.kernels.reference import prefix_attention_reference

ATTENTION_NAME = "tercet_prefix"
PADDING_LIMIT = 0.8  # shortest over longest segment of one padded call

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@lru_cache(maxsize=64)
def _buckets(bounds: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Segments of similar length, each bucket as (index [B, L], valid [B, L])."""
    spans = sorted(zip(bounds[:-1], bounds[1:], strict=True), key=lambda s: s[0] - s[1])
    buckets: list[list[tuple[int, int]]] = []
    for start, stop in spans:
        longest = buckets[-1][0][1] - buckets[-1][0][0] if buckets else 0
        if not buckets or stop - start < PADDING_LIMIT * longest:
            buckets.append([])
        buckets[-1].append((start, stop))
    result = []
    for bucket in buckets:
        first, last = torch.tensor(bucket).unbind(1)
        steps = first[:, None] + torch.arange(int((last - first).max()))
        # A padded place repeats the segment's last token: finite, and its gradient is dropped.
        result.append((torch.minimum(steps, last[:, None] - 1), steps < last[:, None]))
    return result


def _causal_forward(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float):
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=_lse_dtype(q))
    for index, valid in _buckets(tuple(bounds.tolist())):
        padded = [x[index].transpose(1, 2) for x in (q, k, v)]
        part, part_lse = _forward(*padded, 0.0, True, scale=scale)
        rows = index[valid]
        out[rows] = part.transpose(1, 2)[valid]
        lse[rows] = part_lse.transpose(1, 2)[valid]
    return out, lse


def _causal_backward(grad, q, k, v, out, lse, bounds: Tensor, scale: float):
    grads = [torch.empty_like(x) for x in (q, k, v)]
    for index, valid in _buckets(tuple(bounds.tolist())):
        padded = [x[index].transpose(1, 2) for x in (q, k, v, out)]
        part_grad = (grad[index] * valid[..., None, None]).transpose(1, 2)
        part_lse = lse[index].transpose(1, 2)
        parts = _backward(part_grad, *padded, part_lse, 0.0, True, scale=scale)
        for total, part in zip(grads, parts, strict=True):
            total[index[valid]] = part.transpose(1, 2)[valid]
    return grads


def _spans(segments: Segments):
    """Slices of (response tokens, prompt tokens) of every prompt that has response tokens."""
    q, k = segments.cu_seqlens_q.tolist(), segments.cu_seqlens_k.tolist()
    for i in range(len(q) - 1):
        if q[i] < q[i + 1]:
            yield slice(q[i], q[i + 1]), slice(k[i], k[i + 1])


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1)[None]  # [L, H, d] -> [1, H, L, d]


def _tokens_first(x: Tensor) -> Tensor:
    return x[0].transpose(0, 1)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
        out, lse = _causal_forward(q, k, v, segments.cu_seqlens, scale)
        responses, prompts = segments.response_index, segments.prompt_index
        for of_q, of_k in _spans(segments):
            rows, keys = responses[of_q], prompts[of_k]
            part, part_lse = _forward(
                *(_heads_first(x) for x in (q[rows], k[keys], v[keys])), 0.0, False, scale=scale
            )
            part, part_lse = _tokens_first(part), _tokens_first(part_lse)
            merged = torch.logaddexp(lse[rows], part_lse)
            own_share = (lse[rows] - merged).exp()[..., None]
            prompt_share = (part_lse - merged).exp()[..., None]
            out[rows] = (own_share * out[rows] + prompt_share * part).to(out.dtype)
            lse[rows] = merged
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        segments, scale = ctx.segments, ctx.scale
        dq, dk, dv = _causal_backward(grad, q, k, v, out, lse, segments.cu_seqlens, scale)
        responses, prompts = segments.response_index, segments.prompt_index
        for of_q, of_k in _spans(segments):
            rows, keys = responses[of_q], prompts[of_k]
            tensors = (grad[rows], q[rows], k[keys], v[keys], out[rows])
            parts = _backward(
                *(_heads_first(x) for x in tensors),
                _heads_first(lse[rows]),
                0.0,
                False,
                scale=scale,
            )
            part_q, part_k, part_v = (_tokens_first(x) for x in parts)
            dq[rows] += part_q
            dk[keys] += part_k
            dv[keys] += part_v
        return dq, dk, dv, None, None


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    """Attention of a pack in which responses share their prompts' keys and values.

    Args:
        q: [T, heads, head_dim] any float dtype: queries with their positions applied.
        k: [T, key_heads, head_dim]: keys; key_heads divides heads.
        v: [T, key_heads, head_dim]: values.
        segments: where prompts and responses lie (see core.types.Segments).
        scale: factor of the scores, 1 / sqrt(head_dim) as a rule.

    Returns:
        [T, heads, head_dim] in q's dtype.
    """
    if q.device.type != "cpu":
        return prefix_attention_reference(q, k, v, segments, scale)
    return _PrefixAttention.apply(q, k, v, segments, scale)


def _attention(module, query, key, value, attention_mask, scaling=None, segments=None, **kwargs):
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    assert query.shape[0] == 1, "a pack is one sequence"
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return prefix_attention(q, k, v, segments, scaling)[None], None


AttentionInterface.register(ATTENTION_NAME, _attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
