"""One update step of each objective beside TAPO's: gradients first, then time and memory.

    make bench-objectives    # a small model on this machine, into bench/results/objectives.csv

The step is that of bench/step.py: groups of 5 + 5 responses (10 + 0 without positive photos) of
about 350 tokens on prompts of 316, forward and backward pass of every branch that the objective
has, without the optimiser. Gradients are compared with those of plain PyTorch's head and loss
(`plain_head`); an objective that is over the gate gets a row without times. What a step computes
before its updates is not in it: the row `scoring` is a forward pass without gradient, which old
log-probs take from the second mini-batch on, and a reference policy's once a step.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from tercet.bench import measure
from tercet.bench.step import distance, gradients
from tercet.bench.step_case import CPU_MODEL, Micro, Workload, build_policy, make_micros, qwen_3b
from tercet.bench.step_peers import METHODS
from tercet.core.config import LossConfig
from tercet.core.types import PolicyParts
from tercet.train.learner.policy import Policy

RESULTS = Path(__file__).parent / "results" / "objectives.csv"
PLAIN = {"kl_coef": 0.0, "entropy_coef": 0.0, "neg_entropy_coef": 0.0}
GRPO = PLAIN | {"clip_high": 0.2, "clip_dual": None, "mean_over": "response"}
OBJECTIVES = {
    "tapo": LossConfig(),
    "tapo, neg_grad detach": LossConfig(neg_grad="detach"),
    "tapo, positive alone": LossConfig(kl_coef=0.0, neg_entropy_coef=0.0),
    "dapo": LossConfig(**PLAIN),
    "grpo": LossConfig(**GRPO),
    "grpo, beta 0.04": LossConfig(**GRPO, ref_kl_coef=0.04),
    "dr_grpo": LossConfig(**GRPO | {"mean_over": "constant", "advantage_std": False}),
    "gspo": LossConfig(**GRPO | {"clip_low": 3e-4, "clip_high": 4e-4}, ratio_of="sequence"),
    "cispo": LossConfig(**PLAIN, policy_term="cispo"),
}
"""docs/algorithm.md has their equations."""
SCORING = "scoring"


@dataclass
class Row:
    """A row of the ledger."""

    objective: str
    groups: int
    n_anchor: int
    n_positive: int
    prompt: int
    length: int
    model: str
    dtype: str
    clock: str
    ms_20: float | None = None
    ms_50: float | None = None
    ms_80: float | None = None
    of_tapo: float | None = None
    """ms_50 over that of `tapo`."""
    extra_mib: float | None = None
    """Peak memory above parameters and gradients."""
    grad_error: float | None = None
    note: str = ""


def workload_of(name: str, sizes: Workload) -> Workload:
    """The step of an objective; those without positive photos have as many responses."""
    if name.startswith("tapo"):
        return sizes
    return replace(sizes, n_anchor=sizes.n_anchor + sizes.n_positive, n_positive=0)


def micros_of(policy: Policy, workload: Workload) -> list[Micro]:
    """Micro-batches of an objective, with log-probs of a reference policy where it has one."""
    micros = make_micros(workload, policy)
    if not policy.loss.needs_reference:
        return micros
    return [
        replace(micro, batch=replace(micro.batch, ref_logprobs=micro.batch.old_logprobs.flip(0)))
        for micro in micros
    ]


def scored(policy: Policy, micros: Sequence[Micro]) -> list[torch.Tensor]:
    """Log-probs of all responses, without gradient."""
    with torch.no_grad():
        return [policy(m.batch.update, "logprobs", labels=m.batch.labels) for m in micros]


def measured(policy: Policy, sizes: Workload, rounds: int, clock: str, model: str) -> list[Row]:
    """A row of each objective; all are timed in common rounds."""
    on_gpu, rows, calls = policy.device.type == "cuda", {}, {}
    dtype = policy.model.dtype
    for name, loss in {**OBJECTIVES, SCORING: OBJECTIVES["dapo"]}.items():
        workload = workload_of(name, sizes)
        own = Policy(PolicyParts(policy.model, None, None), loss)
        micros = micros_of(own, workload)
        counts = (workload.groups, workload.n_anchor, workload.n_positive)
        about = (workload.prompt, workload.length, model, str(dtype).removeprefix("torch."), clock)
        row = rows[name] = Row(name, *counts, *about)
        if name == SCORING:
            call = partial(scored, own, micros)
        else:
            run = METHODS["ours"].make(own, micros)
            exact = gradients(own, METHODS["plain_head"].make(own, micros))
            row.grad_error = distance(gradients(own, run), exact)
            if not row.grad_error <= measure.GATE[dtype]:
                row.note = f"over the gate of {measure.GATE[dtype]:.1g}: gradients are not exact"
            call = partial(gradients, own, run)
        own.zero_grad(set_to_none=True)
        row.extra_mib = measure.extra_mib(call, on_gpu)[1]
        if not row.note:
            calls[name] = call
    for name, times in measure.interleaved(calls, rounds, 1, on_gpu, clock).items():
        rows[name].ms_20, rows[name].ms_50, rows[name].ms_80 = times
    for row in rows.values():
        if row.ms_50 and rows["tapo"].ms_50:
            row.of_tapo = row.ms_50 / rows["tapo"].ms_50
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=measure.CLOCKS, default="wall")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    sizes, dtype = (CPU_MODEL, torch.float32) if not on_gpu else ({}, torch.bfloat16)
    name = "qwen2.5-vl-3b" if on_gpu else f"2 layers of {CPU_MODEL['hidden']} as in qwen2.5-vl-3b"
    measure.keep_memory()
    policy = build_policy(qwen_3b(**sizes), dtype, options.device, on_gpu)
    rows = measured(policy, Workload(), options.rounds, options.clock, name)
    for row in rows:
        times = row.note or f"{row.ms_50:9.1f} ms {row.of_tapo:5.2f} of TAPO's"
        print(f"{row.objective:24} {times} {row.extra_mib:8.0f} MiB")
    measure.append(options.out, rows, measure.conditions(options.device, measure.commit()))


if __name__ == "__main__":
    main()
