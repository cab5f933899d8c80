"""Where the time of one update step goes: by phase, and by kernel on the device.

    python -m tercet.bench.profile_step                  # a small model on this machine
    python -m tercet.bench.profile_step --device cuda    # Qwen2.5-VL-3B's sizes in bf16

The step is the one of bench/step.py, computed by Tercet's own policy. It runs for warm-up, then
with marks between its phases (CUDA events on a GPU, which wait for nothing), then once under
torch.profiler, whose own cost makes that run slower. The report is text:

- phases: medians of the marked runs. The head's gradient is computed with the loss, so `backward`
  is that of body and vision tower; with checkpointing it holds their second forward pass.
- busy: share of the time from the first kernel's start to the last one's end in which the GPU
  works, and the gaps between its kernels.
- kernels: the largest by total time. On a CPU these are PyTorch's operators, by their own time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from tercet.bench import measure
from tercet.bench.step import MODELS, model_of
from tercet.bench.step_case import Workload, build_policy, make_micros
from tercet.core.types import MicroBatch, PolicyParts, to_device
from tercet.train.learner.policy import Policy

RESULTS = Path(__file__).parent / "results" / "profile_step.txt"
LARGEST = 25
"""Kernels in the table."""
GAP_US = 10
"""Gaps between kernels that are longer than this are counted."""
NAME = 90
"""Letters of a kernel's name that are shown."""
PHASES = ("vision", "body forward", "head and loss", "backward", "other")


class Marks:
    """Points in time, on the GPU where there is one, between which a phase runs."""

    def __init__(self, on_gpu: bool):
        self._on_gpu, self._points = on_gpu, []

    def start(self, phase: str) -> None:
        """The phase before ends here, and this one begins."""
        if self._on_gpu:
            point = torch.cuda.Event(enable_timing=True)
            point.record()
        else:
            point = time.perf_counter()
        self._points.append((phase, point))

    def take(self) -> dict[str, float]:
        """Milliseconds of each phase so far; forgets them."""
        if self._on_gpu:
            torch.cuda.synchronize()
        spent = defaultdict(float)
        for (phase, begin), (_, end) in zip(self._points[:-1], self._points[1:], strict=True):
            spent[phase] += begin.elapsed_time(end) if self._on_gpu else 1e3 * (end - begin)
        self._points = []
        return spent


class Marked(Policy):
    """The policy with marks where its phases begin."""

    def __init__(self, policy: Policy, marks: Marks):
        super().__init__(PolicyParts(policy.model, None, None), policy.loss)
        self.marks = marks
        parts = {"vision": self.model.model.visual, "body forward": self.model.model.language_model}
        for phase, part in parts.items():
            part.register_forward_pre_hook(lambda *_, phase=phase: marks.start(phase))
            part.register_forward_hook(lambda *_: marks.start("other"))

    def _tapo(self, *given, **options):
        self.marks.start("head and loss")
        found = super()._tapo(*given, **options)
        self.marks.start("backward")
        return found

    def step(self, batches: Iterable[MicroBatch]) -> None:
        """Forward and backward pass of a mini-batch."""
        self.zero_grad(set_to_none=True)
        for batch in batches:
            self.marks.start("other")
            self.accumulate(batch)
        self.marks.start("")


class Work(NamedTuple):
    """One kernel's run on the device, or one operator's on the CPU, in microseconds."""

    name: str
    start: float
    end: float
    own: float
    """On a CPU without the operators that it calls."""


