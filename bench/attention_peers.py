"""Ways to compute the attention of groups that share prompts: ours and others, on one case.

A method gets queries, keys and values in the layout that suits it, before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from tercet.core.packing import pack
from tercet.core.types import EncodedPrompt, Segments, to_device
from tercet.kernels.prefix_attention import prefix_attention
from tercet.kernels.varlen import Bounds, backend_of

PACK = 16_384
"""Tokens of a pack on a GPU, at most; the length that flex attention is compiled for."""
BLOCK = 128
"""Side of flex attention's blocks."""


class Heads(NamedTuple):
    """Attention heads of a model."""

    model: str
    heads: int
    key_heads: int
    head_dim: int


class Sizes(NamedTuple):
    """Groups of one prompt and its responses, in tokens."""

    prompt: int
    responses: int
    length: int
    groups: int

    @property
    def group(self) -> int:
        """Tokens of a group that shares its prompt."""
        return self.prompt + self.responses * self.length


@dataclass(frozen=True)
class Case:
    """One shape's tensors; the pack has T tokens, its responses have C with a prompt each."""

    heads: Heads
    sizes: Sizes
    tensors: list[Tensor]
    """Queries [T, heads, head_dim], keys and values [T, key_heads, head_dim]."""
    upstream: Tensor
    """[T, heads, head_dim]: gradient of the output."""
    segments: Segments
    copies: Tensor
    """[C] int64: the packed token that each token of one_by_one is a copy of."""
    first: Tensor
    """[C] bool: whether it is the first copy, the one whose output counts."""

    @property
    def scale(self) -> float:
        return self.heads.head_dim**-0.5

    @property
    def copied_upstream(self) -> Tensor:
        """[C, heads, head_dim]: every packed token's gradient once."""
        return self.upstream[self.copies] * self.first[:, None, None]


def segments_of(prompt: int, lengths: Sequence[int], groups: int) -> Segments:
    """Segments of equal groups; packing leaves a response's last token out."""
    positions = torch.arange(prompt)
    encoded = EncodedPrompt(positions, positions.expand(3, -1), prompt, ())
    return pack([(encoded, [(0,) * (n + 1) for n in lengths])] * groups).segments


def make_case(heads: Heads, sizes: Sizes, dtype: torch.dtype, device: str) -> Case:
    """Queries, keys, values and gradients of unit scale."""
    noise = torch.Generator(device).manual_seed(0)
    length = sizes.groups * sizes.group
    counts = (heads.heads, heads.key_heads, heads.key_heads, heads.heads)
    *tensors, upstream = (
        torch.randn(length, n, heads.head_dim, generator=noise, device=device).to(dtype)
        for n in counts
    )
    token = torch.arange(sizes.prompt + sizes.length, device=device)
    response = torch.arange(sizes.responses, device=device)[:, None]
    in_group = torch.where(token < sizes.prompt, token, token + response * sizes.length)
    starts = torch.arange(sizes.groups, device=device)[:, None, None] * sizes.group
    first = ((response == 0) | (token >= sizes.prompt)).repeat(sizes.groups, 1)
    segments = segments_of(sizes.prompt, [sizes.length] * sizes.responses, sizes.groups)
    segments = to_device(segments, device)
    copies = (starts + in_group).flatten()
    return Case(heads, sizes, tensors, upstream, segments, copies, first.flatten())


@dataclass(frozen=True)
class Prepared:
    """A method on one case: its inputs, and the attention that it computes."""

    tensors: list[Tensor]
    """Queries, keys and values in the method's own layout."""
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    upstream: Tensor
    packed: Callable[[Tensor], Tensor]
    """A gradient in the method's layout, as that of the packed tokens."""
    tokens: int
    pairs: float
    """Pairs of tokens that it computes, of each head."""

    def gradients(self) -> list[Tensor]:
        """Forward and backward pass."""
        leaves = [tensor.detach().requires_grad_() for tensor in self.tensors]
        return list(torch.autograd.grad(self.attend(*leaves), leaves, self.upstream))


def ours(case: Case) -> Prepared:
    """`prefix_attention`: a causal call over all segments, one of responses over their prompt."""
    prompt, responses, length, groups = case.sizes
    return Prepared(
        case.tensors,
        lambda q, k, v: prefix_attention(q, k, v, case.segments, case.scale),
        case.upstream,
        lambda gradient: gradient,
        len(case.upstream),
        groups * (prompt**2 / 2 + responses * (length**2 / 2 + length * prompt)),
    )


