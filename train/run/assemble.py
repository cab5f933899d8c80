"""From options to triplets and to a policy that can be trained: with LoRA, compiled, sharded."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import MethodType

import torch
from torch import Tensor, nn

from tercet.core.config import DataConfig, LossConfig, ModelConfig, SftConfig, TapoConfig
from tercet.core.data.embedders import embedder
from tercet.core.data.manifest import MANIFEST_NAME, Manifest
from tercet.core.data.records import SftSample
from tercet.core.data.triplets import prepare_manifest
from tercet.core.models import load_policy
from tercet.core.types import PolicyParts
from tercet.train.learner.lora import add_lora, added_weights, whole_weights
from tercet.train.learner.policy import NamedWeights, Policy
from tercet.train.learner.ranks import Ranks, shard
from tercet.train.run.identity import digest, photos_digest
from tercet.train.run.run_folder import RunFolder


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
    config: DataConfig,
    parts: PolicyParts,
    ranks: Ranks,
    folder: RunFolder,
    loss: LossConfig | None = None,
) -> Manifest:
    """A run's triplets on all ranks: its own when it goes on, else new ones, written there.

    The vision tower tells what looks alike; it is on this rank's device for that long.

    Raises:
        ValueError: on all ranks: as `prepare_manifest`; for a run that goes on, its triplets or
            their photos are missing or are not what it began with; an anchor without a negative,
            which this loss needs.
    """

    stored = folder.path / MANIFEST_NAME

    def make() -> Manifest:
        visual = parts.model.model.visual
        home = visual.device
        embed = embedder(config.embedder, lambda: parts, ranks.device, config.embedder_layer)
        visual.to(ranks.device)
        manifest = prepare_manifest(config, embed)
        visual.to(home)
        return manifest

    def read_or_make() -> Manifest:
        going_on = folder.checkpoint or folder.saved
        if folder.checkpoint and not stored.exists():
            # The vision tower has been trained since, and would choose others.
            raise ValueError(
                f"the run cannot go on: its triplets, {stored}, are missing. Put the file back (a "
                "checkpoint that goes on in another run.out needs it there)"
            )
        is_new = not (going_on and stored.exists())
        manifest = make() if is_new else Manifest.read(stored)
        folder.note_data(triplet_digests(manifest, Path(config.path), stored))
        if is_new:
            manifest.write(folder.path)
        if loss is not None and loss.needs_negative:
            _check_negatives(manifest)
        return manifest

    return ranks.share(read_or_make)


def _check_negatives(manifest: Manifest) -> None:
    """Raises ValueError for an anchor that stands for its own negative."""
    lone = [anchor.id for anchor in manifest.anchors if anchor.negatives == (anchor.image,)]
    if lone:
        raise ValueError(
            f"{len(lone)} anchor(s) have no negative, {lone[0]!r} for instance: the coefficients "
            "of the loss's terms on the negative must be 0 with them"
        )


def triplet_digests(manifest: Manifest, path: Path, own: Path) -> dict[str, str]:
    """Digests of a run's triplets, of their photos, and of the data.path that they come from.

    Args:
        manifest: the run's triplets.
        path: data.path.
        own: triplets.json of the run.

    Raises:
        ValueError: a photo or data.path is missing, or is a folder that does not hold the photos.
    """
    used = [key for a in manifest.anchors for key in (a.image, *a.positives, *a.negatives)]
    return {
        "source": _source_digest(path, manifest, own),
        "triplets": _manifest_digest(manifest),
        "photo_contents": photos_digest(used, manifest.common_folder()),
    }


def _manifest_digest(manifest: Manifest) -> str:
    """Of all that training and evaluation read, wherever the photos lie."""
    root = manifest.common_folder()
    stored = asdict(manifest.with_keys(lambda key: os.path.relpath(key, root)))
    return digest([stored[n] for n in ("anchors", "sft", "test", "names", "nearest")])


def _source_digest(path: Path, manifest: Manifest, own: Path) -> str:
    listing = path if path.is_file() else path / MANIFEST_NAME
    if listing.is_file() and own.is_file() and listing.samefile(own):
        return "the run's own triplets"
    if listing.name == MANIFEST_NAME and listing.is_file():
        return _manifest_digest(Manifest.read(listing))
    files = sorted(path.glob("*.parquet")) or [path]
    if files[0].suffix == ".parquet" and all(file.is_file() for file in files):
        return digest([(file.name, file.stat().st_size) for file in files])
    photos = Path(manifest.common_folder()).resolve()
    if not path.exists() or path.is_dir() and not photos.is_relative_to(path.resolve()):
        raise ValueError(f"data.path {path} does not hold the run's photos, which are in {photos}")
    split = path / "manifest.json"
    if path.is_file() or split.is_file():
        return digest((path if path.is_file() else split).read_bytes().hex())
    return "a folder of photos"


def record_digests(samples: Sequence[SftSample]) -> dict[str, str]:
    """Digests of stage-1 records and of their photos.

    Raises:
        ValueError: naming a photo that is missing.
    """
    photos = dict.fromkeys(key for sample in samples for key in sample.images)
    root = os.path.commonpath([os.path.dirname(key) for key in photos]) if photos else os.sep
    records = [(s.messages, [os.path.relpath(key, root) for key in s.images]) for s in samples]
    return {"source": digest(records), "photo_contents": photos_digest(photos, root)}


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
        compile_parts(model)
    shard(policy, ranks, config.parallel)
    return policy


def compile_parts(model: nn.Module) -> list[nn.Module]:
    """Compile attention, MLP and norms of every layer of the text part; returns them.

    Part by part: transformers' checkpointing of a whole layer cannot be compiled.
    """
    parts = [part for layer in model.model.language_model.layers for part in layer.children()]
    for part in parts:
        part.compile(dynamic=True)
    return parts


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
