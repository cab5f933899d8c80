"""Does a run fit, and how long does a step take at least? No GPU, no download, nothing is trained.

    python -m tercet.train.plan --recipe tapo_7b --gpus 4 --gpu A6000
    python -m tercet.train.plan --config my.yaml --gpus 8 --gpu H100 --parallel.branches joint

Options of train/tapo.py change the recipe, as they do there. Memory is counted from the model's
sizes (train/fit/memory.py), time from the card's datasheet (train/fit/roofline.py). Assumptions:
8 % of the card go to the CUDA context, NCCL and memory fragmentation, 3 GiB to each server beside
its weights and KV cache; colocated servers hold nothing while they sleep, other servers have GPUs
of their own; micro-batches fill their token budget; every group passes dynamic sampling the first
time; all responses are of mean length.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from tercet.core.config import TapoConfig
from tercet.core.tool_config import PlanConfig
from tercet.train.cli.arguments import join_arguments, options_of, split_arguments
from tercet.train.cli.command_line import RECIPES, command, help_text, parse, read_options
from tercet.train.cli.help_page import asked
from tercet.train.fit.memory import GIB, Breakdown
from tercet.train.fit.roofline import CARDS, LIKELY, Lengths

if TYPE_CHECKING:
    from tercet.train.fit.estimate import Plan


def show(plan: Plan, title: str, console: Console) -> None:
    """Print memory, counts and phases of a plan, and settings that would make it fit."""
    from tercet.train.fit.estimate import remedies

    card, model = plan.card, plan.model
    counted = model.parameters
    console.print(
        f"{title}: {plan.gpus} GPUs of {card.gib:g} GiB ({plan.room / GIB:.1f} of them planned "
        f"with), {card.tflops:g} TFLOP/s in bfloat16, {card.gb_per_s:g} GB/s\n"
        f"{plan.config.model.path}: {counted.total / 1e9:.2f} B parameters, "
        f"{counted.trained / 1e9:.2f} B trained, {8 * model.element_bytes.weight} bits each"
    )
    console.print(memory_table(plan))
    for line in (*count_lines(plan), *remarks(plan)):
        console.print(line)
    console.print(phase_table(plan))
    lacks = plan.lacks
    console.print("It fits." if not lacks else f"It does not fit: {'; '.join(lacks)}.")
    if lacks:
        found = [" ".join(f"--{k} {_text(v)}" for k, v in settings) for settings in remedies(plan)]
        before = "Any of these makes it fit:" if len(found) > 1 else "This makes it fit:"
        console.print("\n  ".join([before, *found]) if found else "Nothing that was tried helps.")


def _text(value: object) -> str:
    if isinstance(value, list):
        return f'"{value}" (and --tp {value[0].count(",") + 1} in rollout.sglang_args)'
    return str(value).lower() if isinstance(value, bool) else str(value)


def memory_table(plan: Plan) -> Table:
    """GiB of a GPU by what they hold, at each peak."""
    peaks = plan.memory()
    table = Table("GiB of a GPU", box=SIMPLE)
    for name in peaks:
        table.add_column(name, justify="right")
    for part in Breakdown._fields:
        sizes = [getattr(peak, part) for peak in peaks.values()]
        table.add_row(
            part.replace("head", "head chunk"),
            *(f"{size / GIB:.1f}" if size else "" for size in sizes),
        )
    cache = plan.cache_bytes
    table.add_row("KV cache", *[""] * (len(peaks) - 1), f"{cache / GIB:.1f}", end_section=True)
    totals = [peak.total + cache * (name == "generate") for name, peak in peaks.items()]
    table.add_row("total", *(f"{total / GIB:.1f}" for total in totals))
    return table


def count_lines(plan: Plan) -> Iterator[str]:
    """Counts of a step, line by line."""
    step, engines, lengths = plan.step, plan.engines, plan.lengths
    yield (
        f"A step: {step.groups} groups of {step.group_size} responses = {step.responses:,} "
        f"responses on {step.sampled_prompts} prompts; "
        f"{step.responses * lengths.response:,} response and "
        f"{step.sampled_prompts * lengths.prompt:,} prompt tokens"
    )
    yield (
        f"Update: {step.minibatches} mini-batches; a GPU has {step.groups_a_gpu} groups of one, in "
        f"{step.microbatches} micro-batches ({step.group_tokens:,} packed tokens a group)"
    )
    yield (
        f"Sampling: {engines.count} engines, each with {engines.responses} mean responses at "
        f"once; room for {plan.kv_tokens:,} tokens"
    )
    yield f"Weights to sync: {plan.synced / 1e9:.1f} GB"


def remarks(plan: Plan) -> Iterator[str]:
    """Notes on what the options imply and what is not counted."""
    rollout = plan.config.rollout
    if rollout.engine == "sglang":
        share = math.floor(100 * plan.server_share) / 100
        yield f"rollout.sglang_args: at most --mem-fraction-static {share:.2f}"
    if rollout.engine == "sglang" and not rollout.colocated:
        yield "Servers are taken to have GPUs of their own (rollout.colocated is false)."
    elif rollout.engine == "sglang" and len(rollout.server_gpus) * plan.server_gpus != plan.gpus:
        named = len(rollout.server_gpus) * plan.server_gpus
        yield (
            f"rollout.server_gpus names {named} GPUs of {plan.gpus}: {plan.servers} servers of "
            f"{plan.server_gpus} are counted"
        )
    if plan.config.model.liger or plan.config.model.compile:
        yield "model.liger and model.compile keep less than is counted here."
    if plan.config.parallel.offload:
        yield "The optimiser's step on the CPU is not among the phases."
    if plan.model.element_bytes.compute == 4:
        yield "float32 has no flash attention on a GPU: its masks and scores are not counted."


def phase_table(plan: Plan) -> Table:
    """What each phase computes and moves, and the seconds it takes on the card."""
    table = Table("phase", box=SIMPLE)
    likely = f"s at {LIKELY:.0%} of it"
    for name in ("PFLOP", "GB a GPU moves", "s at least", likely):
        table.add_column(name, justify="right")
    found = plan.phases()
    for phase in found:
        table.add_row(
            phase.name,
            f"{phase.flops / 1e15:,.1f}" if phase.flops else "",
            f"{phase.moved / 1e9:,.0f} {phase.over}" if phase.moved else "",
            f"{phase.seconds:,.1f}",
            f"{phase.seconds / LIKELY:,.1f}",
        )
    total, overlap = plan.step_seconds, plan.config.rollout.overlap != "off"
    table.add_section()
    table.add_row(
        "step, sampled ahead" if overlap else "step",
        "",
        "",
        f"{total:,.1f}",
        f"{total / LIKELY:,.1f}",
    )
    return table


def read(argv: Sequence[str]) -> tuple[Plan, str]:
    """A plan from a command line, and its title.

    Raises:
        ValueError: naming an unknown recipe, GPU or option.
    """
    found = split_arguments(argv)
    if asked(argv):
        print(help_text(PlanConfig, __doc__.splitlines()[0], False, True))
        print("and the options of train/tapo.py:\n")
    own = options_of(PlanConfig)
    options = read_options(PlanConfig, join_arguments([a for a in found if a[0] in own]), "")
    rest = join_arguments([a for a in found if a[0] not in own])
    if options.recipe is not None:
        known = sorted(file.stem for file in RECIPES.glob("*.yaml"))
        if options.recipe not in known:
            raise ValueError(f"recipe must be one of {', '.join(known)}, got {options.recipe!r}")
        rest = ["--config", str(RECIPES / f"{options.recipe}.yaml"), *rest]
    if options.gpu not in CARDS:
        raise ValueError(f"gpu must be one of {', '.join(CARDS)}, got {options.gpu!r}")
    lengths = Lengths(options.prompt_tokens, options.photo_tokens, options.response_tokens)
    if lengths.photo > lengths.prompt:
        raise ValueError(
            f"photo_tokens must be at most prompt_tokens, which hold the photo, got "
            f"{lengths.photo} and {lengths.prompt}"
        )
    config, _, _ = parse(TapoConfig, rest, "")
    # Imported here, so that --help does not wait for torch and transformers.
    from tercet.train.fit.estimate import Plan
    from tercet.train.fit.sizes import ModelSizes

    sizes = ModelSizes.of(config)
    groups = options.anchors and options.anchors * config.run.epochs
    config.rollout.settle(sizes.parameters.total, groups)
    plan = Plan(config, sizes, options.gpus, CARDS[options.gpu], lengths)
    return plan, f"{options.recipe or 'options'} on {options.gpus} x {options.gpu}"


def main(argv: Sequence[str] | None = None) -> None:
    show(*read(sys.argv[1:] if argv is None else argv), Console(highlight=False, soft_wrap=True))


if __name__ == "__main__":
    command(main)