def one_by_one(case: Case) -> Prepared:
    """A causal variable-length call of the same backend; every response has a prompt of its own."""
    whole, count = case.sizes.prompt + case.sizes.length, case.sizes.groups * case.sizes.responses
    segments = to_device(segments_of(whole, [], count), case.copies.device)

    def packed(gradient: Tensor) -> Tensor:
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        total = wide.new_zeros(len(case.upstream), *wide.shape[1:])
        return total.index_add_(0, case.copies, wide)

    return Prepared(
        [tensor[case.copies] for tensor in case.tensors],
        lambda q, k, v: prefix_attention(q, k, v, segments, case.scale),
        case.copied_upstream,
        packed,
        len(case.copies),
        count * whole**2 / 2,
    )


class _Causal(torch.autograd.Function):
    """A causal call whose last query sees the last key, as flash attention aligns them."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, scale: float) -> Tensor:
        ctx.backend, ctx.bounds, ctx.scale = backend_of(q), bounds, scale
        out, lse = ctx.backend.forward(q, k, v, bounds, True, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        saved = ctx.saved_tensors
        grads = ctx.backend.backward(grad, *saved, ctx.bounds, True, ctx.scale)
        return *grads, None, None


def one_call(case: Case) -> Prepared:
    """One causal call in place of our two: a response's keys follow a copy of its prompt's.

    Key heads are few, so that the copies are small; queries are not copied and nothing is merged.
    """
    prompt, responses, length, groups = case.sizes
    whole, device = prompt + length, case.copies.device
    copied = case.copies.view(groups, responses, whole)
    alone = copied[:, :1, :prompt]  # a prompt sees itself
    keys = torch.cat([part.flatten(1) for part in (alone, copied)], 1).flatten()
    of_keys = torch.tensor([0] + ([prompt] + [whole] * responses) * groups, device=device)
    bounds = Bounds(case.segments.cu_seqlens, of_keys.cumsum(0).int(), max(prompt, length), whole)
    return Prepared(
        case.tensors,
        lambda q, k, v: _Causal.apply(
            q, k.index_select(0, keys), v.index_select(0, keys), bounds, case.scale
        ),
        case.upstream,
        lambda gradient: gradient,
        len(case.upstream),
        ours(case).pairs,
    )


def visible(case: Case, length: int) -> Callable[..., Tensor]:
    """Which keys a query sees, as flex attention asks; tokens behind the pack see themselves."""
    token = torch.arange(length, device=case.copies.device)
    own = torch.searchsorted(case.segments.cu_seqlens.long(), token, right=True)
    own = torch.where(token < len(case.upstream), own, length + token)
    group = token // case.sizes.group
    is_prompt = (token % case.sizes.group < case.sizes.prompt) & (token < len(case.upstream))

    def sees(batch, head, query, key):
        shared = (group[query] == group[key]) & is_prompt[key]
        return (query >= key) & ((own[query] == own[key]) | shared)

    return sees


def heads_first(x: Tensor, length: int) -> Tensor:
    """[T, heads, d] as [1, heads, length, d], filled up with zeros."""
    rows = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, length - len(x)))
    return rows.transpose(0, 1)[None].contiguous()


@cache
def compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention.flex_attention, dynamic=False)


def flex(case: Case) -> Prepared:
    """PyTorch's flex attention, compiled, with a block mask of the same sharing."""
    tokens, device = len(case.upstream), case.copies.device
    length = max(PACK, -(-tokens // BLOCK) * BLOCK)  # one length, so that it is compiled once
    mask = flex_attention.create_block_mask(
        visible(case, length), None, None, length, length, device=device, BLOCK_SIZE=BLOCK
    )
    blocks = (mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()).item()
    return Prepared(
        [heads_first(tensor, length) for tensor in case.tensors],
        lambda q, k, v: compiled_flex()(
            q, k, v, block_mask=mask, scale=case.scale, enable_gqa=True
        ),
        heads_first(case.upstream, length),
        lambda gradient: gradient[0, :, :tokens].transpose(0, 1),
        length,
        blocks * BLOCK**2,
    )


def dense(case: Case) -> Prepared:
    """PyTorch's SDPA with one [T, T] mask, key heads repeated as transformers does with a mask."""
    tokens, repeats = len(case.upstream), case.heads.heads // case.heads.key_heads
    token = torch.arange(tokens, device=case.copies.device)
    seen = visible(case, tokens)(0, 0, token[:, None], token)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        return scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=case.scale)

    return Prepared(
        [heads_first(tensor, tokens) for tensor in case.tensors],
        attend,
        heads_first(case.upstream, tokens),
        lambda gradient: gradient[0].transpose(0, 1),
        tokens,
        tokens**2,
    )


METHODS = {
    "ours": ours,
    "one_by_one": one_by_one,
    "one_call": one_call,
    "flex": flex,
    "dense": dense,
}
GPU_ONLY = ("flex", "one_call")
