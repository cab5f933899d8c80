"""Memory and time of a run on given GPUs, and the options that make it fit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig

from tercet.core.config import TapoConfig
from tercet.core.tool_config import PlanConfig
from tercet.kernels.linear_logprobs import GPU_CHUNK_ROWS
from tercet.train.fit.memory import GIB, Activations, Breakdown, Memory, kv_bytes_per_token
from tercet.train.fit.roofline import (
    LIKELY,
    Card,
    Engines,
    Lengths,
    PhaseCost,
    Step,
    Volume,
    card_of,
    phases,
)
from tercet.train.fit.sizes import ModelSizes

USABLE = 0.92
"""Share of a card's memory that a plan may use."""
SERVER_BYTES = 3 << 30
"""A server's CUDA graphs and activations, beside its weights and KV cache."""


@dataclass(frozen=True)
class Plan:
    """Memory and time of a run.

    Args:
        config: every option.
        model: sizes of the model.
        gpus: GPUs that train.
        card: the kind of GPU, in trainer and servers alike.
        lengths: mean tokens.

    Raises:
        ValueError: when gpus is not a multiple of parallel.replicas.
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
        """Bytes of a card that the plan may use."""
        return USABLE * self.card.gib * GIB

    @property
    def shards(self) -> int:
        return self.gpus // self.config.parallel.replicas

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 is in use (see train.learner.ranks)."""
        parallel = self.config.parallel
        return self.gpus > 1 or parallel.mixed_precision or parallel.offload

    @property
    def weights(self) -> int:
        """Bytes of the weights in the dtype of computation, LoRA merged."""
        return self._merged * self.model.element_bytes.compute

    @property
    def synced(self) -> int:
        """Bytes of the weights sent to each server, LoRA merged."""
        return self._merged * self._served_bytes(self.model.element_bytes.weight)

    @property
    def served(self) -> int:
        """Bytes of the weights that each server keeps, LoRA merged."""
        return self._merged * self._served_bytes(self.model.element_bytes.compute)

    def _served_bytes(self, otherwise: int) -> int:
        return 4 if self.config.rollout.served_dtype == "float32" else otherwise

    @property
    def _merged(self) -> int:
        added = self.model.parameters.trained if self.config.model.lora_rank else 0
        return self.model.parameters.total - added

    @property
    def server_gpus(self) -> int:
        """GPUs of a server, over which its weights are spread."""
        return self.config.rollout.server_gpus[0].count(",") + 1

    @property
    def servers(self) -> int:
        """SGLang servers: colocated ones are as many as the given GPUs hold."""
        rollout = self.config.rollout
        named = len(rollout.urls or rollout.server_gpus)
        fits = self.gpus // self.server_gpus
        return min(named, fits) if rollout.colocated and not rollout.urls else named

    @property
    def reference(self) -> float:
        """Bytes of a frozen reference policy on a GPU; LoRA's takes none."""
        config = self.config
        if not config.loss.needs_reference or config.model.lora_rank or config.parallel.offload:
            return 0.0
        return self.model.parameters.total * self.model.element_bytes.weight / self.shards

    @property
    def samples_here(self) -> bool:
        """Whether responses are sampled on the GPUs that train."""
        return self.config.rollout.engine == "local" or self.config.rollout.colocated

    def memory(self) -> dict[str, Breakdown]:
        """Bytes on a GPU at each peak: head, backward, step (see train.fit.memory), generate."""
        config, step, model = self.config, self.step, self.model
        parallel, counted, sizes = config.parallel, model.parameters, model.element_bytes
        memory = Memory(model.shape, counted, sizes, self.is_sharded, self.shards, parallel.offload)
        branches = [
            Activations(
                model.shape,
                step.load(branch),
                sizes.compute,
                config.model.gradient_checkpointing,
                counted.trains_vision,
                counted.ranks,
            )
            for branch in ("update", "negative")
        ]
        if not (step.negative_has_grad and parallel.branches == "joint"):
            # One at a time: the larger one. A branch without gradient keeps nothing.
            branches = branches[: 2 if step.negative_has_grad else 1]
            branches = [max(branches, key=lambda branch: branch.kept), None]
        chunk = parallel.head_chunk_rows or GPU_CHUNK_ROWS
        found = {
            "head": memory.at_head(*branches, chunk),
            "backward": memory.in_backward(*branches),
            "step": memory.in_step(),
        }
        if self.reference:
            found = {
                name: part._replace(parameters=part.parameters + self.reference)
                for name, part in found.items()
            }
        server = self.served / self.server_gpus + SERVER_BYTES
        if config.rollout.engine == "local":
            # Rank 0 keeps its own copy to sample with all the time.
            server = counted.total * sizes.weight if self.is_sharded else 0
            found = {name: part._replace(server=server) for name, part in found.items()}
        here = memory.in_generate(server)
        here = here._replace(parameters=here.parameters + self.reference)
        return found | {"generate": here if self.samples_here else Breakdown(server=server)}

    @property
    def kv_tokens(self) -> int:
        """Tokens whose keys and values fit in an engine's memory."""
        free = self.room - self.memory()["generate"].total
        return int(max(0.0, free) * self.server_gpus / self._token_bytes)

    @property
    def server_share(self) -> float:
        """A server's weights and cache as a share of the memory that is free when it starts.

        It starts before the model is sharded.
        """
        free = self.card.gib * GIB
        if self.samples_here and not self.is_sharded:
            free -= self.model.parameters.total * self.model.element_bytes.weight
        cache = self.kv_tokens * self._token_bytes
        return (self.served + cache) / self.server_gpus / free

    @property
    def engines(self) -> Engines:
        """The engines that sample, with the mean responses that each has room for at once."""
        rollout = self.config.rollout
        local = rollout.engine == "local"
        count = 1 if local else max(1, self.servers)
        most = rollout.max_rows if local else rollout.max_in_flight // count
        at_once = min(most, int(self.kv_tokens / self._sampled_tokens))
        return Engines(count, self.server_gpus, at_once, self.model.element_bytes.compute)

    @property
    def cache_bytes(self) -> float:
        """Keys and values of those responses, on each of an engine's GPUs."""
        tokens = self.engines.responses * self._sampled_tokens
        return tokens * self._token_bytes / self.server_gpus

    @property
    def _sampled_tokens(self) -> float:
        """Tokens of a mean response and its share of the prompt."""
        return self.lengths.response + self.lengths.prompt / self.config.rollout.n_anchor

    @property
    def _token_bytes(self) -> int:
        """Bytes of a token's keys and values, over all GPUs of a server."""
        return kv_bytes_per_token(self.model.shape, self.model.element_bytes.compute)

    def phases(self) -> list[PhaseCost]:
        gradients = self.model.parameters.trained * self.model.element_bytes.gradient
        volume = Volume(self.weights, gradients, self.synced)
        return phases(self.step, self.card, self.engines, volume, self.shards)

    @property
    def step_seconds(self) -> float:
        """Seconds of a step at least. Sampled ahead, it is as long as the longer of sampling and
        training, and the sync."""
        seconds = {phase.name: phase.seconds for phase in self.phases()}
        if self.config.rollout.overlap == "off":
            return sum(seconds.values())
        generate, sync = seconds.pop("generate"), seconds.pop("sync")
        return max(generate, sum(seconds.values())) + sync

    @property
    def lacks(self) -> list[str]:
        """What does not fit."""
        said = [
            f"{name} needs {part.total / GIB:.1f} GiB of {self.room / GIB:.1f}"
            for name, part in self.memory().items()
            if part.total > self.room
        ]
        if not self.servers and self.config.rollout.engine == "sglang":
            said.append(f"a server needs {self.server_gpus} GPUs of {self.gpus}")
        if not said and self.kv_tokens < self.longest:
            said.append(
                f"generate has room for {self.kv_tokens:,} tokens, the longest is {self.longest}"
            )
        return said

    @property
    def longest(self) -> int:
        """Most tokens of a prompt with one response."""
        return self.config.rollout.max_prompt_tokens + self.config.rollout.max_response_tokens


