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
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tercet.bench import measure
from tercet.bench.attention_peers import (
    GPU_ONLY,
    METHODS,
    PACK,
    Case,
    Heads,
    Prepared,
    Sizes,
    make_case,
)

RESULTS = Path(__file__).parent / "results" / "attention.csv"
PRODUCTS = 2 + 5
"""Matrix products over all pairs of tokens: forward, and backward with its recomputation."""


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
