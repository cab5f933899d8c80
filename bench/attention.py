"""Shared-prefix attention beside other ways to compute it: gradients first, then time and memory.

    python -m tercet.bench.attention                  # small shapes, on this machine
    python -m tercet.bench.attention --device cuda    # the 3B and 7B models' heads in bf16
    make bench                                        # one small shape, by pytest-benchmark

Every method computes the attention of the same groups (a prompt and its responses), forward and
backward, from queries, keys and values in the layout that suits it. Before a method is timed, its
gradients are compared with float32 attention of one response at a time; a method whose error is
over the gate gets a row without times. Then come rounds in which each method runs once.

- tflop: what the method executes, two products forward and five backward. Variable-length calls
  count the pairs of tokens that see each other; flex attention all pairs of its blocks that are not
  empty; dense masks all pairs.
- peak_share: tflop over ms_50 and the device's peak.
- ratio: ms_50 of `one_by_one` over that of this method.
- extra_mib: peak memory above inputs and gradients.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tercet.bench import measure
from tercet.core.packing import pack
from tercet.core.types import EncodedPrompt, Segments, to_device
from tercet.kernels.prefix_attention import prefix_attention

RESULTS = Path(__file__).parent / "results" / "attention.csv"
PACK = 16_384
"""Tokens of a pack on a GPU, at most: as many groups as fit."""
BLOCK = 128
"""Side of flex attention's blocks."""
PRODUCTS = 2 + 5
"""Matrix products over all pairs of tokens: forward, and backward with its recomputation."""


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


