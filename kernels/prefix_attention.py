"""Shared-prefix attention: a group's prompt is computed once and shared by its responses.

A token attends causally to its own segment (prompt or response); a response's token also attends
to its whole prompt. This takes two variable-length attention calls over disjoint keys,

    out_a, lse_a = causal(q, k, v)                  every segment by itself
    out_b, lse_b = full(q[responses], k[prompts])   each response's token over its prompt

merged exactly by their log-sum-exps: lse = log(e^lse_a + e^lse_b), out = sum of e^(lse_i - lse)
out_i. In the backward pass the flash backward of each call takes the *merged* output and
log-sum-exp: its probabilities exp(s - lse) and its row term dO . out are then those of the whole
attention, so the two gradients add up to the exact one (as in ring attention).

varlen.py computes both calls; where it has no backend, the dense-masked twin in reference.py is
used. transformers uses this as the registered attention `tercet_prefix`, with `segments=` passed
through the model's forward; without segments it is transformers' own SDPA, and for one new token
a row the same with each key head's queries together.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from tercet.core.types import Segments
from tercet.kernels.reference import prefix_attention_reference
from tercet.kernels.varlen import Bounds, Varlen, backend_of

ATTENTION_NAME = "tercet_prefix"


def _own(segments: Segments) -> Bounds:
    """Queries and keys of the first call: each segment attends to itself."""
    bounds, longest = segments.cu_seqlens, segments.max_seqlen
    return Bounds(bounds, bounds, longest, longest)


def _shared(segments: Segments) -> Bounds:
    """Queries and keys of the second call: the responses of a prompt attend to that prompt."""
    return Bounds(
        segments.cu_seqlens_q, segments.cu_seqlens_k, segments.max_seqlen_q, segments.max_seqlen_k
    )


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, backend: Varlen
    ) -> Tensor:
        out, lse = backend.forward(q, k, v, _own(segments), True, scale)
        rows, keys = segments.response_index, segments.prompt_index
        if rows.numel():
            part, part_lse = backend.forward(
                q[rows], k[keys], v[keys], _shared(segments), False, scale
            )
            merged = torch.logaddexp(lse[rows], part_lse)
            own_share = (lse[rows] - merged).exp()[..., None]
            prompt_share = (part_lse - merged).exp()[..., None]
            out[rows] = (own_share * out[rows] + prompt_share * part).to(out.dtype)
            lse[rows] = merged
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.segments, ctx.scale, ctx.backend = segments, scale, backend
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        segments, scale, backend = ctx.segments, ctx.scale, ctx.backend
        dq, dk, dv = backend.backward(grad, q, k, v, out, lse, _own(segments), True, scale)
        rows, keys = segments.response_index, segments.prompt_index
        if rows.numel():
            part_q, part_k, part_v = backend.backward(
                *(grad[rows], q[rows], k[keys], v[keys], out[rows], lse[rows]),
                *(_shared(segments), False, scale),
            )
            dq[rows] += part_q
            dk[keys] += part_k
            dv[keys] += part_v
        return dq, dk, dv, None, None, None


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    scale: float,
    backend: Varlen | None = None,
) -> Tensor:
    """Attention of a pack in which responses share their prompts' keys and values.

    Args:
        q: [T, heads, head_dim] any float dtype: queries with their positions applied.
        k: [T, key_heads, head_dim]: keys; key_heads divides heads.
        v: [T, key_heads, head_dim]: values.
        segments: the pack's prompts and responses (see core.types.Segments).
        scale: what q . k is multiplied by, usually 1 / sqrt(head_dim).
        backend: computes the two calls; None: the one for q's device and dtype.

    Returns:
        [T, heads, head_dim] in q's dtype.
    """
    backend = backend or backend_of(q)
    if backend is None:
        return prefix_attention_reference(q, k, v, segments, scale)
    return _PrefixAttention.apply(q, k, v, segments, scale, backend)


@torch.compiler.disable
def _attention(module, query, key, value, attention_mask, scaling=None, segments=None, **kwargs):
    heads, key_heads = query.shape[1], key.shape[1]
    if segments is None and query.shape[2] == 1 and heads > key_heads:
        # Decoding: heads that share a key head are its queries. transformers repeats keys instead,
        # up to 5.17 at least, where there is a mask.
        grouped = query.reshape(len(query), key_heads, heads // key_heads, -1)
        out = scaled_dot_product_attention(grouped, key, value, attention_mask, scale=scaling)
        return out.reshape(len(query), 1, heads, -1), None
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    assert query.shape[0] == 1, "a pack is one sequence"
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return prefix_attention(q, k, v, segments, scaling)[None], None


AttentionInterface.register(ATTENTION_NAME, _attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
