"""Memory and time of a run on given GPUs, and the options that make it fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tercet.core.config import TapoConfig
from tercet.kernels.linear_logprobs import GPU_CHUNK_ROWS
from tercet.train.fit.memory import GIB, Activations, Memory, Moment, kv_bytes
from tercet.train.fit.roofline import Card, Lengths, Phase, Sampling, Step, Volume, phases
from tercet.train.fit.sizes import ModelSizes

USABLE = 0.92
"""Share of a card's memory that can be planned with."""
SERVER_BYTES = 3 << 30
"""Of a server beside weights and cache: CUDA graphs, activations."""


@dataclass(frozen=True)
class Plan:
    """Memory and time of a run.

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
        return self._merged * self.model.numbers.compute

    @property
    def synced(self) -> int:
        """Bytes of the weights that servers are sent."""
        return self._merged * self.model.numbers.weight

    @property
    def _merged(self) -> int:
        added = self.model.parameters.trained if self.config.model.lora_rank else 0
        return self.model.parameters.total - added

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
        here = memory.in_generate(server)
        return found | {"generate": here if self.samples_here else Moment(server=server)}

    @property
    def kv_tokens(self) -> int:
        """Tokens whose keys and values an engine has room for."""
        free = self.room - self.moments()["generate"].total
        return int(max(0.0, free) * self.server_gpus / self._token_bytes)

    @property
    def server_share(self) -> float:
        """Weights and cache of a server in what is free when it starts: before shards are dealt."""
        free = self.card.gib * GIB
        if self.samples_here and not self.is_sharded:
            free -= self.model.parameters.total * self.model.numbers.weight
        cache = self.kv_tokens * self._token_bytes
        return (self.weights + cache) / self.server_gpus / free

    @property
    def sampling(self) -> Sampling:
        """What samples, and how many mean responses of a group at once."""
        rollout = self.config.rollout
        local = rollout.engine == "local"
        servers = 1 if local else len(rollout.urls or rollout.server_gpus)
        most = rollout.max_rows if local else rollout.max_in_flight // servers
        at_once = min(most, int(self.kv_tokens / self._sampled_tokens))
        return Sampling(servers, self.server_gpus, at_once, self.model.numbers.compute)

    @property
    def kv_bytes(self) -> float:
        """Of those responses, on a GPU."""
        tokens = self.sampling.responses * self._sampled_tokens
        return tokens * self._token_bytes / self.server_gpus

    @property
    def _sampled_tokens(self) -> float:
        """Of a mean response with its share of the prompt."""
        return self.lengths.response + self.lengths.prompt / self.config.rollout.n_anchor

    @property
    def _token_bytes(self) -> int:
        """Keys and values of a token, over a server's GPUs."""
        return kv_bytes(self.model.shape, self.model.numbers.compute)

    def phases(self) -> list[Phase]:
        gradients = self.model.parameters.trained * self.model.numbers.gradient
        volume = Volume(self.weights, gradients, self.synced)
        return phases(self.step, self.card, self.sampling, volume, self.shards)

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
