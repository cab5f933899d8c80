"""One update step beside other ways to compute it: gradients first, then time and memory.

    make bench-step        # a small model on this machine, into bench/results/step.csv
    make gpu PARTS=step    # Qwen2.5-VL-3B's shape on a GPU, random weights; --model: others
    make bench             # a tiny one, by pytest-benchmark

A step is a mini-batch of groups (5 + 5 responses of about 350 tokens on prompts of 316 tokens, 256
of them a photo) with one group per micro-batch: forward and backward pass of update and negative
branch with the TAPO loss, without the optimiser. Methods (step_peers.py) get the same tokens, the
same responses per micro-batch and the same loss. Their gradients are compared with those of plain
transformers in float32, one response at a time; a method whose error is over the gate gets a row
without times. (In 16 bits the gradient is compared as a whole, on a model of the same widths with
two layers: with 16 layers of random weights rounding changes gradients by a quarter in every
method, and passing would mean nothing. The gate is then at least twice the error of `one_by_one`.)
Then come rounds in which each method runs once.

- extra_mib: peak memory above parameters and gradients.
- tflop: operations that the method executes, by core/costs.py: 3 forward passes (with checkpointing
  one more of body and vision tower), including its padding, repeated prompts and unused logits.
- predicted_ratio: tflop of `one_by_one` over that of this method; measured_ratio: likewise ms_50.
- mfu: 3 forward passes of *ours*, the least that the step needs, over ms_50 and the device's peak
  (a GPU's dense bf16 datasheet figure, else a large product timed in the same run). Operations that
  a method wastes or computes twice do not raise it.
- clock: `wall`, or for one thread on a shared machine `cpu`, the thread's CPU time.
- tokens_per_s: response tokens, each counted once though both branches compute it.

The rows with a `sweep` are ours only, all groups in one micro-batch: groups, responses and response
length grow one at a time.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PretrainedConfig

from tercet.bench import measure
from tercet.bench.step_case import (
    CPU_MODEL,
    QWEN3_CPU_MODEL,
    Micro,
    Workload,
    build_policy,
    make_micros,
    qwen3_4b,
    qwen_3b,
    qwen_7b,
)
from tercet.bench.step_peers import GPU_METHODS, METHODS, Method, RunStep, accumulate, flat, padded
from tercet.core.costs import Shape, forward_flops
from tercet.train.learner.policy import Policy

ALL = METHODS | GPU_METHODS
RESULTS = Path(__file__).parent / "results" / "step.csv"
MODELS = {
    "qwen2_5_vl_3b": ("qwen2.5-vl-3b", qwen_3b, CPU_MODEL),
    "qwen2_5_vl_7b": ("qwen2.5-vl-7b", qwen_7b, None),
    "qwen3_vl_4b": ("qwen3-vl-4b", qwen3_4b, QWEN3_CPU_MODEL),
}
"""Name in the ledger, configuration, and sizes of the small model that a CPU measures, if any."""


def model_of(model: str, on_gpu: bool) -> tuple[str, PretrainedConfig]:
    """Name in the ledger and configuration of what a device measures.

    Raises:
        ValueError: a CPU has no small form of it.
    """
    published, make_config, small = MODELS[model]
    if on_gpu:
        return published, make_config()
    if not small:
        raise ValueError(f"--model {model} needs --device cuda")
    return f"2 layers of {small['hidden']} as in {published}", make_config(**small)


SWEEPS = {
    "groups": [Workload(groups=n, in_flight=n) for n in (1, 2, 3, 4)],
    "responses": [Workload(n_anchor=n, n_positive=n) for n in (1, 2, 5, 8)],
    "length": [Workload(length=n) for n in (88, 175, 350, 700)],
}


@dataclass
class Row:
    """A row of the ledger."""

    method: str
    sweep: str
    update_on: str
    groups: int
    in_flight: int
    n_anchor: int
    n_positive: int
    prompt: int
    length: int
    model: str
    dtype: str
    checkpointing: bool
    packed_tokens: int
    """Of our packing, both branches."""
    response_tokens: int
    ms_20: float | None = None
    ms_50: float | None = None
    ms_80: float | None = None
    tokens_per_s: float | None = None
    extra_mib: float | None = None
    mfu: float | None = None
    tflop: float | None = None
    predicted_ratio: float | None = None
    measured_ratio: float | None = None
    grad_error: float | None = None
    note: str = ""
    clock: str = "wall"
    peak_tflops: float | None = None


def step_flops(
    method: Method, micros: Sequence[Micro], shape: Shape, checkpointing: bool = False
) -> float:
    """Operations that a method executes in a step: see the top of this file."""
    total = 0.0
    for prompts in (branch for m in micros for branch in (m.update, m.negative)):
        loads = method.loads(prompts)
        forward = forward_flops(shape, loads)
        unused = sum(load.prompt_tokens - 1 for load in loads) if method.prompt_logits else 0
        total += 3 * (forward.total + 2 * unused * shape.hidden * shape.vocabulary)
        total += checkpointing * (forward.vision + forward.body)
    return total


def gradients(policy: Policy, run: RunStep) -> list[Tensor]:
    """The parameters' gradients after one step."""
    policy.zero_grad(set_to_none=True)
    run()
    return [parameter.grad for parameter in policy.parameters()]


