"""Does a run fit, and how long does a step take at least? No GPU, no download, nothing is trained.

    python -m tercet.train.plan --recipe tapo_7b --gpus 4 --gpu A6000
    python -m tercet.train.plan --config my.yaml --gpus 8 --gpu H100 --parallel.branches joint

Options of train/tapo.py change the recipe, as they do there. Memory is counted from the model's
sizes (core/memory.py), time from the card's datasheet (core/roofline.py). What is taken for
granted: 8 % of the card for the CUDA context, NCCL and the allocator's gaps, 3 GiB a server beside
its weights and its cache; colocated servers hold nothing while they sleep, others have GPUs of
their own; micro-batches fill their token budget; groups pass the first time, responses are of mean
length.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from tercet.core.config import TapoConfig
from tercet.core.memory import Activations, Memory, Moment, kv_bytes
from tercet.core.roofline import CARDS, Card, Lengths, Phase, Sampling, Step, phases
from tercet.kernels.linear_logprobs import GPU_CHUNK_ROWS
from tercet.train.command_line import RECIPES, parse
from tercet.train.loop import command
from tercet.train.sizes import ModelSizes

USABLE = 0.92
"""Share of a card's memory that can be planned with."""
SERVER_BYTES = 3 << 30
"""Of a server beside weights and cache: CUDA graphs, activations."""
LIKELY = 0.4
"""Share of the roofline that a run may reach."""
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """Memory and time of a run.

    Rank 0, whose GPU is the fullest one, starts with the whole model.

    Args:
        config: every option.
        model: its sizes.
        gpus: that train.
        card: each of them, and each server's.
        lengths: mean tokens.
    """

    config: TapoConfig
    model: ModelSizes
    gpus: int
    card: Card
    lengths: Lengths

    def __post_init__(self) -> None:
        replicas = self.config.parallel.replicas
        if self.gpus < 1 or self.gpus % replicas:
            raise ValueError(
                f"gpus must be a multiple of parallel.replicas, {replicas}, got {self.gpus}"
            )

    @property
    def step(self) -> Step:
        return Step(self.config, self.model.shape, self.lengths, self.gpus)

    @property
    def room(self) -> float:
        """Bytes of a card that can be planned with."""
        return USABLE * self.card.gib * GIB

    @property
    def shards(self) -> int:
        return self.gpus // self.config.parallel.replicas

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 is in use (see train.parallel.World)."""
        parallel = self.config.parallel
        return self.gpus > 1 or parallel.mixed_precision or parallel.offload

    @property
    def weights(self) -> int:
        """Bytes of the weights that are computed with, additions of LoRA merged."""
        added = self.model.parameters.trained if self.config.model.lora_rank else 0
        return (self.model.parameters.total - added) * self.model.numbers.compute

    @property
    def server_gpus(self) -> int:
        """GPUs of a server, over which its weights are spread."""
        return self.config.rollout.server_gpus[0].count(",") + 1

    @property
    def samples_here(self) -> bool:
        """Whether responses are sampled on the GPUs that train."""
        return self.config.rollout.engine == "local" or self.config.rollout.colocated

    def moments(self) -> dict[str, Moment]:
        """Bytes on a GPU at the places where they are most."""
        config, step = self.config, self.step
        parallel, counted = config.parallel, self.model.parameters
        memory = Memory(
            self.model.shape,
            counted,
            self.model.numbers,
            self.is_sharded,
            self.shards,
            parallel.offload,
        )
        branches = [
            Activations(
                self.model.shape,
                step.load(branch),
                self.model.numbers.compute,
                config.model.gradient_checkpointing,
                counted.trains_vision,
                counted.ranks,
            )
            for branch in ("update", "negative")
        ]
        if not (step.negative_has_grad and parallel.branches == "joint"):
            # One at a time: the larger one; without gradient the negative keeps nothing.
            branches = branches[: 2 if step.negative_has_grad else 1]
            branches = [max(branches, key=lambda branch: branch.kept), None]
        chunk = parallel.head_chunk_rows or GPU_CHUNK_ROWS
        found = {
            "start": Moment(parameters=counted.total * self.model.numbers.weight),
            "head": memory.at_head(*branches, chunk),
            "backward": memory.in_backward(*branches),
            "step": memory.in_step(),
        }
        server = self.weights / self.server_gpus + SERVER_BYTES
        if config.rollout.engine == "local":
            # Rank 0's own copy to sample with is always there.
            has_copy = self.is_sharded or config.model.lora_rank
            server = counted.total * self.model.numbers.weight if has_copy else 0
            found = {name: moment._replace(server=server) for name, moment in found.items()}
        elif config.rollout.colocated:
            found["start"] = found["start"]._replace(server=server)
        here = memory.in_generate(server)
        return found | {"generate": here if self.samples_here else Moment(server=server)}

    @property
    def kv_tokens(self) -> int:
        """Tokens whose keys and values an engine has room for.

        A colocated server takes that room when it starts.
        """
        moments = self.moments()
        used = moments["generate"].total
        if self.config.rollout.colocated:
            used = max(used, moments["start"].total)
        a_token = kv_bytes(self.model.shape, self.model.numbers.compute)
        return int(max(0.0, self.room - used) * self.server_gpus / a_token)

    @property
    def server_share(self) -> float:
        """Most that --mem-fraction-static may be: of what is free when a server starts."""
        starts = self.moments()["start"] if self.samples_here else Moment()
        free = self.card.gib * GIB - starts.parameters
        cache = self.kv_tokens * kv_bytes(self.model.shape, self.model.numbers.compute)
        return (self.weights + cache) / self.server_gpus / free

    @property
    def sampling(self) -> Sampling:
        """What samples, and how many mean responses of a group at once."""
        rollout = self.config.rollout
        local = rollout.engine == "local"
        servers = 1 if local else len(rollout.urls or rollout.server_gpus)
        most = rollout.max_rows if local else rollout.max_in_flight // servers
        each = self.lengths.response + self.lengths.prompt / rollout.n_anchor
        at_once = min(most, int(self.kv_tokens / each))
        return Sampling(servers, self.server_gpus, at_once, self.model.numbers.compute)

    @property
    def kv_bytes(self) -> float:
        """Of those responses, on a GPU."""
        each = self.lengths.response + self.lengths.prompt / self.config.rollout.n_anchor
        a_token = kv_bytes(self.model.shape, self.model.numbers.compute)
        return self.sampling.responses * each * a_token / self.server_gpus

    def phases(self) -> list[Phase]:
        trained = self.model.parameters.trained * self.model.numbers.compute
        return phases(self.step, self.card, self.sampling, self.weights, trained, self.shards)

    @property
    def lacks(self) -> list[str]:
        """What does not fit."""
        said = [
            f"{name} needs {moment.total / GIB:.1f} GiB of {self.room / GIB:.1f}"
            for name, moment in self.moments().items()
            if moment.total > self.room
        ]
        longest = self.config.rollout.max_prompt_tokens + self.config.rollout.max_response_tokens
        if not said and self.kv_tokens < longest:
            said.append(
                f"generate has room for {self.kv_tokens:,} tokens, the longest is {longest}"
            )
        return said


Setting = tuple[str, object]


def ladders(plan: Plan) -> Iterator[list[Setting]]:
    """Settings that save memory, the cheapest kind first, each kind in falling order."""
    config = plan.config
    if not config.model.gradient_checkpointing:
        yield [("model.gradient_checkpointing", True)]
    if plan.step.negative_has_grad and config.parallel.branches == "joint":
        yield [("parallel.branches", "one_at_a_time")]
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    budget, chunk = config.parallel.micro_batch_tokens, config.parallel.head_chunk_rows
    budgets = [budget >> n for n in range(1, 8) if budget >> n >= longest]
    yield [("parallel.micro_batch_tokens", value) for value in budgets]
    rows = [(chunk or GPU_CHUNK_ROWS) >> n for n in range(1, 4)]
    yield [("parallel.head_chunk_rows", value) for value in rows if value >= 256]
    if config.rollout.colocated and plan.server_gpus == 1:
        over = [n for n in (2, 4) if plan.gpus % n == 0]
        yield [("rollout.server_gpus", _servers(plan.gpus, n)) for n in over]
    if not config.parallel.offload:
        yield [("parallel.offload", True)]
    yield [("gpus", plan.gpus << n) for n in range(1, 5)]


def _servers(gpus: int, of_each: int) -> list[str]:
    """rollout.server_gpus of servers that spread their weights over so many GPUs each."""
    places = range(0, gpus, of_each)
    return [",".join(map(str, range(first, first + of_each))) for first in places]


def changed(plan: Plan, settings: Sequence[Setting]) -> Plan:
    """The plan with other settings: options by their names, or `gpus`."""
    for name, value in settings:
        if name == "gpus":
            plan = replace(plan, gpus=value)
            continue
        section, field = name.split(".")
        part = replace(getattr(plan.config, section), **{field: value})
        plan = replace(plan, config=replace(plan.config, **{section: part}))
    return plan


def remedies(plan: Plan) -> list[list[Setting]]:
    """Settings that make a plan fit, found by trying: each alone, else the first few together."""
    alone = []
    for ladder in ladders(plan):
        fitting = (setting for setting in ladder if not changed(plan, [setting]).lacks)
        alone += [[setting] for setting in [next(fitting, None)] if setting]
    if alone:
        return alone
    taken: dict[str, object] = {}
    for ladder in ladders(plan):
        for name, value in ladder:
            taken[name] = value
            if not changed(plan, list(taken.items())).lacks:
                return [list(taken.items())]
    return []


def show(plan: Plan, title: str, console: Console) -> None:
    """Print memory, numbers and phases of a plan, and what would make it fit."""
    card, model = plan.card, plan.model
    counted = model.parameters
    console.print(
        f"{title}: {plan.gpus} GPUs of {card.gib:g} GiB ({plan.room / GIB:.1f} of them planned "
        f"with), {card.tflops:g} TFLOP/s in bfloat16, {card.gb_per_s:g} GB/s\n"
        f"{plan.config.model.path}: {counted.total / 1e9:.2f} B parameters, "
        f"{counted.trained / 1e9:.2f} B trained, {8 * model.numbers.weight} bits each"
    )
    console.print(memory_table(plan))
    for line in (*numbers_of(plan), *remarks(plan)):
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
    """GiB of a GPU by part, at each moment."""
    moments = plan.moments()
    table = Table("GiB of a GPU", box=SIMPLE)
    for name in moments:
        table.add_column(name, justify="right")
    for part in Moment._fields:
        sizes = [getattr(moment, part) for moment in moments.values()]
        table.add_row(
            part.replace("head", "head chunk"),
            *(f"{size / GIB:.1f}" if size else "" for size in sizes),
        )
    cache = plan.kv_bytes
    table.add_row("KV cache", *[""] * (len(moments) - 1), f"{cache / GIB:.1f}", end_section=True)
    totals = [m.total + cache * (name == "generate") for name, m in moments.items()]
    table.add_row("total", *(f"{total / GIB:.1f}" for total in totals))
    return table


def numbers_of(plan: Plan) -> Iterator[str]:
    """The step's arithmetic, a line each."""
    step, sampling, lengths = plan.step, plan.sampling, plan.lengths
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
        f"Sampling: {sampling.servers} engines, each with {sampling.responses} mean responses at "
        f"once; room for {plan.kv_tokens:,} tokens"
    )
    yield f"Weights to sync: {plan.weights / 1e9:.1f} GB"


