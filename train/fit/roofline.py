"""How long a TAPO step takes at least: its numbers, and each phase against a card's roofline.

A phase takes at least the time of its floating-point operations at the card's peak, and at least
the time of the bytes it must move at the speed of the memory or the bus. Nothing waits for anything
else: every group passes dynamic sampling the first time, all responses are of mean length, ranks
and servers share the work evenly. Real runs take longer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from tercet.core.config import TapoConfig
from tercet.core.costs import Flops, PromptLoad, Shape, forward_flops
from tercet.train.fit.memory import Load, kv_bytes_per_token

BUS = 25e9
"""Bytes per second over PCIe 4.0 x16; its standard allows 32e9."""


class Card(NamedTuple):
    """A GPU by its datasheet."""

    gib: float
    tflops: float
    """Dense bfloat16, float32 accumulation."""
    gb_per_s: float
    """Memory bandwidth."""


CARDS = {
    "RTX3090": Card(24, 71, 936),
    "RTX4090": Card(24, 165.2, 1008),
    "A6000": Card(48, 154.8, 768),
    "L40S": Card(48, 362, 864),
    "A100-40": Card(40, 312, 1555),
    "A100-80": Card(80, 312, 2039),
    "H100": Card(80, 989, 3350),
    "H200": Card(141, 989, 4800),
}
"""A100, H100 and H200 are the SXM modules."""
LIKELY = 0.4
"""Share of the roofline's speed that a run is likely to reach."""


def card_of(device_name: str) -> Card | None:
    """The card that CUDA calls so, `NVIDIA A100-SXM4-80GB` for instance; None: not listed."""
    name = device_name.replace(" ", "")
    return next((CARDS[key] for key in CARDS if all(p in name for p in key.split("-"))), None)


class Lengths(NamedTuple):
    """Mean tokens."""

    prompt: int
    """With the photo."""
    photo: int
    response: int