def profiled(call: Callable[[], None], on_gpu: bool) -> list[Work]:
    """What runs on the device during a call, by torch.profiler."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    work = []
    for event in found.events():
        if event.device_type == wanted and not event.is_user_annotation:
            span = event.time_range
            own = span.end - span.start if on_gpu else event.self_cpu_time_total
            work.append(Work(event.name, span.start, span.end, own))
    return work


class Busy(NamedTuple):
    """How a stretch of time is filled with work, in milliseconds."""

    span: float
    busy: float
    gaps: list[float]
    """Gaps longer than GAP_US."""


def busy_time(work: Sequence[Work]) -> Busy:
    """The union of all work from the first start to the last end."""
    spans = sorted((one.start, one.end) for one in work)
    busy, gaps, reached = 0.0, [], spans[0][0]
    for start, end in spans:
        if start - reached > GAP_US:
            gaps.append((start - reached) / 1e3)
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return Busy((reached - spans[0][0]) / 1e3, busy / 1e3, gaps)


def phase_table(runs: Sequence[dict[str, float]]) -> list[str]:
    """Medians of each phase and of the whole, and shares of the whole."""
    medians = {phase: statistics.median(run.get(phase, 0.0) for run in runs) for phase in PHASES}
    whole = sum(medians.values())
    lines = [f"{'phase':16} {'ms':>10} {'share':>7}"]
    lines += [f"{phase:16} {ms:10.2f} {ms / whole:7.1%}" for phase, ms in medians.items()]
    return [*lines, f"{'whole':16} {whole:10.2f}"]


def kernel_table(work: Sequence[Work]) -> list[str]:
    """The largest by total time: milliseconds, share of all, calls, mean microseconds, name."""
    totals: dict[str, list[float]] = defaultdict(list)
    for one in work:
        totals[one.name].append(one.own)
    whole = sum(map(sum, totals.values()))
    lines = [f"{'ms':>10} {'share':>7} {'calls':>7} {'mean us':>9}  name"]
    for name, spent in sorted(totals.items(), key=lambda item: -sum(item[1]))[:LARGEST]:
        total, calls = sum(spent), len(spent)
        figures = f"{total / 1e3:10.2f} {total / whole:7.1%} {calls:7} {total / calls:9.1f}"
        lines.append(f"{figures}  {' '.join(name.split())[:NAME]}")
    return [*lines, f"{whole / 1e3:10.2f} {1:7.1%} {len(work):7}            all"]


def report(policy: Marked, batches: Sequence[MicroBatch], rounds: int) -> list[str]:
    """Run the step for warm-up, with marks, and under the profiler; returns the lines of text."""
    on_gpu = policy.device.type == "cuda"
    for _ in range(2):
        policy.step(batches)
        policy.marks.take()
    runs = []
    for _ in range(rounds):
        policy.step(batches)
        runs.append(policy.marks.take())
    lines = phase_table(runs)
    work = profiled(lambda: policy.step(batches), on_gpu)
    policy.marks.take()
    if not work:
        return [*lines, "", "the profiler saw no work on the device"]
    found = busy_time(work)
    what = "kernels and copies" if on_gpu else "operators"
    lines += ["", f"under the profiler: {found.span:.2f} ms, {len(work)} {what}"]
    if on_gpu:
        longest = ", ".join(f"{gap:.2f}" for gap in sorted(found.gaps)[-5:][::-1])
        lines += [
            f"GPU busy {found.busy:.2f} ms, {found.busy / found.span:.1%}",
            f"{len(found.gaps)} gaps over {GAP_US} us, together {sum(found.gaps):.2f} ms; "
            f"the longest, ms: {longest or 'none'}",
        ]
    return [*lines, "", *kernel_table(work)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=MODELS, default="qwen2_5_vl_3b")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a text file, written anew")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--groups", type=int, default=1, help="groups of one micro-batch")
    parser.add_argument("--checkpointing", type=int, choices=(0, 1), help="default: 1 on a GPU")
    parser.add_argument("--commit", default=measure.commit())
    options = parser.parse_args(argv)
    device, on_gpu = options.device, options.device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    name, config = model_of(options.model, on_gpu)
    checkpointing = on_gpu if options.checkpointing is None else bool(options.checkpointing)
    policy = build_policy(config, dtype, device, checkpointing)
    workload = Workload(groups=options.groups, in_flight=options.groups)
    batches = [to_device(micro.batch, policy.device) for micro in make_micros(workload, policy)]
    packs = [pack for batch in batches for pack in (batch.update, batch.negative)]
    tokens, rows = sum(pack.num_tokens for pack in packs), sum(len(b.labels) for b in batches)
    work = f"{tokens} packed tokens, {rows} response tokens"
    lines = [
        f"one update step, groups: {workload.groups}, {work}",
        f"{name}, {str(dtype).removeprefix('torch.')}, checkpointing {checkpointing}",
        ", ".join(f"{k} {v}" for k, v in measure.conditions(device, options.commit).items() if v),
        "",
        *report(Marked(policy, Marks(on_gpu)), batches, options.rounds),
    ]
    print(*lines, sep="\n", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