def run_time(
    config: TapoConfig, model: PretrainedConfig, steps: int, device: torch.device, gpus: int
) -> str:
    """How long a run is likely to take, in words, as far as a datasheet tells.

    Args:
        config: every option.
        model: configuration of the model.
        steps: rollout steps of the whole run.
        device: of this process.
        gpus: GPUs that train.
    """
    if device.type == "cpu":
        return "no estimate of time on a CPU"
    name = torch.cuda.get_device_name(device)
    card = card_of(name)
    if card is None:
        return f"no estimate of time: train/fit/roofline.py has no {name}"
    sizes = ModelSizes.of(config, model)
    usual = PlanConfig()
    lengths = Lengths(usual.prompt_tokens, usual.photo_tokens, usual.response_tokens)
    plan = Plan(config, sizes, gpus, card, lengths)
    hours = steps * plan.step_seconds / LIKELY / 3600
    return f"about {hours:.1f} h, at {LIKELY:.0%} of the datasheet's speed"


Setting = tuple[str, object]


def ladders(plan: Plan) -> Iterator[list[Setting]]:
    """Settings that save memory: a list per option, the option that costs least speed first.

    Each list goes from the mildest setting to the strongest.
    """
    config = plan.config
    if not config.model.gradient_checkpointing:
        yield [("model.gradient_checkpointing", True)]
    if plan.step.negative_has_grad and config.parallel.branches == "joint":
        yield [("parallel.branches", "one_at_a_time")]
    budget, chunk = config.parallel.micro_batch_tokens, config.parallel.head_chunk_rows
    budgets = [budget >> n for n in range(1, 8) if budget >> n >= plan.longest]
    yield [("parallel.micro_batch_tokens", value) for value in budgets]
    rows = [(chunk or GPU_CHUNK_ROWS) >> n for n in range(1, 4)]
    yield [("parallel.head_chunk_rows", value) for value in rows if value >= 256]
    if config.rollout.colocated and plan.server_gpus == 1:
        spread = [n for n in (2, 4) if plan.gpus % n == 0]
        yield [("rollout.server_gpus", _servers(plan.gpus, n)) for n in spread]
    if not config.parallel.offload:
        yield [("parallel.offload", True)]
    yield [("gpus", plan.gpus << n) for n in range(1, 5)]