@dataclass(frozen=True)
class Step:
    """The numbers of one rollout step.

    Args:
        config: every option.
        shape: sizes of the model.
        lengths: mean tokens.
        gpus: GPUs that train.
    """

    config: TapoConfig
    shape: Shape
    lengths: Lengths
    gpus: int

    @property
    def groups(self) -> int:
        return self.config.rollout.groups_per_step

    @property
    def group_size(self) -> int:
        return self.config.rollout.n_anchor + self.config.rollout.n_positive

    @property
    def responses(self) -> int:
        return self.groups * self.group_size

    @property
    def sampled_prompts(self) -> int:
        rollout = self.config.rollout
        return self.groups * ((rollout.n_anchor > 0) + (rollout.n_positive > 0))

    @property
    def minibatches(self) -> int:
        return math.ceil(self.groups / (self.config.optim.groups_per_minibatch or self.groups))

    @property
    def groups_a_gpu(self) -> int:
        """Groups of a mini-batch on each GPU."""
        return math.ceil(math.ceil(self.groups / self.minibatches) / self.gpus)

    @property
    def update_prompts(self) -> int:
        """Prompts of a group in the update branch."""
        rollout = self.config.rollout
        both = rollout.n_anchor and rollout.n_positive
        return 2 if self.config.loss.update_on == "own" and both else 1

    @property
    def group_tokens(self) -> int:
        """Packed tokens of a group in the update branch."""
        return self._packed(self.update_prompts, self.group_size)

    def _packed(self, prompts: int, responses: int) -> int:
        """Packed tokens of prompts and responses; the last token of a response is not fed."""
        return prompts * self.lengths.prompt + responses * (self.lengths.response - 1)

    @property
    def needs_negative(self) -> bool:
        return self.config.loss.needs_negative

    @property
    def negative_in_update(self) -> bool:
        return self.needs_negative and self.config.loss.neg_at == "now"

    @property
    def negative_has_grad(self) -> bool:
        return self.negative_in_update and self.config.loss.neg_grad == "flow"

    @property
    def microbatches(self) -> int:
        """Forward passes of a mini-batch on one GPU in the update branch (see core.packing)."""
        budget, used, count = self.config.parallel.micro_batch_tokens, 0, 0
        for tokens in self._pieces(0, self.group_size) * self.groups_a_gpu:
            if count == 0 or used + tokens > budget:
                count, used = count + 1, 0
            used += tokens
        return count

    def _pieces(self, start: int, stop: int) -> list[int]:
        """Tokens of these responses of a group, halved until they fit the budget."""
        prompts, anchors = 1, self.config.rollout.n_anchor
        if self.config.loss.update_on == "own":
            prompts = (start < anchors) + (stop > anchors)
        tokens = self._packed(prompts, stop - start)
        if tokens <= self.config.parallel.micro_batch_tokens or stop - start == 1:
            return [tokens]
        middle = start + (stop - start) // 2
        return self._pieces(start, middle) + self._pieces(middle, stop)

    def load(self, branch: str) -> Load:
        """A full micro-batch of a branch (`update` or `negative`).

        It holds as many mean groups, fractions included, as fill the token budget, but no more
        than the GPU's share of a mini-batch.
        """
        budget = self.config.parallel.micro_batch_tokens
        groups = min(budget / self.group_tokens, self.groups_a_gpu)
        prompts = self.update_prompts if branch == "update" else 1
        return Load(
            tokens=math.ceil(groups * self._packed(prompts, self.group_size)),
            patches=math.ceil(groups * prompts * self.lengths.photo * self.shape.merge**2),
            rows=math.ceil(groups * self.group_size * self.lengths.response),
        )

    @property
    def forwards(self) -> int:
        """Forward passes of a micro-batch in the update, over both branches."""
        apart = self.negative_has_grad and self.config.parallel.branches == "one_at_a_time"
        return 1 + self.negative_in_update + apart

    @property
    def backwards(self) -> int:
        return 1 + self.negative_has_grad

    @property
    def old_share(self) -> float:
        """Share of the responses whose old log-probs are computed before the update."""
        return 1.0 if self.config.loss.is_cap is not None else 1 - 1 / self.minibatches

    def _forward(self, prompts: int, responses: int) -> Flops:
        """A forward pass over prompts that share the responses of a group."""
        side = round(self.lengths.photo**0.5) * self.shape.merge
        share = [self.lengths.response] * (responses // prompts)
        loads = [PromptLoad(self.lengths.prompt, [(1, side, side)], share)] * prompts
        return forward_flops(self.shape, loads)

    def _both_ways(self, forward: Flops) -> float:
        """FLOPs of forward and backward pass; checkpointed layers are computed once more.

        With LoRA the frozen weights need no gradient; FLOPs of the low-rank additions themselves
        are left out.
        """
        model = self.config.model
        head = 2 if model.lora_rank else 3
        layers = head + model.gradient_checkpointing
        vision = 1 if model.freeze_vision or model.lora_rank else layers
        return vision * forward.vision + layers * forward.body + head * forward.head

    @property
    def prefill_flops(self) -> float:
        return self.sampled_prompts * self._forward(1, 0).total

    def phase_flops(self) -> dict[str, float]:
        """FLOPs of each phase, over all GPUs."""
        update = self._forward(self.update_prompts, self.group_size)
        negative = self._forward(1, self.group_size)
        sampled = self._forward(self.sampled_prompts // self.groups, self.group_size)
        a_group = self._both_ways(update) + self.negative_has_grad * self._both_ways(negative)
        a_group += (self.forwards - self.backwards) * negative.total
        apart = self.needs_negative and not self.negative_in_update
        return {
            "generate": self.groups * sampled.total,
            "old": self.groups * self.old_share * update.total,
            "negative": self.groups * apart * negative.total,
            "reference": self.groups * self.config.loss.needs_reference * update.total,
            "update": self.groups * a_group,
        }

    def phase_traffic(self, weights: float, gradients: float) -> dict[str, float]:
        """Bytes of whole weights and gradients that FSDP2 gathers and reduce-scatters, by phase.

        Args:
            weights: bytes of all parameters.
            gradients: bytes of the trained parameters' gradients.
        """
        passes = self.minibatches * self.microbatches
        gathers = self.forwards + self.backwards
        return {
            "old": self.old_share * passes * weights,
            "negative": passes * weights,
            "reference": passes * weights,
            "update": passes * (gathers * weights + self.backwards * gradients),
        }


@dataclass(frozen=True)
class Engines:
    """The engines that sample: servers, or the one in this process.

    Args:
        count: engines that share the responses.
        gpus: GPUs of an engine, over which its weights are spread.
        responses: that an engine decodes at once.
        b: bytes per parameter, key or value.
    """

    count: int
    gpus: int
    responses: int
    b: int

    def decode(self, step: Step, card: Card) -> tuple[float, float]:
        """Bytes of memory that a GPU reads to decode, and the seconds it takes at least."""
        shape, lengths = step.shape, step.lengths
        weights = shape.layers * shape.layer_matrices + shape.hidden * shape.vocabulary
        context = lengths.prompt + lengths.response / 2
        at_once = max(1, min(self.responses, step.responses // self.count))
        rounds = step.responses / self.count / at_once * lengths.response
        cache = at_once * context * kv_bytes_per_token(shape, self.b)
        read = (weights * self.b + cache) / self.gpus
        computed = 2 * weights * at_once / self.gpus
        at_least = max(read / (card.gb_per_s * 1e9), computed / (card.tflops * 1e12))
        return rounds * read, rounds * at_least


class PhaseCost(NamedTuple):
    """What a phase of a step computes and moves, and the time it takes."""

    name: str
    flops: float
    """Over all GPUs."""
    moved: float
    """Bytes per GPU: read from memory to decode, or sent by FSDP2 or the weight sync."""
    over: str
    """`memory` or `PCIe`."""
    seconds: float
    """At least."""


class Volume(NamedTuple):
    """Bytes of whole models that GPUs and servers exchange."""

    weights: float
    """All parameters in the dtype of computation."""
    gradients: float
    synced: float
    """All parameters in the dtype in which they are stored."""


def phases(
    step: Step, card: Card, engines: Engines, volume: Volume, shards: int
) -> list[PhaseCost]:
    """Every phase of a step.

    Args:
        step: its numbers.
        card: the GPU of trainer and servers.
        engines: that sample.
        volume: bytes that are exchanged.
        shards: GPUs over which one copy of the model is spread.
    """
    flops, peak = step.phase_flops(), card.tflops * 1e12
    read, decoding = engines.decode(step, card)
    prefill = step.prefill_flops / (engines.count * engines.gpus) / peak
    found = [PhaseCost("generate", flops["generate"], read, "memory", decoding + prefill)]
    # Offloaded shards come from the CPU each time.
    away = (shards - 1 + step.config.parallel.offload) / shards
    for name, whole in step.phase_traffic(volume.weights, volume.gradients).items():
        if flops[name]:
            moved = away * whole
            at_least = max(flops[name] / step.gpus / peak, moved / BUS)
            found.append(PhaseCost(name, flops[name], moved, "PCIe", at_least))
    if step.config.rollout.engine == "sglang":
        out_and_in = 2 if step.config.rollout.weight_sync == "disk" else 1
        moved = (away + out_and_in) * volume.synced
        found.append(PhaseCost("sync", 0, moved, "PCIe", moved / BUS))
    return found
