"""Everything that needs a GPU, in one command of a few minutes: parts that do not stop one another.

    make gpu OUT=folder                        # all parts, on a GPU machine's own python3
    make gpu OUT=folder PARTS="tests kernels"
    make gpu-rehearsal                         # the same on a CPU with small shapes

Every part is a process with a time limit of its own and appends what it measures to its own files
in OUT, so that what is there when one fails or is stopped stays. What all parts print goes into
OUT/gpu.log. The last lines say how each part ended.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tercet.bench.measure import (
    append,
    conditions,
    copy_bandwidth,
    device_name,
    product_flops,
)

ROOT = Path(__file__).resolve().parents[1]
TAIL = 4000  # characters of a failed part's output that are repeated at the end


@dataclass(frozen=True)
class Part:
    """One process of the whole."""

    arguments: tuple[str, ...]
    """Of python3; `{out}` is the folder, `{device}` cuda or cpu."""
    limit_s: float
    rehearsal: tuple[str, ...] = ()
    """Arguments added on a CPU."""


def _bench(module: str, ledger: str, *more: str) -> tuple[str, ...]:
    return (
        *("-m", f"tercet.bench.{module}", "--device", "{device}", "--out", f"{{out}}/{ledger}"),
        *more,
    )


PARTS = {
    "card": Part(("-m", "tercet.bench.gpu", "--card", "{device}", "--out", "{out}"), 60),
    "tests": Part(
        ("-m", "pytest", "-m", "gpu", "-q", "-n", "8", "-p", "no:cacheprovider", "--durations=5"),
        120,
        ("tests/test_rows.py",),
    ),
    "kernels": Part(
        _bench("kernels", "kernels.csv"), 150, ("--rounds", "1", "--shapes", "64,64,4096")
    ),
    "attention": Part(_bench("attention", "attention.csv"), 70, ("--rounds", "1")),
    "profile": Part(_bench("profile_step", "profile.txt", "--groups", "4"), 40, ("--rounds", "1")),
    "step": Part(
        _bench("step", "step.csv", "--parts", "anchor", "four", "groups"),
        150,
        ("--rounds", "1", "--parts", "anchor"),
    ),
    "step_7b": Part(
        _bench("step", "step.csv", "--model", "qwen2_5_vl_7b", "--parts", "anchor"),
        70,
        ("--rounds", "1", "--model", "qwen3_vl_4b"),
    ),
    "sampling": Part(_bench("sampling", "sampling.csv"), 60, ("--rounds", "1")),
}


@dataclass(frozen=True)
class Card:
    """A device's measured ceilings."""

    copy_gb_per_s: float
    """Bytes read and written."""
    matrix_tflops: float
    """bfloat16, or float32 on a CPU; random numbers."""
    memory_gib: float | None


def measure_card(device: str) -> Card:
    """Copy bandwidth and the rate of a large product."""
    on_gpu = device == "cuda"
    product = product_flops(device, torch.bfloat16 if on_gpu else torch.float32)
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if on_gpu else None
    return Card(copy_bandwidth(device) / 1e9, product / 1e12, memory)


def run_part(part: Part, out: Path, device: str, limit_s: float) -> tuple[str, float, str]:
    """Run one part to its end or limit.

    Returns:
        How it ended ("ok", "failed: exit code 1", "stopped after 150 s"), its seconds, its output.
    """
    words = [*part.arguments, *(part.rehearsal if device == "cpu" else ())]
    words = [word.replace("{out}", str(out)).replace("{device}", device) for word in words]
    start, log = time.monotonic(), out / "gpu.log"
    with log.open("ab") as file:
        begin = file.tell()
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,  # of this session, so that it ends with what runs all of this
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        try:
            code = process.wait(limit_s)
            ended = "ok" if code == 0 else f"failed: exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            ended = f"stopped after {limit_s:.0f} s"
    with log.open("rb") as file:
        file.seek(begin)
        said = file.read().decode(errors="replace")
    return ended, time.monotonic() - start, said


def run_parts(
    parts: dict[str, Part], out: Path, device: str, minutes: float
) -> dict[str, tuple[str, float]]:
    """Run parts one after another within a time limit for the whole; says how each ended."""
    out.mkdir(parents=True, exist_ok=True)
    until, ends = time.monotonic() + 60 * minutes, {}
    for name, part in parts.items():
        left = until - time.monotonic()
        if left < 5:
            ends[name] = ("no time left", 0.0)
            continue
        print(f"== {name}", flush=True)
        ended, took, said = run_part(part, out, device, min(part.limit_s, left))
        print(said[-TAIL:], flush=True)
        ends[name] = (ended, took)
    return ends


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=9.0, help="limit of the whole")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--card", choices=("cpu", "cuda"), help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.card:
        card = measure_card(options.card)
        append(options.out / "card.csv", [card], conditions(options.card, ""))
        print(device_name(options.card), card)
        return 0
    chosen = {name: PARTS[name] for name in options.parts}
    ends = run_parts(chosen, options.out.resolve(), options.device, options.minutes)
    for name, (ended, took) in ends.items():
        print(f"{name:12} {took:6.1f} s  {ended}")
    return int(any(ended != "ok" for ended, _ in ends.values()))


if __name__ == "__main__":
    sys.exit(main())
