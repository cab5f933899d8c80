"""A step to measure: a model with random weights, groups of random responses, micro-batches.

Weights, photos and tokens are random. Micro-batches are made by the code that training uses
(core/packing.py).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, Qwen2_5_VLConfig, Qwen3VLConfig

from tercet.core.config import LossConfig
from tercet.core.costs import Grid
from tercet.core.data.vision import PromptEncoder
from tercet.core.models import family_of, published
from tercet.core.packing import Piece, Prompts, micro_batch, prompts_of, weigh_rows
from tercet.core.types import EncodedImage, Group, MicroBatch, PolicyParts, Response, Triplet
from tercet.train.learner.policy import Policy

CPU_MODEL = dict(hidden=192, layers=2, vision_layers=2, heads=6, vision_heads=3, vocabulary=800)
"""Small, with the 3B model's ratios of widths and the same share of FLOPs in the head."""


@dataclass(frozen=True)
class Workload:
    """Sizes of a step."""

    update_on: str = "anchor"
    groups: int = 1
    in_flight: int = 1
    """Groups of a micro-batch."""
    n_anchor: int = 5
    n_positive: int = 5
    prompt: int = 316
    """Tokens of a prompt, with its photo."""
    grid: Grid = (1, 32, 32)
    length: int = 350
    """Mean tokens of a response; lengths are spaced evenly within 20 % of it, in random order."""


@dataclass(frozen=True)
class Micro:
    """One micro-batch: as the trainer takes it, and as the prompts and responses of each branch."""

    batch: MicroBatch
    update: Prompts
    negative: Prompts


def qwen_3b(
    *,
    hidden: int = 2048,
    layers: int = 36,
    vision_layers: int = 32,
    heads: int = 16,
    vision_heads: int = 16,
    vocabulary: int = 151_936,
) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL-3B's sizes, or a smaller model whose other widths scale with `hidden`."""
    deviation = 0.02 * (2048 / hidden) ** 0.5  # activations have the same scale at any width
    section = [part * hidden // heads // 128 for part in (16, 24, 24)]
    rotations = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": 11_008 * hidden // 2048,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 8),
            "rope_parameters": rotations,
            "initializer_range": deviation,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        vision_config={
            "depth": vision_layers,
            "hidden_size": 1280 * hidden // 2048,
            "intermediate_size": 3420 * hidden // 2048,
            "num_heads": vision_heads,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": list(range(min(8, vision_layers) - 1, vision_layers, 8)),
            "initializer_range": deviation,
        },
        image_token_id=vocabulary - 1,
        video_token_id=vocabulary - 2,
        vision_start_token_id=vocabulary - 3,
        tie_word_embeddings=True,
    )


def qwen_7b(*, layers: int = 28, vision_layers: int = 32) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL-7B as published, or with fewer layers; the image token is the last as above."""
    config = copy.deepcopy(published()["Qwen/Qwen2.5-VL-7B-Instruct"])
    text, vision, vocabulary = (
        config.text_config,
        config.vision_config,
        config.text_config.vocab_size,
    )
    text.num_hidden_layers, text.layer_types = layers, text.layer_types[:layers]
    vision.depth = vision_layers
    config.image_token_id, config.video_token_id = vocabulary - 1, vocabulary - 2
    config.vision_start_token_id = vocabulary - 3
    return config


QWEN3_CPU_MODEL = dict(
    hidden=160, layers=2, vision_layers=2, heads=8, vision_heads=2, vocabulary=800
)
"""Small, with the 4B model's ratios of widths."""