def remarks(plan: Plan) -> Iterator[str]:
    """What the options leave open."""
    rollout = plan.config.rollout
    if rollout.engine == "sglang":
        share = math.floor(100 * plan.server_share) / 100
        yield f"--mem-fraction-static in rollout.sglang_args: at most {share:.2f}"
    if rollout.engine == "sglang" and not rollout.colocated:
        yield "Servers are taken to have GPUs of their own (rollout.colocated is false)."
    elif rollout.engine == "sglang" and len(rollout.server_gpus) * plan.server_gpus != plan.gpus:
        yield f"rollout.server_gpus does not name all {plan.gpus} GPUs."
    if plan.config.model.liger or plan.config.model.compile:
        yield "model.liger and model.compile keep less than is counted here."
    if plan.config.parallel.offload:
        yield "The optimiser's step on the CPU is not among the phases."
    if plan.model.numbers.compute == 4:
        yield "float32 has no flash attention on a GPU: its masks and scores are not counted."


def phase_table(plan: Plan) -> Table:
    """What each phase computes and moves, and the seconds that the card needs for it."""
    table = Table("phase", box=SIMPLE)
    likely = f"s at {LIKELY:.0%} of it"
    for name in ("PFLOP", "GB a GPU moves", "s at least", likely):
        table.add_column(name, justify="right")
    found = plan.phases()
    for phase in found:
        table.add_row(
            phase.name,
            f"{phase.flops / 1e15:,.0f}" if phase.flops else "",
            f"{phase.moved / 1e9:,.0f} {phase.over}" if phase.moved else "",
            f"{phase.seconds:,.1f}",
            f"{phase.seconds / LIKELY:,.1f}",
        )
    total = sum(phase.seconds for phase in found)
    table.add_section()
    table.add_row("step", "", "", f"{total:,.1f}", f"{total / LIKELY:,.1f}")
    return table


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(message)