def exact_gradients(policy: Policy, micros: Sequence[Micro]) -> list[Tensor]:
    """Gradients of plain transformers in at least float32, one response at a time; on the CPU."""
    wide = copy.deepcopy(policy.model).to(torch.promote_types(policy.model.dtype, torch.float32))
    wide.set_attn_implementation("sdpa")
    wide.zero_grad(set_to_none=True)
    for micro in micros:
        start = 0
        for one, other in zip(flat(micro.update), flat(micro.negative), strict=True):
            rows = slice(start, start + len(one[1]))
            start = rows.stop
            batch = replace(
                micro.batch,
                update=None,
                negative=None,
                **{
                    name: getattr(micro.batch, name)[rows].to(wide.device)
                    for name in ("advantages", "loss_mask", "old_logprobs")
                },
            )
            branches = [[(prompt, [tokens])] for prompt, tokens in (one, other)]
            accumulate(wide, batch, [padded(branch, wide.device) for branch in branches])
    return [parameter.grad.cpu() for parameter in wide.parameters()]


def distance(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Relative error (Frobenius norm): the largest of a parameter's gradient; in 16 bits of all.

    A parameter's error is divided by its norm, or by a thousandth of the whole gradient's norm
    where that is larger. In 16 bits some parameters hold nothing but rounding: a key's bias moves
    all keys alike, which attention hardly sees, so its gradient is the rest of a cancellation.
    """
    errors = torch.stack(
        [(a.to(b.dtype) - b.to(a.device)).norm().cpu() for a, b in zip(found, exact, strict=True)]
    )
    norms = torch.stack([b.norm().cpu() for b in exact])
    if found[0].dtype.itemsize == 2:
        return (errors.norm() / norms.norm()).item()
    return (errors / norms.clamp_min(1e-3 * norms.norm())).max().item()


class Bench:
    """Measures methods on one policy.

    Args:
        policy: the one that is timed.
        rounds: timed rounds.
        peak: FLOP/s of its device.
        gate: the policy on which gradients are compared; None: the same.
        clock: a clock of measure.CLOCKS.
        model: its name in the rows.
    """

    def __init__(
        self,
        policy: Policy,
        rounds: int,
        peak: float,
        gate: Policy | None = None,
        clock: str = "wall",
        model: str = "",
    ):
        self.policy, self.gate, self.rounds, self.peak = policy, gate or policy, rounds, peak
        self.clock = clock
        self.shape = policy.family.shape(policy.model.config)
        self.checkpointing = policy.model.model.language_model.gradient_checkpointing
        self.on_gpu = policy.device.type == "cuda"
        self.dtype = policy.model.dtype
        self.common = dict(
            model=model,
            dtype=str(self.dtype).removeprefix("torch."),
            checkpointing=self.checkpointing,
            clock=clock,
            peak_tflops=peak / 1e12,
        )

    def row(self, name: str, workload: Workload, micros: Sequence[Micro], sweep: str = "") -> Row:
        """A row with everything but what is measured."""
        sizes = {k: v for k, v in vars(workload).items() if k != "grid"}
        packs = [pack for m in micros for pack in (m.batch.update, m.batch.negative)]
        return Row(
            name,
            sweep,
            **sizes,
            **self.common,
            packed_tokens=sum(pack.num_tokens for pack in packs),
            response_tokens=sum(len(m.batch.labels) for m in micros),
            tflop=step_flops(ALL[name], micros, self.shape, self.checkpointing) / 1e12,
        )

    def times(self, calls: dict) -> dict:
        """Percentiles of each; measuring memory was the warm-up."""
        return measure.interleaved(calls, self.rounds, 0, self.on_gpu, self.clock)

    def fill_times(self, row: Row, times: tuple[float, ...], micros: Sequence[Micro]) -> None:
        """Fill in times and what follows from them."""
        row.ms_20, row.ms_50, row.ms_80 = times
        row.tokens_per_s = 1e3 * row.response_tokens / row.ms_50
        least = step_flops(METHODS["ours"], micros, self.shape)
        row.mfu = 1e3 * least / row.ms_50 / self.peak

    def check(
        self, row: Row, method: Method, micros: Sequence[Micro], exact: Sequence[Tensor]
    ) -> RunStep | None:
        """Fill in memory and gradient error, or a note on why there are none; returns the step."""
        self.policy.zero_grad(set_to_none=True)
        try:
            run = method.make(self.policy, micros)
            found, row.extra_mib = measure.extra_mib(
                lambda: gradients(self.policy, run), self.on_gpu
            )
            if self.gate is not self.policy:
                found = gradients(self.gate, method.make(self.gate, micros))
            row.grad_error = distance(found, exact)
            return run
        except Exception as error:  # a peer's own failure is a result
            row.note = measure.failure(error)
            torch.cuda.empty_cache()
            return None
        finally:
            self.policy.zero_grad(set_to_none=True)
            self.gate.zero_grad(set_to_none=True)

    def methods(self, workload: Workload, methods: Sequence[str] = ()) -> list[Row]:
        """Compare every method's gradients on one step, then time them in common rounds."""
        methods = methods or (ALL if self.on_gpu else METHODS)
        micros = make_micros(workload, self.policy)
        exact = exact_gradients(self.gate, micros)
        rows, calls = {name: self.row(name, workload, micros) for name in methods}, {}
        for name, row in rows.items():
            run = self.check(row, ALL[name], micros, exact)
            calls[name] = lambda run=run: gradients(self.policy, run)
        del exact
        gate, base = measure.GATE[self.dtype], rows.get("one_by_one")
        if self.dtype.itemsize == 2 and base and base.grad_error is not None:
            gate = max(gate, 2 * base.grad_error)
        for row in rows.values():
            if row.grad_error is not None and not row.grad_error <= gate:
                row.note = f"over the gate of {gate:.1g}: gradients are not exact"
        timed = {name: call for name, call in calls.items() if not rows[name].note}
        for name, times in self.times(timed).items():
            self.fill_times(rows[name], times, micros)
        for row in rows.values() if base else ():
            row.predicted_ratio = base.tflop / row.tflop
            if base.ms_50 and row.ms_50:
                row.measured_ratio = base.ms_50 / row.ms_50
        return list(rows.values())

    def grow(self, sweep: str, workloads: Sequence[Workload]) -> list[Row]:
        """Time ours on steps of growing size, in common rounds."""
        steps = [make_micros(workload, self.policy) for workload in workloads]
        rows, calls = [], {}
        for index, (workload, micros) in enumerate(zip(workloads, steps, strict=True)):
            run = METHODS["ours"].make(self.policy, micros)
            calls[index] = lambda run=run: gradients(self.policy, run)
            rows.append(self.row("ours", workload, micros, sweep))
            self.policy.zero_grad(set_to_none=True)
            rows[-1].extra_mib = measure.extra_mib(calls[index], self.on_gpu)[1]
        for index, times in self.times(calls).items():
            self.fill_times(rows[index], times, steps[index])
        return rows


def show(row: Row) -> str:
    """A row as a line of text."""
    what = f"{row.method:15} {row.sweep:10} {row.update_on:7} {row.packed_tokens:6} tokens"
    if row.ms_50 is None:
        return f"{what} {row.note}"
    ratios = "" if row.measured_ratio is None else f"{row.measured_ratio:.2f}x of one_by_one"
    if ratios:
        ratios += f" (predicted {row.predicted_ratio:.2f})"
    figures = f"{row.ms_50:9.1f} ms {row.tokens_per_s:8.0f} tokens/s {row.extra_mib:8.0f} MiB"
    return f"{what} {figures} mfu {row.mfu:.2f} {ratios}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=MODELS, default="qwen2_5_vl_3b")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=3)
    parts = ("anchor", "own", "four", *SWEEPS)
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--checkpointing", type=int, choices=(0, 1), help="default: 1 on a GPU")
    parser.add_argument("--clock", choices=measure.CLOCKS, default="wall")
    parser.add_argument("--commit", default=measure.commit())
    options = parser.parse_args()
    on_gpu, device = options.device == "cuda", options.device
    dtype, gate = (torch.bfloat16 if on_gpu else torch.float32), None
    name, config = model_of(options.model, on_gpu)
    checkpointing = on_gpu if options.checkpointing is None else bool(options.checkpointing)
    measure.keep_memory()
    if on_gpu:
        shallow = MODELS[options.model][1](layers=2, vision_layers=2)
        gate = build_policy(shallow, dtype, device, checkpointing)
    policy = build_policy(config, dtype, device, checkpointing)
    peak = measure.peak_flops(device, dtype, options.clock)
    bench = Bench(policy, options.rounds, peak, gate, options.clock, name)
    shared = measure.conditions(device, options.commit)
    steps = {on: Workload(update_on=on) for on in ("anchor", "own")}
    steps["four"] = Workload(groups=4, in_flight=4)
    parts = {name: lambda step=step: bench.methods(step) for name, step in steps.items()}
    parts |= {item[0]: lambda item=item: bench.grow(*item) for item in SWEEPS.items()}
    for part in options.parts:
        rows = parts[part]()
        print(*map(show, rows), sep="\n", flush=True)
        measure.append(options.out, rows, shared)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.benchmark(group="update step, 3 + 3 responses of 64 tokens, prompt of 96")
def test_step(benchmark, method):
    config = qwen_3b(**CPU_MODEL)
    policy = build_policy(config, torch.float32, "cpu")
    workload = Workload(n_anchor=3, n_positive=3, prompt=96, grid=(1, 16, 16), length=64)
    micros = make_micros(workload, policy)
    if method == "prefix_grouper":
        pytest.importorskip("prefix_grouper")
    run = METHODS[method].make(policy, micros)
    exact = exact_gradients(policy, micros)
    assert distance(gradients(policy, run), exact) <= measure.GATE[torch.float32]
    benchmark.pedantic(lambda: gradients(policy, run), rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    main()
