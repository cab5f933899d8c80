"""Whole training steps beside TRL's GRPOTrainer: one gradient first, then time, memory and reward.

    python -m tercet.bench.whole_step                      # the demo's policy after stage 1
    python -m tercet.bench.whole_step --policy smollm2     # SmolLM2-135M's body
    python -m tercet.bench.whole_step --parts learn        # rewards over 40 steps, nine seeds

A step samples responses, rewards them and takes one optimiser step. Policy, photos, prompts, limit
of a response, sampling, loss (DAPO, no KL), optimiser and dtype are the same (whole_step_case.py).
Responses of fixed texts give the same prompt ids, pixels and gradient in both first, and after
three optimiser steps the same weights. Then every method runs in a process of its own, in turns
with the others; the first step is its warm-up.

- micro_batch: sequences of one forward pass of TRL's, packed tokens of one of ours.
- s_per_step, sampling_s, reward_s, update_s: medians over all timed steps; update_s is forward and
  backward passes and the optimiser; other_s the rest (TRL prepares prompts and photos there).
- cpu_s_per_step: CPU seconds of the training process, which a machine that others use too changes
  less than the time by the clock; without those of a server.
- tokens_per_s: response tokens of all timed steps over their time; tokens_per_cpu_s likewise.
- peak_mib: most resident memory of the training process above what was resident before step 1.
- ratio: tokens_per_s over those of TRL's fastest micro-batch, cpu_ratio likewise; memory_ratio:
  peak_mib over that of TRL's leanest one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from tercet.bench import measure
from tercet.bench.rollout import CPU_FLAGS
from tercet.bench.step import distance
from tercet.bench.whole_step_case import WORKS, Fixed, Taken, Work, fixed_ours, prepare, train_ours

RESULTS = Path(__file__).parent / "results" / "whole_step.csv"
REWARDS = RESULTS.with_name("whole_step_reward.csv")
GATES = {"grad_error": ("gradients", 1e-4), "update_error": ("updates", 1e-3)}
"""What may differ, and by how much: TRL decays weights of norms, so updates differ by more."""
LEARN_STEPS, LEARN_SEEDS = 40, tuple(range(9))
TEN = (slice(10), slice(-10, None))
LIMIT_S = 3600
"""Longest that one process may take."""


@dataclass
class Row:
    """A row of the ledger."""

    method: str
    policy: str
    micro_batch: int
    groups: int
    responses: int
    """Of each group."""
    max_tokens: int
    steps: int
    """Timed, over all rounds."""
    s_per_step: float | None = None
    cpu_s_per_step: float | None = None
    sampling_s: float | None = None
    reward_s: float | None = None
    update_s: float | None = None
    other_s: float | None = None
    step_tokens: float | None = None
    tokens_per_s: float | None = None
    tokens_per_cpu_s: float | None = None
    ratio: float | None = None
    cpu_ratio: float | None = None
    start_mib: float | None = None
    peak_mib: float | None = None
    memory_ratio: float | None = None
    grad_error: float | None = None
    note: str = ""


@dataclass
class RewardRow:
    """Mean rewards of one run."""

    method: str
    policy: str
    seed: int
    steps: int
    first_ten: float
    last_ten: float


def child(options: argparse.Namespace) -> None:
    """Run one method in this process and write what it took."""
    work, folder = WORKS[options.policy], options.folder / options.policy
    out, micro_batch = options.result.with_suffix(".run"), options.micro_batches[0]
    given = (work, folder, out, options.steps, options.seed)
    if options.child == "ours":
        found = asdict(train_ours(*given))
    elif options.child == "sglang":
        server = {"engine": "sglang", "sglang_python": options.python, "sglang_args": CPU_FLAGS}
        found = asdict(train_ours(*given, [f"--rollout.{k}={v}" for k, v in server.items()]))
    else:
        from tercet.bench import whole_step_trl  # ours is measured without what TRL imports

        if options.child == "trl":
            found = asdict(whole_step_trl.train_trl(*given, micro_batch))
        else:
            theirs = whole_step_trl.fixed_trl(work, folder, out, micro_batch)
            found = compare(fixed_ours(work, folder, out.with_suffix(".ours")), theirs)
    options.result.write_text(json.dumps(found), encoding="utf-8")


def compare(ours: Fixed, theirs: Fixed) -> dict:
    """How far the two trainers are apart on the same responses."""
    names = sorted(ours.gradients.keys() | theirs.gradients.keys())
    missing = [n for n in names if n not in ours.gradients or n not in theirs.gradients]
    found, exact = ([one.gradients[n] for n in names if n not in missing] for one in (ours, theirs))
    pairs = list(zip(ours.pixels, theirs.pixels, strict=True))
    return {
        "prompt_ids": ours.prompt_ids == theirs.prompt_ids,
        "pixels": all(torch.equal(a, b.to(a.dtype)) for a, b in pairs),
        "without_gradient": missing,
        "grad_error": distance(found, exact),
        "update_error": whole_distance(ours.updates, theirs.updates),
    }


def whole_distance(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Relative error (Frobenius norm) of all parameters together."""
    one, other = (torch.cat([x[name].flatten() for name in exact]) for x in (found, exact))
    return ((one - other).norm() / other.norm()).item()


