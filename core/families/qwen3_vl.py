"""Qwen3-VL (dense): norms of queries and keys, interleaved M-RoPE, photo features in early layers.

`core.models.Family` says what each name means. What is the same as for Qwen2-VL is taken from it.
DeepStack: the outputs of some vision blocks go through mergers of their own and are added to the
image tokens behind the first decoder layers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, Qwen3VLForConditionalGeneration

from tercet.core.costs import Shape
from tercet.core.families import qwen2_vl
from tercet.core.types import PackedBatch

MODEL = Qwen3VLForConditionalGeneration
IMAGE_PROCESSOR = qwen2_vl.IMAGE_PROCESSOR
CHECKPOINT_PREFIXES: tuple[tuple[str, str], ...] = ()
MERGERS = ("merger.", "deepstack_merger_list.")
SPECIAL_TOKENS = qwen2_vl.SPECIAL_TOKENS
CHAT_TEMPLATE = qwen2_vl.CHAT_TEMPLATE.replace(
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}",
    "",
)
SERVER_HASHES = False  # SGLang 0.5.23 names image tokens before it reads them, and breaks down
TINY_PROCESSOR = {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
VISION = {
    # depth, hidden_size, intermediate_size, deepstack_visual_indexes
    "small": (24, 1024, 4096, (5, 11, 17)),
    "large": (27, 1152, 4304, (8, 16, 24)),
}
TEXT = {
    # D, I, layers, heads, key heads, V, tied head; all heads are HEAD_DIM wide
    "Qwen/Qwen3-VL-2B-Instruct": ((2048, 6144, 28, 16, 8, 151936, True), "small"),
    "Qwen/Qwen3-VL-4B-Instruct": ((2560, 9728, 36, 32, 8, 151936, True), "small"),
    "Qwen/Qwen3-VL-8B-Instruct": ((4096, 12288, 36, 32, 8, 151936, False), "large"),
}
HEAD_DIM = 128

resized = qwen2_vl.resized


def published() -> dict[str, PretrainedConfig]:
    found = {}
    for name, (sizes, tower) in TEXT.items():
        depth, width, intermediate, deepstack = VISION[tower]
        vision = {"depth": depth, "hidden_size": width, "intermediate_size": intermediate}
        vision |= {"deepstack_visual_indexes": deepstack, "out_hidden_size": sizes[0]}
        options = qwen2_vl.text_config(sizes)
        options["text_config"]["head_dim"] = HEAD_DIM
        found[name] = MODEL.config_class(vision_config=vision, **options)
    return found


def shape(config: PretrainedConfig) -> Shape:
    vision = config.vision_config
    heads = {"head_dim": config.text_config.head_dim, "head_norms": True}
    return Shape(
        **qwen2_vl.text_shape(config) | heads,
        vision_layers=vision.depth,
        vision_hidden=vision.hidden_size,
        vision_heads=vision.num_heads,
        vision_intermediate=vision.intermediate_size,
        vision_matrices=2,
        vision_kept=2,
        deepstack=len(vision.deepstack_visual_indexes),
        full_layers=vision.depth,
        window=0,
    )


def text_inputs(model: PreTrainedModel, packed: PackedBatch) -> dict:
    inputs, features = qwen2_vl.embedded(model, packed)
    inputs["attention_mask"] = attention_mask(None)
    if features is not None:
        inputs["visual_pos_masks"] = (packed.input_ids == model.config.image_token_id)[None]
        inputs["deepstack_visual_embeds"] = [_whole(layer) for layer in features.deepstack_features]
    return inputs


def _whole(of_layer: Tensor | tuple[Tensor, ...]) -> Tensor:
    """[image tokens, D] of a layer; transformers 5.23 gives a tuple by photo, 5.17 the whole."""
    return of_layer if isinstance(of_layer, Tensor) else torch.cat(of_layer)


def attention_mask(mask: Tensor | None) -> dict[str, Tensor | None] | Tensor | None:
    return mask


def tiny_vision(size: int, layers: int, hidden_size: int) -> dict:
    return {
        "depth": layers,
        "num_heads": size // 32,
        "hidden_size": size,
        "intermediate_size": 3 * size,
        "out_hidden_size": hidden_size,
        "num_position_embeddings": 49,  # interpolated for all photos but those of 7 x 7 patches
        "deepstack_visual_indexes": list(range(0, layers, 2))[:2],
    }


def tiny_text(hidden_size: int) -> dict:
    # SGLang obeys mrope_interleaved, transformers always interleaves.
    sections = {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
    return {
        "num_attention_heads": hidden_size // 16,
        "num_key_value_heads": hidden_size // 32,
        "head_dim": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0} | sections,
    }
