"""The fused head + loss beside its peers: time, memory and gradient error on the same tokens.

    make bench                # row kernels and one shape, by pytest-benchmark
    make bench-kernels        # the matrix of shapes on this machine, into bench/results/kernels.csv
    make gpu PARTS=kernels    # the same on a GPU

Every method in `peers` computes the same loss, forward and backward. Before a method is timed, its
gradients are compared with those of plain PyTorch in float32; a method whose error is over the gate
gets a row without times. (In 16 bits the gate is at least twice the error of `eager`, which rounds
its logits to 16 bits, as most peers do: `grad_error` shows what that costs.) Memory is a call's
peak above its inputs and the gradients it returns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tercet.bench.measure import (
    GATE,
    append,
    commit,
    conditions,
    extra_mib,
    failure,
    interleaved,
)
from tercet.bench.peers import (
    GPU_ONLY,
    METHODS,
    Case,
    checkpointed,
    eager,
    gemms,
    make_case,
    ours,
)
from tercet.kernels.rows import operators

RESULTS = Path(__file__).parent / "results" / "kernels.csv"
CPU_SHAPES = [(512, 512, 32_768)]
GPU_SHAPES = [
    (r, d, v) for r in (8192, 2048, 16_384) for d, v in ((2048, 151_936), (3584, 152_064))
]


@dataclass
class Row:
    """A row of the ledger; times of forward + backward in milliseconds."""

    method: str
    rows: int
    hidden: int
    vocabulary: int
    dtype: str
    ms_20: float | None = None
    ms_50: float | None = None
    ms_80: float | None = None
    share_of_gemms: float | None = None
    extra_mib: float | None = None
    grad_error: float | None = None
    note: str = ""


def gradients(method: Callable[[Case], Tensor], case: Case) -> list[Tensor]:
    """Gradients of hidden states and head."""
    case.hidden.grad = case.weight.grad = None
    method(case).backward()
    found = [case.hidden.grad, case.weight.grad]
    case.hidden.grad = case.weight.grad = None
    return found


def exact_gradients(case: Case) -> list[Tensor]:
    """Plain PyTorch in float32, 512 rows at a time."""
    wide = case.weight.detach().float()
    d_hidden, d_weight = [], torch.zeros_like(wide)
    for part in torch.arange(len(case.labels), device=case.labels.device).split(512):
        leaves = [
            case.hidden[part].detach().float().requires_grad_(),
            wide.clone().requires_grad_(),
        ]
        chunk = Case(*leaves, case.labels[part], case.old_logprobs[part], case.advantages[part])
        (eager(chunk) * (len(part) / len(case.labels))).backward()
        d_hidden.append(leaves[0].grad)
        d_weight += leaves[1].grad
    return [torch.cat(d_hidden), d_weight]


def distance(found: list[Tensor], exact: list[Tensor]) -> float:
    """Largest relative error over both gradients."""
    return max(
        ((a.float() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)
    )


def measure(shape: tuple[int, int, int], dtype: torch.dtype, device: str, rounds: int) -> list[Row]:
    """All methods on one shape: the gate, then rounds in which each method runs once."""
    case, on_gpu = make_case(*shape, dtype, device), device == "cuda"
    exact, gate = exact_gradients(case), GATE[dtype]
    if dtype.itemsize == 2:
        gate = max(gate, 2 * distance(gradients(eager, case), exact))
    rows = {m: Row(m.__name__, *shape, str(dtype).removeprefix("torch.")) for m in METHODS}
    for method, row in rows.items():
        if method in GPU_ONLY and not on_gpu:
            row.note = "needs a GPU"
            continue
        torch._dynamo.reset()  # a peer that compiles knows nothing of other shapes
        try:
            row.grad_error = distance(gradients(method, case), exact)
            row.extra_mib = extra_mib(lambda m=method: gradients(m, case), on_gpu)[1]
        except Exception as error:  # a peer's own failure is a result
            row.note = failure(error)
            torch.cuda.empty_cache()
            continue
        if not row.grad_error <= gate:
            row.note = f"over the gate of {gate:.1g}: gradients are not exact"
    del exact
    timed = [m for m, row in rows.items() if not row.note]
    rows[gemms] = Row("gemms", *shape, str(dtype).removeprefix("torch."), note="ceiling, no loss")
    calls = {m: (lambda m=m: gradients(m, case)) for m in timed} | {gemms: lambda: gemms(case)}
    for method, times in interleaved(calls, rounds, 2, on_gpu).items():
        rows[method].ms_20, rows[method].ms_50, rows[method].ms_80 = times
    for method in calls:
        rows[method].share_of_gemms = rows[gemms].ms_50 / rows[method].ms_50
    return list(rows.values())


def _shape(text: str) -> tuple[int, ...]:
    rows, hidden, vocabulary = map(int, text.split(","))
    return rows, hidden, vocabulary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", type=_shape, nargs="+", metavar="R,D,V", default=())
    parser.add_argument("--commit", default=commit())
    options = parser.parse_args()
    shapes, dtype = options.shapes or CPU_SHAPES, torch.float32
    if options.device == "cuda":
        shapes, dtype = options.shapes or GPU_SHAPES, torch.bfloat16
    for shape in shapes:
        rows = measure(shape, dtype, options.device, options.rounds)
        for row in rows:
            time_s = "" if row.ms_50 is None else f"{row.ms_50:9.2f} ms"
            memory = "" if row.extra_mib is None else f"{row.extra_mib:9.0f} MiB"
            print(f"{shape!s:24} {row.method:28} {time_s:12} {memory:14} {row.note}", flush=True)
        append(options.out, rows, conditions(options.device, options.commit))


@pytest.mark.parametrize("method", [ours, eager, checkpointed], ids=lambda m: m.__name__)
@pytest.mark.benchmark(group="head and loss, forward and backward")
def test_head_and_loss(benchmark, method):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = make_case(256, 256, 16_384, torch.float32, device)
    assert distance(gradients(method, case), exact_gradients(case)) < GATE[torch.float32]
    benchmark.pedantic(lambda: gradients(method, case), rounds=8, warmup_rounds=2)


@pytest.mark.benchmark(group="row operators, 64 rows of V = 151,936")
@pytest.mark.parametrize("operator", ["row_logprobs", "logits_grad_"])
def test_row_operators(benchmark, operator):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = torch.randn(64, 151_936, device=device)
    labels = torch.arange(64, device=device)
    module = operators(logits)
    _, lse, entropy = module.row_logprobs(logits, labels, 1.0)
    calls = {
        "row_logprobs": lambda: module.row_logprobs(logits, labels, 1.0),
        "logits_grad_": lambda: module.logits_grad_(
            logits.clone(), labels, lse, entropy, lse, None, 1.0, torch.float32
        ),
    }
    benchmark.pedantic(calls[operator], rounds=8, warmup_rounds=2)


if __name__ == "__main__":
    main()