def run_child(options: argparse.Namespace, method: str, micro_batch: int, **more: int) -> dict:
    """What a child process wrote.

    Raises:
        RuntimeError: it failed, with the end of what it printed.
        subprocess.TimeoutExpired: it took longer than LIMIT_S.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "tercet.bench.whole_step", f"--child={method}"]
        command += [f"--policy={options.policy}", f"--folder={options.folder}"]
        command += [f"--micro-batches={micro_batch}", f"--result={result}"]
        command += [f"--threads={options.threads}", f"--python={options.python}"]
        command += [f"--{name}={value}" for name, value in more.items()]
        environment = os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
        environment["HF_DATASETS_CACHE"] = f"{folder}/datasets"
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT_S, env=environment
        )
        if done.returncode or not result.exists():
            raise RuntimeError(f"{method} failed: {(done.stderr or done.stdout)[-3000:]}")
        return json.loads(result.read_text(encoding="utf-8"))


def check(found: dict) -> str:
    """What stands against timing both; empty where they compute one gradient."""
    if not found["prompt_ids"]:
        return "prompt ids differ"
    if not found["pixels"]:
        return "pixels differ"
    if found["without_gradient"]:
        return f"only one gives a gradient to {found['without_gradient'][0]}"
    for name, (what, gate) in GATES.items():
        if not found[name] <= gate:
            return f"over the gate of {gate:.1g}: {what} differ by {found[name]:.1g}"
    return ""


def row_of(method: str, work: Work, micro_batch: int, rounds: Sequence[Taken]) -> Row:
    """The row of one method's runs; the first step of each is its warm-up."""

    def steps(name: str) -> list[float]:
        return [value for taken in rounds for value in getattr(taken, name)[1:]]

    seconds, phases = steps("seconds"), [steps(name) for name in ("sampling", "reward", "update")]
    other = [s - sum(parts) for s, *parts in zip(seconds, *phases, strict=True)]
    row = Row(method, work.policy, micro_batch, work.groups, work.responses, work.tokens, 0)
    row.steps, row.s_per_step = len(seconds), statistics.median(seconds)
    row.sampling_s, row.reward_s, row.update_s, row.other_s = map(
        statistics.median, (*phases, other)
    )
    row.step_tokens = statistics.mean(steps("tokens"))
    row.tokens_per_s = sum(steps("tokens")) / sum(seconds)
    if method != "sglang":  # the server is a process of its own
        row.cpu_s_per_step = statistics.median(steps("cpu"))
        row.tokens_per_cpu_s = sum(steps("tokens")) / sum(steps("cpu"))
    row.start_mib = max(taken.start_mib for taken in rounds)
    row.peak_mib = max(taken.peak_mib for taken in rounds)
    return row


def methods_of(options: argparse.Namespace, work: Work) -> list[tuple[str, int]]:
    """Methods with their micro-batches."""
    found = [("ours", work.micro_batch_tokens)]
    if options.python:
        found.append(("sglang", work.micro_batch_tokens))
    return found + [("trl", size) for size in options.micro_batches]


