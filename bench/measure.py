"""What the benchmarks share: time, peak memory, error of gradients, and rows of a ledger."""

from __future__ import annotations

import csv
import ctypes
import datetime
import itertools
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
import transformers
import triton
from torch import Tensor

from tercet.core.commit import git
from tercet.train.fit.roofline import card_of

GATE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest relative error (Frobenius norm) of a gradient that counts as exact."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""cpu: CPU time of all threads, which varies less for one thread on a shared machine."""
Key = TypeVar("Key")


def seconds(call: Callable[[], object], on_gpu: bool, clock: str = "wall") -> float:
    """Duration of one call by a clock of CLOCKS."""
    if on_gpu:
        torch.cuda.synchronize()
    start = CLOCKS[clock]()
    call()
    if on_gpu:
        torch.cuda.synchronize()
    return CLOCKS[clock]() - start


def interleaved(
    calls: dict[Key, Callable[[], object]],
    rounds: int,
    warm_up: int,
    on_gpu: bool,
    clock: str = "wall",
) -> dict[Key, tuple[float, float, float]]:
    """Milliseconds (20th, 50th, 80th percentile) of each call; every round runs each call once."""
    taken: dict[Key, list[float]] = {key: [] for key in calls}
    for turn in range(warm_up + rounds):
        for key, call in calls.items():
            spent = seconds(call, on_gpu, clock)
            if turn >= warm_up:
                taken[key].append(1e3 * spent)
    found = {}
    for key, times in taken.items():
        times.sort()
        found[key] = tuple(times[round(q * (len(times) - 1))] for q in (0.2, 0.5, 0.8))
    return found


def extra_mib(call: Callable[[], list[Tensor]], on_gpu: bool) -> tuple[list[Tensor], float]:
    """What a call returns, and its peak memory beyond what existed before and what it returns."""
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with torch.profiler.profile(profile_memory=True) as profile:
            kept = call()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        sizes = [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())]
        peak = max(itertools.accumulate(sizes))
    return kept, (peak - sum(tensor.nbytes for tensor in kept)) / 2**20


def keep_memory() -> None:
    """Let the C library keep freed memory, as PyTorch does on a GPU.

    Otherwise every large tensor starts with page faults: an eighth of the time of a step of three
    groups.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:  # glibc: M_MMAP_MAX, M_TRIM_THRESHOLD
        mallopt(-4, 0)
        mallopt(-1, 2**31 - 1)


def peak_flops(device: str, dtype: torch.dtype, clock: str = "wall") -> float:
    """Peak FLOP/s of a device: from a known GPU's datasheet, else of a large product, measured."""
    if device == "cuda" and dtype == torch.bfloat16:
        card = card_of(torch.cuda.get_device_name())
        if card is not None:
            return card.tflops * 1e12
    return product_flops(device, dtype, clock)


def product_flops(device: str, dtype: torch.dtype, clock: str = "wall") -> float:
    """FLOP/s of a large product of random numbers, measured."""
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / min(seconds(lambda: a @ b, device == "cuda", clock) for _ in range(6))


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written, of a large copy within a device's memory."""
    source = torch.ones(2**28 if device == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    taken = (seconds(lambda: target.copy_(source), device == "cuda") for _ in range(6))
    return 2 * source.nbytes / min(taken)


def failure(error: Exception) -> str:
    """A note on why a peer failed."""
    text = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {text}"[:160]


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} {platform.machine()} cores"


def commit() -> str:
    """The commit that is measured, followed by `+` if files have changed; empty outside git."""
    return git(Path(__file__).parent, "describe", "--always", "--dirty=+")


def conditions(device: str, commit: str) -> dict[str, str]:
    """Where, with what and when rows were measured: the columns that all ledgers share."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }


def append(ledger: Path, rows: Sequence[object], shared: dict[str, str]) -> None:
    """Add rows to a CSV file, which is created if it does not exist.

    A new file has a column for each field of a row and each shared value. An existing file keeps
    its columns, and may lack some of the shared ones.

    Args:
        ledger: the file.
        rows: dataclasses of one type.
        shared: the same values for every row, see `conditions`.

    Raises:
        ValueError: when the file lacks a row's field, or has a column that is neither.
    """
    lines = [asdict(row) | shared for row in rows]
    ledger.parent.mkdir(parents=True, exist_ok=True)
    names = list(lines[0])
    is_new = not ledger.exists()
    if not is_new:
        with ledger.open(newline="") as file:
            found = next(csv.reader(file), [])
        if set(names) - set(shared) - set(found) or set(found) - set(names):
            raise ValueError(f"{ledger} has the columns {found}, not {names}")
        names = found
    with ledger.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(names)
        for line in lines:
            values = [line[name] for name in names]
            writer.writerow([f"{v:.4g}" if isinstance(v, float) else v for v in values])
