"""Qwen2.5-VL: Qwen2-VL's language model behind a vision tower with windows and gated MLPs.

`core.models.Family` says what each name means. What is the same as for Qwen2-VL is taken from it.
"""

from __future__ import annotations

from transformers import PretrainedConfig, Qwen2_5_VLForConditionalGeneration

from tercet.core.costs import Shape
from tercet.core.families import qwen2_vl

MODEL = Qwen2_5_VLForConditionalGeneration
IMAGE_PROCESSOR = qwen2_vl.IMAGE_PROCESSOR
CHECKPOINT_PREFIXES = qwen2_vl.CHECKPOINT_PREFIXES
MERGERS = qwen2_vl.MERGERS
SPECIAL_TOKENS = qwen2_vl.SPECIAL_TOKENS
CHAT_TEMPLATE = qwen2_vl.CHAT_TEMPLATE
SERVER_HASHES = qwen2_vl.SERVER_HASHES
TINY_PROCESSOR = qwen2_vl.TINY_PROCESSOR
VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
TEXT = {
    # D, I, layers, heads, key heads, V, tied head
    "Qwen/Qwen2.5-VL-3B-Instruct": (2048, 11008, 36, 16, 2, 151936, True),
    "Qwen/Qwen2.5-VL-7B-Instruct": (3584, 18944, 28, 28, 4, 152064, False),
}

resized = qwen2_vl.resized
text_inputs = qwen2_vl.text_inputs
attention_mask = qwen2_vl.attention_mask
tiny_text = qwen2_vl.tiny_text


def published() -> dict[str, PretrainedConfig]:
    return {
        name: MODEL.config_class(
            vision_config=VISION | {"out_hidden_size": sizes[0]}, **qwen2_vl.text_config(sizes)
        )
        for name, sizes in TEXT.items()
    }


def shape(config: PretrainedConfig) -> Shape:
    vision = config.vision_config
    return Shape(
        **qwen2_vl.text_shape(config),
        vision_layers=vision.depth,
        vision_hidden=vision.hidden_size,
        vision_heads=vision.num_heads,
        vision_intermediate=vision.intermediate_size,
        vision_matrices=3,
        vision_kept=4,
        deepstack=0,
        full_layers=len(vision.fullatt_block_indexes),
        window=vision.window_size // vision.spatial_merge_size // vision.patch_size,
    )


def tiny_vision(size: int, layers: int, hidden_size: int) -> dict:
    return {
        "depth": layers,
        "num_heads": size // 32,
        "hidden_size": size,
        "intermediate_size": 3 * size,
        "out_hidden_size": hidden_size,
        "window_size": 112,
        "fullatt_block_indexes": [layers - 1],
    }
