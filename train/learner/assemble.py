"""From options to triplets and to a policy that can be trained: with LoRA, compiled, sharded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MethodType

import torch
from torch import Tensor, nn

from tercet.core.config import DataConfig, LossConfig, ModelConfig, SftConfig, TapoConfig
from tercet.core.data.embedders import embedder
from tercet.core.data.manifest import MANIFEST_NAME, Manifest
from tercet.core.data.triplets import prepare_manifest
from tercet.core.models import load_policy
from tercet.core.types import PolicyParts
from tercet.train.learner.lora import add_lora, added_weights, whole_weights
from tercet.train.learner.policy import NamedWeights, Policy
from tercet.train.learner.ranks import Ranks, shard


def open_parts(config: ModelConfig, ranks: Ranks, resume: Path | None) -> PolicyParts:
    """The policy as it is stored, in `resume` or else in model.path; a collective.

    With LoRA a run goes on from the model that it was added to, not from the merged one.

    With a mesh it is whole in the CPU memory of rank 0 and without data elsewhere, until
    `build_policy` deals it out.

    Raises:
        ValueError: as `load_policy`, on all ranks.
    """
    if resume and not config.lora_rank:
        config = replace(config, path=str(resume))
    device = ranks.device if ranks.mesh is None else torch.device("cpu")
    parts = ranks.on_first(lambda: load_policy(config, device))
    dtype = ranks.share(lambda: str(parts.model.dtype).removeprefix("torch."))
    return parts or load_policy(replace(config, dtype=dtype), "meta")


def open_manifest(
    config: DataConfig, parts: PolicyParts, ranks: Ranks, out: Path, resumed: bool
) -> Manifest:
    """A run's triplets on all ranks: its own when it goes on, else new ones, written into `out`.

    The vision tower tells what looks alike; it is on this rank's device for that long.

    Raises:
        ValueError: as `prepare_manifest`, on all ranks.
    """

    def make() -> Manifest:
        if resumed and (out / MANIFEST_NAME).exists():
            return Manifest.read(out)
        visual = parts.model.model.visual
        home = visual.device
        embed = embedder(config.embedder, lambda: parts, ranks.device)
        visual.to(ranks.device)
        manifest = prepare_manifest(config, embed)
        visual.to(home)
        manifest.write(out)
        return manifest

    return ranks.share(make)


def sampled_parts(parts: PolicyParts, config: TapoConfig, ranks: Ranks) -> PolicyParts:
    """What the in-process engine samples from: a whole copy where the policy is sharded.

    With LoRA the copy has additions of its own, which `Policy.sampled_weights` keeps up to date.
    """
    if ranks.mesh is None or not ranks.is_first or config.rollout.engine != "local":
        return parts
    model = copy.deepcopy(parts.model)
    if config.model.lora_rank:
        with torch.random.fork_rng(devices=[]):
            add_lora(model, config.model)
    return replace(parts, model=model.to(ranks.device))


def _sampler_weights(config: TapoConfig | SftConfig) -> Callable[[nn.Module], NamedWeights]:
    """What the sampler gets of the model: LoRA's additions, or whole weights with them merged."""
    if not isinstance(config, TapoConfig):
        return whole_weights
    if config.rollout.engine == "local":
        return added_weights if config.model.lora_rank else whole_weights
    dtype = torch.float32 if config.rollout.served_dtype == "float32" else None
    return partial(whole_weights, dtype=dtype)


def build_policy(
    parts: PolicyParts,
    config: TapoConfig | SftConfig,
    ranks: Ranks,
    loss: LossConfig | None = None,
    temperature: float = 1.0,
) -> Policy:
    """Make the policy of a run; the model in `parts` is changed in place. A collective.

    Args:
        parts: as `open_parts` gave them.
        config: of the model and of parallelism.
        ranks: whose mesh it is sharded over.
        loss: of TAPO.
        temperature: of sampling.

    Raises:
        ValueError: options that do not fit the model.
    """
    model = parts.model
    if config.model.liger:
        if ranks.device.type == "cpu":
            raise ValueError("model.liger needs a GPU")
        use_liger(model)
    if config.model.lora_rank:
        add_lora(model, config.model)
    if config.model.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)  # its name from 5.2x on
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    policy = Policy(
        parts,
        loss,
        temperature=temperature,
        chunk_rows=config.parallel.head_chunk_rows,
        device=ranks.device,
        dtype=torch.bfloat16 if config.parallel.mixed_precision else None,
        sampler_weights=_sampler_weights(config),
    )
    if config.model.compile:
        # Part by part: transformers' checkpointing of a whole layer cannot be compiled.
        for layer in model.model.language_model.layers:
            for part in layer.children():
                part.compile(dynamic=True)
    shard(policy, ranks, config.parallel)
    return policy


def use_liger(model: nn.Module) -> None:
    """Put Liger's kernels into this model's RMSNorms and gated MLPs.

    Its multimodal RoPE has no place any more: transformers picks the sections of cosines and sines
    once for all layers.

    Raises:
        ValueError: liger-kernel is not installed.
    """
    try:
        from liger_kernel.transformers.functional import liger_rms_norm, liger_swiglu
    except ImportError as error:
        raise ValueError(f"model.liger needs the package liger-kernel: {error}") from error

    def rms_norm(self: nn.Module, x: Tensor) -> Tensor:
        return liger_rms_norm(x, self.weight, self.variance_epsilon)

    def mlp(self: nn.Module, x: Tensor) -> Tensor:
        return self.down_proj(liger_swiglu(self.gate_proj(x), self.up_proj(x)))

    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = MethodType(rms_norm, module)
        elif hasattr(module, "gate_proj"):
            module.forward = MethodType(mlp, module)