def _servers(gpus: int, of_each: int) -> list[str]:
    """Value of rollout.server_gpus with `of_each` GPUs per server."""
    places = range(0, gpus, of_each)
    return [",".join(map(str, range(first, first + of_each))) for first in places]


def changed(plan: Plan, settings: Sequence[Setting]) -> Plan:
    """The plan with some options changed; `gpus` counts as an option."""
    for name, value in settings:
        if name == "gpus":
            plan = replace(plan, gpus=value)
            continue
        section, field = name.split(".")
        part = replace(getattr(plan.config, section), **{field: value})
        plan = replace(plan, config=replace(plan.config, **{section: part}))
    return plan


def remedies(plan: Plan) -> list[list[Setting]]:
    """Settings that make a plan fit: single ones where any suffices, else the first few together.

    Each is tried; the list is empty when nothing helps.
    """
    alone = []
    for ladder in ladders(plan):
        fitting = ([setting] for setting in ladder if not changed(plan, [setting]).lacks)
        alone += itertools.islice(fitting, 1)
    if alone:
        return alone
    taken: dict[str, object] = {}
    for ladder in ladders(plan):
        for name, value in ladder:
            taken[name] = value
            if not changed(plan, list(taken.items())).lacks:
                return [list(taken.items())]
    return []