def qwen3_4b(
    *,
    hidden: int = 2560,
    layers: int = 36,
    vision_layers: int = 24,
    heads: int = 32,
    vision_heads: int = 16,
    vocabulary: int = 151_936,
) -> Qwen3VLConfig:
    """Qwen3-VL-4B's sizes, or a smaller model whose other widths scale with `hidden`."""
    deviation = 0.02 * (2560 / hidden) ** 0.5  # activations have the same scale at any width
    head_dim = 4096 * hidden // 2560 // heads
    section = [part * head_dim // 128 for part in (24, 20, 20)]
    rotations = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": section}
    deepstack = [5, 11, 17] if vision_layers > 17 else [0]
    return Qwen3VLConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": 9_728 * hidden // 2560,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 4,
            "head_dim": head_dim,
            "rope_parameters": rotations,
            "initializer_range": deviation,
        },
        vision_config={
            "depth": vision_layers,
            "hidden_size": 1024 * hidden // 2560,
            "intermediate_size": 4096 * hidden // 2560,
            "num_heads": vision_heads,
            "out_hidden_size": hidden,
            "deepstack_visual_indexes": deepstack,
            "initializer_range": deviation,
        },
        image_token_id=vocabulary - 1,
        video_token_id=vocabulary - 2,
        vision_start_token_id=vocabulary - 3,
        tie_word_embeddings=True,
    )


def build_policy(
    config: PretrainedConfig, dtype: torch.dtype, device: str, checkpointing: bool = False
) -> Policy:
    """A policy with random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        model = family_of(config).MODEL._from_config(config, dtype=dtype)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Policy(PolicyParts(model.train(), None, None), LossConfig())


class RandomPhotos(PromptEncoder):
    """Encodes prompts whose photos are noise, different for every key."""

    def __init__(self, policy: Policy, grid: Grid):
        super().__init__(PolicyParts(policy.model, None, None))
        self._grid, self._numbers = torch.tensor([grid]), policy.shape.patch

    def image(self, key: str) -> EncodedImage:
        return EncodedImage(lambda: self._noise(key), self._grid)

    def _noise(self, key: str) -> Tensor:
        noise = np.random.default_rng(list(key.encode()))
        patches = noise.standard_normal((int(self._grid.prod()), self._numbers), np.float32)
        return torch.from_numpy(patches)


def make_group(
    workload: Workload, number: int, vocabulary: int, image_token: int, area: int
) -> Group:
    """A group of random tokens and advantages; old log-probs are near a random policy's."""
    noise = np.random.default_rng(number)
    text = workload.prompt - int(np.prod(workload.grid)) // area
    words = noise.integers(0, vocabulary - 8, text).tolist()
    responses, count = [], workload.n_anchor + workload.n_positive
    for i, place in enumerate(noise.permutation(count)):
        length = round(workload.length * (0.8 + 0.4 * (place + 0.5) / count))
        tokens = tuple(noise.integers(0, vocabulary - 8, length).tolist())
        role = "anchor" if i < workload.n_anchor else "positive"
        response = Response(role, tokens, (), "stop", 0, advantage=float(noise.standard_normal()))
        old = 0.1 * noise.standard_normal(length) - np.log(vocabulary)
        response.old_logprobs = torch.from_numpy(old.astype(np.float32))
        responses.append(response)
    photos = [f"{number}/{role}" for role in ("anchor", "positive", "negative")]
    triplet = Triplet(str(number), *photos, "", "", "")
    return Group(str(number), triplet, (*words[:4], image_token, *words[4:]), responses)


def make_micros(workload: Workload, policy: Policy) -> list[Micro]:
    """The micro-batches of a step, and the prompts and responses that they were made of."""
    config, encode = policy.model.config, RandomPhotos(policy, workload.grid)
    area = config.vision_config.spatial_merge_size**2
    sizes = (config.text_config.vocab_size, config.image_token_id, area)
    groups = [make_group(workload, number, *sizes) for number in range(workload.groups)]
    pieces = [Piece(group, tuple(range(len(group.responses)))) for group in groups]
    loss = replace(policy.loss, update_on=workload.update_on)
    total = weigh_rows(pieces, loss, "keep")
    micros = []
    for start in range(0, len(pieces), workload.in_flight):
        some = pieces[start : start + workload.in_flight]
        batch = micro_batch(some, encode, loss, total)
        prompts = [prompts_of(some, photo, encode) for photo in (loss.update_on, "negative")]
        micros.append(Micro(batch, *prompts))
    return micros
