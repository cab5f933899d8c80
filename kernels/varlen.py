"""Variable-length attention whose log-sum-exp can be read and replaced, on CPU and GPU.

Sequences follow one another in [T, heads, head_dim], bounded by cu_seqlens. The backward pass takes
output and log-sum-exp as arguments. They may be those of a larger attention that this call is a
part of; the gradients are then this part's share of the whole gradient (see prefix_attention.py).
Key heads are not repeated for grouped queries.

On a GPU this is the package flash-attn where it is installed, else the flash attention behind
torch.nn.attention.varlen; both need a 16-bit dtype. On a CPU it is PyTorch's flash attention for
CPUs, with sequences of similar length padded together. The vision towers of transformers use it as
the registered attention `tercet_flash_vision`: all windows of all photos in one call. Under any
name without "flash" they would loop over the windows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

VISION_NAME = "tercet_flash_vision"  # with "flash" in it, transformers passes the bounds
PADDING_LIMIT = 0.8  # least ratio of shortest to longest sequence in one padded call

aten = torch.ops.aten


class Bounds(NamedTuple):
    """Where sequences begin and end."""

    cu_seqlens_q: Tensor
    """[N + 1] int32."""
    cu_seqlens_k: Tensor
    """[N + 1] int32."""
    max_seqlen_q: int
    max_seqlen_k: int


class Varlen(NamedTuple):
    """A backend: forward and backward of one attention call."""

    name: str
    forward: Callable[[Tensor, Tensor, Tensor, Bounds, bool, float], tuple[Tensor, Tensor]]
    """(q, k, v, bounds, causal, scale) -> out [Tq, heads, head_dim], log-sum-exp [Tq, heads]."""
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """(grad, q, k, v, out, lse, bounds, causal, scale) -> gradients of q, k, v."""


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, causal: bool, scale: float):
    out, lse, *_ = aten._flash_attention_forward(q, k, v, *bounds, 0.0, causal, False, scale=scale)
    return out, lse.T


def _flash_backward(grad, q, k, v, out, lse, bounds: Bounds, causal: bool, scale: float):
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty(0, device=q.device)
    tensors = (grad.contiguous(), q, k, v, out, lse.T.contiguous())
    return aten._flash_attention_backward(
        *tensors, *bounds, 0.0, causal, no_dropout, unused, scale=scale
    )


@lru_cache(maxsize=64)
def _buckets(bounds: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Buckets of sequences of similar length, each as (token index [B, L], valid [B, L])."""
    spans = [s for s in zip(bounds[:-1], bounds[1:], strict=True) if s[0] < s[1]]
    spans.sort(key=lambda s: s[0] - s[1])
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
        # Padding repeats the sequence's last token: its values are finite, its gradient is dropped.
        result.append((torch.minimum(steps, last[:, None] - 1), steps < last[:, None]))
    return result


def _spans(bounds: Bounds):
    """Slices of (queries, keys) of every sequence that has queries."""
    q, k = bounds.cu_seqlens_q.tolist(), bounds.cu_seqlens_k.tolist()
    for i in range(len(q) - 1):
        if q[i] < q[i + 1]:
            yield slice(q[i], q[i + 1]), slice(k[i], k[i + 1])


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1)[None]  # [L, H, d] -> [1, H, L, d]


def _tokens_first(x: Tensor) -> Tensor:
    return x[0].transpose(0, 1)


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, causal: bool, scale: float):
    flash = aten._scaled_dot_product_flash_attention_for_cpu
    lse = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    out = torch.empty_like(q)
    if not causal:
        for of_q, of_k in _spans(bounds):
            part = flash(*map(_heads_first, (q[of_q], k[of_k], v[of_k])), 0.0, False, scale=scale)
            out[of_q], lse[of_q] = map(_tokens_first, part)
        return out, lse
    # Padding comes last, so causal attention never sees it.
    for index, valid in _buckets(tuple(bounds.cu_seqlens_q.tolist())):
        padded = [x[index].transpose(1, 2) for x in (q, k, v)]
        part, part_lse = flash(*padded, 0.0, True, scale=scale)
        rows = index[valid]
        out[rows] = part.transpose(1, 2)[valid]
        lse[rows] = part_lse.transpose(1, 2)[valid]
    return out, lse


def _cpu_backward(grad, q, k, v, out, lse, bounds: Bounds, causal: bool, scale: float):
    flash = aten._scaled_dot_product_flash_attention_for_cpu_backward
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    if not causal:
        for of_q, of_k in _spans(bounds):
            tensors = (grad[of_q], q[of_q], k[of_k], v[of_k], out[of_q], lse[of_q])
            parts = flash(*map(_heads_first, tensors), 0.0, False, scale=scale)
            for total, span, part in zip(grads, (of_q, of_k, of_k), parts, strict=True):
                total[span] = _tokens_first(part)
        return grads
    for index, valid in _buckets(tuple(bounds.cu_seqlens_q.tolist())):
        part_grad = (grad[index] * valid[..., None, None]).transpose(1, 2)
        padded = [x[index].transpose(1, 2) for x in (q, k, v, out, lse)]
        parts = flash(part_grad, *padded, 0.0, True, scale=scale)
        for total, part in zip(grads, parts, strict=True):
            total[index[valid]] = part.transpose(1, 2)[valid]
    return grads


FLASH = Varlen("flash attention", _flash_forward, _flash_backward)
CPU = Varlen("flash attention for CPUs", _cpu_forward, _cpu_backward)


@cache
def package_backend() -> Varlen | None:
    """The package flash-attn (2.x); None where it is not installed."""
    try:
        from flash_attn import flash_attn_interface as package
    except ImportError:
        return None

    def forward(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, causal: bool, scale: float):
        out, lse, *_ = package._flash_attn_varlen_forward(q, k, v, *bounds, 0.0, scale, causal)
        return out, lse.T

    def backward(grad, q, k, v, out, lse, bounds: Bounds, causal: bool, scale: float):
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
        tensors = (grad, q, k, v, out, lse.T.contiguous(), *grads)
        no_window, no_cap, no_alibi, repeatable = (-1, -1), 0.0, None, False
        options = (0.0, scale, causal, *no_window, no_cap, no_alibi, repeatable)
        package._flash_attn_varlen_backward(*tensors, *bounds, *options)
        return grads

    return Varlen("flash-attn", forward, backward)


def backend_of(q: Tensor) -> Varlen | None:
    """The backend for q's device and dtype; None where there is none (float32 on a GPU)."""
    if q.device.type == "cpu":
        return CPU
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return package_backend() or FLASH
    return None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bounds: Bounds, scale: float, backend: Varlen) -> Tensor:
        out, lse = backend.forward(q, k, v, bounds, False, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.bounds, ctx.scale, ctx.backend = bounds, scale, backend
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        grads = ctx.backend.backward(grad, *ctx.saved_tensors, ctx.bounds, False, ctx.scale)
        return *grads, None, None, None


def _vision_attention(
    module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **kwargs
):
    """Called by transformers: [1, heads, T, head_dim] to [1, T, heads, head_dim]."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    bounds = cu_seq_lens_q.int()
    longest = int(kwargs["max_length_q"])
    backend = backend_of(q)
    out = _Attention.apply(q, k, v, Bounds(bounds, bounds, longest, longest), scaling, backend)
    return out[None], None


AttentionInterface.register(VISION_NAME, _vision_attention)
AttentionMaskInterface.register(VISION_NAME, sdpa_mask)