def time_all(options: argparse.Namespace, work: Work, error: float) -> list[Row]:
    """Run every method in turns; a method that fails gets a row with a note."""
    methods = methods_of(options, work)
    taken: dict[tuple[str, int], list[Taken]] = {key: [] for key in methods}
    notes: dict[tuple[str, int], str] = {}
    for turn in range(options.rounds):
        for key in [key for key in methods if key not in notes]:
            try:
                found = run_child(options, *key, steps=options.steps + 1, seed=turn)
                taken[key].append(Taken(**found))
            except Exception as failed:  # a peer's own failure is a result
                notes[key] = measure.failure(failed)
    rows = []
    for (method, size), rounds in taken.items():
        empty = Row(method, work.policy, size, work.groups, work.responses, work.tokens, 0)
        rows.append(row_of(method, work, size, rounds) if rounds else empty)
        rows[-1].grad_error, rows[-1].note = error, notes.get((method, size), "")
    peers = [row for row in rows if row.method == "trl" and row.tokens_per_s]
    for row in rows:
        if peers and row.tokens_per_s:
            row.ratio = row.tokens_per_s / max(peer.tokens_per_s for peer in peers)
            if row.tokens_per_cpu_s:
                fastest = max(peer.tokens_per_cpu_s for peer in peers)
                row.cpu_ratio = row.tokens_per_cpu_s / fastest
            row.memory_ratio = row.peak_mib / min(peer.peak_mib for peer in peers)
    return rows


def learn(options: argparse.Namespace, work: Work) -> Iterator[RewardRow]:
    """Rewards of ours and of TRL's last micro-batch, over the same steps and seeds."""
    for seed in LEARN_SEEDS:
        for method in ("ours", "trl"):
            size = options.micro_batches[-1]
            found = run_child(options, method, size, steps=LEARN_STEPS, seed=seed)
            first, last = (statistics.mean(found["rewards"][part]) for part in TEN)
            yield RewardRow(method, work.policy, seed, LEARN_STEPS, first, last)


def standard_errors(rows: Sequence[RewardRow]) -> float:
    """The difference of the two methods' last rewards, in standard errors over the seeds."""
    ours, theirs = ([r.last_ten for r in rows if r.method == name] for name in ("ours", "trl"))
    error = sum(statistics.variance(one) / len(one) for one in (ours, theirs)) ** 0.5
    return (statistics.mean(ours) - statistics.mean(theirs)) / error


def show(row: Row) -> str:
    """A row as a line of text."""
    what = f"{row.method:7} {row.micro_batch:5}"
    if row.tokens_per_s is None:
        return f"{what} {row.note}"
    parts = f"sampling {row.sampling_s:.2f}, update {row.update_s:.2f}, other {row.other_s:.2f}"
    memory = f"{row.peak_mib:.0f} MiB above {row.start_mib:.0f}"
    ratios = "" if row.ratio is None else f"{row.ratio:.2f}x, memory {row.memory_ratio:.2f}"
    if row.cpu_ratio is not None:
        ratios += f", CPU {row.cpu_s_per_step:.2f} s {row.cpu_ratio:.2f}x"
    return f"{what} {row.s_per_step:7.2f} s ({parts}) {row.tokens_per_s:6.0f}/s {memory} {ratios}"


def read(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", choices=WORKS, default="demo")
    parser.add_argument("--folder", type=Path, default=Path("runs/whole_step"))
    parser.add_argument("--out", type=Path, default=RESULTS.parent)
    parser.add_argument("--parts", nargs="+", choices=("time", "learn"), default=["time"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a process")
    parser.add_argument("--micro-batches", type=int, nargs="+", help="TRL's; default: all sizes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--python", default="", help="Python with sglang; without it no server")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--child", choices=("ours", "sglang", "trl", "gate"), help=argparse.SUPPRESS
    )
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = read(argv)
    torch.set_num_threads(options.threads)
    work = WORKS[options.policy]
    if options.child:
        return child(options)
    prepare(work, options.folder / options.policy)
    if not options.micro_batches:
        sizes = (1, work.responses // 2, work.responses, 2 * work.responses, work.sampled)
        options.micro_batches = sorted({size for size in sizes if work.sampled % size == 0})
    shared = measure.conditions("cpu", measure.commit()) | {"trl": version("trl")}
    found = run_child(options, "gate", work.responses)
    print(found, flush=True)
    if wrong := check(found):
        raise SystemExit(f"nothing is timed: {wrong}")
    if "time" in options.parts:
        rows = time_all(options, work, found["grad_error"])
        print(*map(show, rows), sep="\n", flush=True)
        measure.append(options.out / RESULTS.name, rows, shared)
    if "learn" in options.parts:
        rows = []
        for row in learn(options, work):
            print(row, flush=True)
            measure.append(options.out / REWARDS.name, [row], shared)
            rows.append(row)
        print(f"last rewards differ by {standard_errors(rows):.1f} standard errors")


if __name__ == "__main__":
    main()