def filled(prompt: int, responses: int, length: int = 350) -> Sizes:
    """As many groups as fit a pack."""
    group = prompt + responses * length
    return Sizes(prompt, responses, length, max(1, PACK // group))


OF_3B, OF_7B = Heads("qwen2.5-vl-3b", 16, 2, 128), Heads("qwen2.5-vl-7b", 28, 4, 128)
GPU_CASES = [
    (OF_3B, filled(64, 2)),
    (OF_3B, filled(320, 5)),
    (OF_3B, filled(320, 10)),
    (OF_3B, filled(1024, 10)),
    (OF_3B, filled(2048, 10)),
    (OF_3B, filled(2048, 32)),
    (OF_7B, filled(320, 10)),
    (OF_7B, filled(2048, 10)),
]
CPU_CASES = [
    (Heads("small", 8, 2, 64), Sizes(*sizes)) for sizes in ((64, 2, 70, 2), (320, 5, 70, 1))
]


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


METHODS = {"ours": ours, "one_by_one": one_by_one, "flex": flex, "dense": dense}
GPU_ONLY = ("flex",)


def exact_gradients(case: Case) -> list[Tensor]:
    """Plain attention in at least float32, one response with its prompt at a time."""
    wide = torch.promote_types(case.upstream.dtype, torch.float32)
    totals = [torch.zeros_like(tensor, dtype=wide) for tensor in case.tensors]
    repeats = case.heads.heads // case.heads.key_heads
    lines = (case.sizes.groups * case.sizes.responses, -1)
    for index, first in zip(case.copies.view(lines), case.first.view(lines), strict=True):
        leaves = [tensor[index].to(wide).requires_grad_() for tensor in case.tensors]
        q, k, v = (x.transpose(0, 1)[None] for x in leaves)
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        with sdpa_kernel(SDPBackend.MATH):
            out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=case.scale)
        upstream = case.upstream[index].to(wide) * first[:, None, None]
        found = torch.autograd.grad(out[0].transpose(0, 1), leaves, upstream)
        for total, gradient in zip(totals, found, strict=True):
            total.index_add_(0, index, gradient)
    return totals


def distance(prepared: Prepared, exact: Sequence[Tensor]) -> float:
    """Largest relative error (Frobenius norm) of the gradients of queries, keys and values."""
    return max(
        ((prepared.packed(found).to(right.dtype) - right).norm() / right.norm()).item()
        for found, right in zip(prepared.gradients(), exact, strict=True)
    )


@dataclass
class Row:
    """A row of the ledger; times of forward + backward in milliseconds."""

    method: str
    model: str
    heads: int
    key_heads: int
    head_dim: int
    prompt: int
    responses: int
    length: int
    groups: int
    dtype: str
    peak_tflops: float
    tokens: int | None = None
    """That the method lays out."""
    ms_20: float | None = None
    ms_50: float | None = None
    ms_80: float | None = None
    tflop: float | None = None
    tflops: float | None = None
    peak_share: float | None = None
    ratio: float | None = None
    extra_mib: float | None = None
    grad_error: float | None = None
    note: str = ""


def check(row: Row, method: Callable[[Case], Prepared], case: Case, exact) -> Prepared | None:
    """Fill in sizes, error and memory, or a note on why there are none; returns what to time."""
    on_gpu = case.upstream.is_cuda
    try:
        prepared = method(case)
        row.grad_error = distance(prepared, exact)
        row.extra_mib = measure.extra_mib(prepared.gradients, on_gpu)[1]
    except Exception as error:  # a peer's own failure is a result
        row.note = measure.failure(error)
        torch.cuda.empty_cache()
        return None
    row.tokens = prepared.tokens
    row.tflop = 2 * PRODUCTS * row.heads * row.head_dim * prepared.pairs / 1e12
    gate = measure.GATE[case.upstream.dtype]
    if not row.grad_error <= gate:
        row.note = f"over the gate of {gate:.1g}: gradients are not exact"
        return None
    return prepared


def run_case(case: Case, rounds: int, peak: float) -> list[Row]:
    """All methods on one case: the gate, then rounds in which each method runs once."""
    on_gpu, exact = case.upstream.is_cuda, exact_gradients(case)
    dtype = str(case.upstream.dtype).removeprefix("torch.")
    rows = {name: Row(name, *case.heads, *case.sizes, dtype, peak / 1e12) for name in METHODS}
    calls = {}
    for name, row in rows.items():
        if name in GPU_ONLY and not on_gpu:
            row.note = "needs a GPU"
        elif prepared := check(row, METHODS[name], case, exact):
            calls[name] = prepared.gradients
    del exact
    for name, times in measure.interleaved(calls, rounds, 1, on_gpu).items():
        row = rows[name]
        row.ms_20, row.ms_50, row.ms_80 = times
        row.tflops = row.tflop / row.ms_50 * 1e3
        row.peak_share = row.tflops * 1e12 / peak
    base = rows["one_by_one"]
    for row in rows.values():
        if base.ms_50 and row.ms_50:
            row.ratio = base.ms_50 / row.ms_50
    return list(rows.values())


def show(row: Row) -> str:
    """A row as a line of text."""
    sizes = f"{row.groups} x ({row.prompt} + {row.responses} x {row.length})"
    what = f"{row.model:14} {sizes:24} {row.method:11}"
    if row.ms_50 is None:
        return f"{what} {row.note}"
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}x of one_by_one"
    rate = f"{row.tflops:7.2f} TFLOP/s ({row.peak_share:.2f} of the peak)"
    return f"{what} {row.ms_50:9.2f} ms {rate} {row.extra_mib:7.0f} MiB {ratio}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--commit", default=measure.commit())
    options = parser.parse_args()
    cases, dtype = CPU_CASES, torch.float32
    if options.device == "cuda":
        cases, dtype = GPU_CASES, torch.bfloat16
    peak = measure.peak_flops(options.device, dtype)
    for heads, sizes in cases:
        case = make_case(heads, sizes, dtype, options.device)
        rows = run_case(case, options.rounds, peak)
        print(*map(show, rows), sep="\n", flush=True)
        measure.append(options.out, rows, measure.conditions(options.device, options.commit))


@pytest.mark.parametrize("method", [name for name in METHODS if name not in GPU_ONLY])
@pytest.mark.benchmark(group="attention of 5 responses of 70 tokens, prompt of 320")
def test_attention(benchmark, method):
    case = make_case(*CPU_CASES[-1], torch.float32, "cpu")
    prepared = METHODS[method](case)
    assert distance(prepared, exact_gradients(case)) <= measure.GATE[torch.float32]
    benchmark.pedantic(prepared.gradients, rounds=8, warmup_rounds=2)


if __name__ == "__main__":
    main()
