"""Qwen2-VL: what a packed, prefix-shared forward pass and the tools around it need to know of it.

`core.models.Family` says what each name means.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    BaseImageProcessor,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)
from transformers.utils import ModelOutput

from tercet.core.costs import Shape
from tercet.core.types import PackedBatch

MODEL = Qwen2VLForConditionalGeneration
IMAGE_PROCESSOR = Qwen2VLImageProcessorPil
CHECKPOINT_PREFIXES = (("model.visual.", "visual."), ("model.language_model.", "model."))
MERGERS = ("merger.",)
SPECIAL_TOKENS = {
    "end_of_text": "<|endoftext|>",
    "turn_start": "<|im_start|>",
    "turn_end": "<|im_end|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
}
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SERVER_HASHES = True
TINY_PROCESSOR: dict = {}
VISION = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16}
TEXT = {
    # D, I, layers, heads, key heads, V, tied head
    "Qwen/Qwen2-VL-2B-Instruct": (1536, 8960, 28, 12, 2, 151936, True),
    "Qwen/Qwen2-VL-7B-Instruct": (3584, 18944, 28, 28, 4, 152064, False),
}


def published() -> dict[str, PretrainedConfig]:
    return {
        name: MODEL.config_class(
            vision_config=VISION | {"hidden_size": sizes[0]}, **text_config(sizes)
        )
        for name, sizes in TEXT.items()
    }


def shape(config: PretrainedConfig) -> Shape:
    vision = config.vision_config
    return Shape(
        **text_shape(config),
        vision_layers=vision.depth,
        vision_hidden=vision.embed_dim,
        vision_heads=vision.num_heads,
        vision_intermediate=int(vision.embed_dim * vision.mlp_ratio),
        vision_matrices=2,
        vision_kept=3,
        deepstack=0,
        full_layers=vision.depth,
        window=0,
    )


def resized(processor: BaseImageProcessor, height: int, width: int) -> tuple[int, int]:
    return smart_resize(
        height,
        width,
        factor=processor.patch_size * processor.merge_size,
        min_pixels=processor.size["shortest_edge"],
        max_pixels=processor.size["longest_edge"],
    )


def text_inputs(model: PreTrainedModel, packed: PackedBatch) -> dict:
    return embedded(model, packed)[0] | {"attention_mask": attention_mask(None)}


def embedded(model: PreTrainedModel, packed: PackedBatch) -> tuple[dict, ModelOutput | None]:
    """Embeddings and positions of a pack, and what the vision tower gave for its photos."""
    embeddings, features = model.model.get_input_embeddings()(packed.input_ids), None
    if packed.pixel_values is not None:
        features = model.model.get_image_features(packed.pixel_values, packed.image_grid_thw)
        image = (packed.input_ids == model.config.image_token_id)[:, None]
        merged = torch.cat(features.pooler_output).to(embeddings.dtype)
        embeddings = embeddings.masked_scatter(image, merged)
    # With a fourth row of positions transformers would build a mask of its own.
    positions = packed.position_ids[:, None]
    return {"inputs_embeds": embeddings[None], "position_ids": positions}, features


def attention_mask(mask: Tensor | None) -> dict[str, Tensor | None] | Tensor | None:
    return {"full_attention": mask}


def tiny_vision(size: int, layers: int, hidden_size: int) -> dict:
    return {
        "depth": layers,
        "num_heads": size // 32,
        "embed_dim": size,
        "hidden_size": hidden_size,
        "mlp_ratio": 3,
        "in_chans": 3,  # published configurations have it, and SGLang reads it
    }


def tiny_text(hidden_size: int) -> dict:
    sections = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    return {
        "num_attention_heads": hidden_size // 32,
        "num_key_value_heads": max(1, hidden_size // 64),
        "rope_parameters": sections,
    }


def text_config(sizes: tuple) -> dict:
    """A row of TEXT as arguments of a configuration."""
    hidden, intermediate, layers, heads, key_heads, vocabulary, tied = sizes
    text = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary,
    }
    return {"text_config": text, "tie_word_embeddings": tied, "dtype": "bfloat16"}


def text_shape(config: PretrainedConfig) -> dict[str, int]:
    """The part of a Shape that does not depend on the vision tower's blocks."""
    text, vision = config.text_config, config.vision_config
    return {
        "layers": text.num_hidden_layers,
        "hidden": text.hidden_size,
        "intermediate": text.intermediate_size,
        "heads": text.num_attention_heads,
        "key_heads": text.num_key_value_heads,
        "head_dim": text.hidden_size // text.num_attention_heads,
        "head_norms": False,
        "vocabulary": text.vocab_size,
        "merge": vision.spatial_merge_size,
        "patch": vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
    }
