"""The fused head + loss beside its peers: time, memory and gradient error on the same tokens.

    make bench                # row kernels and one shape, by pytest-benchmark
    make bench-kernels        # the matrix of shapes on this machine, into bench/results/kernels.csv
    make bench-gpu-kernels    # the same on a GPU

Every method of `peers` computes the same loss, forward and backward. Before anything is timed its
gradients are compared with plain PyTorch's in float32, a chunk of rows at a time; a method whose
error is over the gate gets a row without times. Memory is what a call has at most above its inputs
and the gradients that it returns.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
import triton
from torch import Tensor

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
GATE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest relative error (Frobenius norm) of a gradient that counts as exact."""
CPU_SHAPES = [(512, 512, 32_768)]
GPU_SHAPES = [
    (r, d, v) for d, v in ((2048, 151_936), (3584, 152_064)) for r in (2048, 8192, 16_384, 32_768)
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
    device: str = ""
    torch: str = torch.__version__
    triton: str = triton.__version__
    commit: str = ""
    date: str = datetime.date.today().isoformat()


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


def extra_mib(method: Callable[[Case], Tensor], case: Case) -> float:
    """Peak memory of a call above its inputs and returned gradients."""
    if case.hidden.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = gradients(method, case)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with torch.profiler.profile(profile_memory=True) as profile:
            kept = gradients(method, case)
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        sizes = [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())]
        peak = max(itertools.accumulate(sizes))
    return (peak - sum(grad.nbytes for grad in kept)) / 2**20


def seconds(call: Callable[[], object], on_gpu: bool) -> float:
    """Wall time of one call."""
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(shape: tuple[int, int, int], dtype: torch.dtype, device: str, rounds: int) -> list[Row]:
    """All methods on one shape: the gate, then rounds in which each method runs once."""
    case, on_gpu = make_case(*shape, dtype, device), device == "cuda"
    exact = exact_gradients(case)
    rows = {m: Row(m.__name__, *shape, str(dtype).removeprefix("torch.")) for m in METHODS}
    for method, row in rows.items():
        if method in GPU_ONLY and not on_gpu:
            row.note = "needs a GPU"
            continue
        try:
            row.grad_error = distance(gradients(method, case), exact)
            row.extra_mib = extra_mib(method, case)
        except Exception as error:  # a peer's own failure is a result
            row.note = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            row.note = row.note[:160]
            torch.cuda.empty_cache()
            continue
        if row.grad_error > GATE[dtype]:
            row.note = "over the gate: gradients are not exact"
    del exact
    timed = [m for m, row in rows.items() if not row.note]
    rows[gemms] = Row("gemms", *shape, str(dtype).removeprefix("torch."), note="ceiling, no loss")
    calls = {m: (lambda m=m: gradients(m, case)) for m in timed} | {gemms: lambda: gemms(case)}
    taken: dict[Callable, list[float]] = {method: [] for method in calls}
    for turn in range(rounds + 2):
        for method, call in calls.items():
            spent = seconds(call, on_gpu)
            if turn >= 2:  # two rounds to warm up
                taken[method].append(1e3 * spent)
    for method, times in taken.items():
        row, times = rows[method], sorted(times)
        row.ms_20, row.ms_50, row.ms_80 = (
            times[int(q * (len(times) - 1))] for q in (0.2, 0.5, 0.8)
        )
    for method in calls:
        rows[method].share_of_gemms = rows[gemms].ms_50 / rows[method].ms_50
    return list(rows.values())


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} {platform.machine()} cores"


def commit() -> str:
    """The commit that is measured, `+` behind it with changes; empty outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--commit", default=commit())
    options = parser.parse_args()
    shapes, dtype = CPU_SHAPES, torch.float32
    if options.device == "cuda":
        shapes, dtype = GPU_SHAPES, torch.bfloat16
    names = [field.name for field in fields(Row)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    is_new = not options.out.exists()
    with options.out.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(names)
        for shape in shapes:
            for row in measure(shape, dtype, options.device, options.rounds):
                row.device, row.commit = device_name(options.device), options.commit
                values = [getattr(row, name) for name in names]
                writer.writerow([f"{v:.4g}" if isinstance(v, float) else v for v in values])
                time_s = "" if row.ms_50 is None else f"{row.ms_50:9.2f} ms"
                memory = "" if row.extra_mib is None else f"{row.extra_mib:9.0f} MiB"
                print(
                    f"{shape!s:24} {row.method:28} {time_s:12} {memory:14} {row.note}", flush=True
                )
            file.flush()


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