def read(argv: Sequence[str]) -> tuple[Plan, str]:
    """A plan from a command line, and its title.

    Raises:
        ValueError: naming an unknown recipe, GPU or option.
    """
    own = _Parser(description=__doc__.splitlines()[0], add_help=False, allow_abbrev=False)
    own.add_argument("--recipe", help="a file of train/recipes, without .yaml")
    own.add_argument("--gpus", type=int, default=4, help="GPUs that train")
    own.add_argument("--gpu", default="A6000", help=f"one of {', '.join(CARDS)}")
    own.add_argument("--prompt_tokens", type=int, default=316, help="mean, the photo included")
    own.add_argument("--photo_tokens", type=int, default=256, help="mean")
    own.add_argument("--response_tokens", type=int, default=350, help="mean")
    if {"-h", "--help"} & set(argv):
        own.print_help()
        print("\nand every option of train/tapo.py:\n")
    options, rest = own.parse_known_args(argv)
    if options.recipe is not None:
        known = sorted(file.stem for file in RECIPES.glob("*.yaml"))
        if options.recipe not in known:
            raise ValueError(f"recipe must be one of {', '.join(known)}, got {options.recipe!r}")
        rest = ["--config", str(RECIPES / f"{options.recipe}.yaml"), *rest]
    if options.gpu not in CARDS:
        raise ValueError(f"gpu must be one of {', '.join(CARDS)}, got {options.gpu!r}")
    lengths = Lengths(options.prompt_tokens, options.photo_tokens, options.response_tokens)
    if min(lengths) < 1 or lengths.photo > lengths.prompt:
        raise ValueError(
            "prompt_tokens, photo_tokens and response_tokens must be at least 1, and the prompt "
            f"holds the photo, got {lengths.prompt}, {lengths.photo} and {lengths.response}"
        )
    config, _, _ = parse(TapoConfig, rest, "")
    plan = Plan(config, ModelSizes.of(config), options.gpus, CARDS[options.gpu], lengths)
    return plan, f"{options.recipe or 'options'} on {options.gpus} x {options.gpu}"


def main(argv: Sequence[str] | None = None) -> None:
    show(*read(sys.argv[1:] if argv is None else argv), Console(highlight=False, soft_wrap=True))


if __name__ == "__main__":
    command(main)
