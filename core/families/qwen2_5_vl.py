"""Qwen2.5-VL: Qwen2-VL's language model behind a vision tower with windows and gated MLPs."""

from __future__ import annotations

from transformers import PretrainedConfig, Qwen2_5_VLForConditionalGeneration

from tercet.core.costs import Shape
from tercet.core.families.qwen2_vl import (
    CHECKPOINT_PREFIXES,
    IMAGE_PROCESSOR,
    resized,
    text_config,
    text_inputs,
    text_shape,
    tiny_text,
)

__all__ = ["CHECKPOINT_PREFIXES", "IMAGE_PROCESSOR", "resized", "text_inputs", "tiny_text"]

MODEL = Qwen2_5_VLForConditionalGeneration
VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
TEXT = {
    # D, I, layers, heads, key heads, V, tied head
    "Qwen/Qwen2.5-VL-3B-Instruct": (2048, 11008, 36, 16, 2, 151936, True),
    "Qwen/Qwen2.5-VL-7B-Instruct": (3584, 18944, 28, 28, 4, 152064, False),
}


def published() -> dict[str, PretrainedConfig]:
    """Configurations of the published models, by hub id, as far as sizes go."""
    return {
        name: MODEL.config_class(
            vision_config=VISION | {"out_hidden_size": sizes[0]}, **text_config(sizes)
        )
        for name, sizes in TEXT.items()
    }


def tiny_vision(size: int, layers: int, out: int) -> dict:
    """Vision configuration of a small model: width, blocks, and D of the language model."""
    return {
        "depth": layers,
        "num_heads": size // 32,
        "hidden_size": size,
        "intermediate_size": 3 * size,
        "out_hidden_size": out,
        "window_size": 112,
        "fullatt_block_indexes": [layers - 1],
    }


def shape(config: PretrainedConfig) -> Shape:
    """Sizes of a configuration, for counting operations and bytes."""
    vision = config.vision_config
    return Shape(
        **text_shape(config),
        vision_layers=vision.depth,
        vision_hidden=vision.hidden_size,
        vision_heads=vision.num_heads,
        vision_intermediate=vision.intermediate_size,
        vision_matrices=3,
        full_layers=len(vision.fullatt_block_indexes),
        window=vision.window_size // vision.spatial_merge_size // vision.patch_size,
    )
