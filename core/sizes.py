"""Sizes of a model without its weights: from a configuration, on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import Module
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from tercet.core.config import ModelConfig
from tercet.core.costs import Shape
from tercet.core.memory import STEP_BYTES, Numbers, Parameters
from tercet.core.model import ARCHITECTURES, freeze

VISION_25 = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
VISION_2 = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16}
PUBLISHED = {
    # architecture, D, I, layers, heads, key heads, V, tied head
    "Qwen/Qwen2-VL-2B-Instruct": ("qwen2_vl", 1536, 8960, 28, 12, 2, 151936, True),
    "Qwen/Qwen2-VL-7B-Instruct": ("qwen2_vl", 3584, 18944, 28, 28, 4, 152064, False),
    "Qwen/Qwen2.5-VL-3B-Instruct": ("qwen2_5_vl", 2048, 11008, 36, 16, 2, 151936, True),
    "Qwen/Qwen2.5-VL-7B-Instruct": ("qwen2_5_vl", 3584, 18944, 28, 28, 4, 152064, False),
}


def model_config(path: str) -> PretrainedConfig:
    """Configuration of a local folder or of one of the published models.

    Raises:
        ValueError: naming the path, where it is neither, or another architecture.
    """
    if (Path(path) / "config.json").exists():
        try:
            config = AutoConfig.from_pretrained(path)
        except Exception as error:  # transformers raises many kinds on a damaged file
            raise ValueError(f"model.path {path!r}: config.json cannot be read: {error}") from error
        if config.model_type not in ARCHITECTURES:
            raise ValueError(
                f"model.path {path!r} is a {config.model_type!r} model; "
                f"supported: {', '.join(ARCHITECTURES)}"
            )
        return config
    if path not in PUBLISHED:
        raise ValueError(
            f"model.path {path!r} is no folder with a config.json; without a download the sizes "
            f"are known of {', '.join(PUBLISHED)}"
        )
    architecture, hidden, intermediate, layers, heads, key_heads, vocabulary, tied = PUBLISHED[path]
    out = {"qwen2_vl": VISION_2 | {"hidden_size": hidden}}
    out["qwen2_5_vl"] = VISION_25 | {"out_hidden_size": hidden}
    return ARCHITECTURES[architecture].config_class(
        text_config={
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": key_heads,
            "vocab_size": vocabulary,
        },
        vision_config=out[architecture],
        tie_word_embeddings=tied,
        dtype="bfloat16",
    )


def count(model: PreTrainedModel) -> Parameters:
    """A model's parameters, tied ones once; on the meta device as well."""
    body = model.model
    blocks = [*body.language_model.layers, *body.visual.blocks]
    of_blocks = [_numbers(block) for block in blocks]
    trained_blocks = [_numbers(block, trained=True) for block in blocks]
    total, trained, head = _numbers(model), _numbers(model, trained=True), model.lm_head.weight
    return Parameters(
        total=total,
        root=total - sum(of_blocks),
        block=max(of_blocks),
        tensor=max(parameter.numel() for parameter in model.parameters()),
        trained=trained,
        trained_root=trained - sum(trained_blocks),
        trained_block=max(trained_blocks),
        trained_head=head.numel() * head.requires_grad,
    )


def _numbers(module: Module, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def numbers(dtype: torch.dtype) -> Numbers:
    """Bytes a number of trained parameters: KahanAdamW for bfloat16, AdamW for float32."""
    if dtype == torch.bfloat16:
        return Numbers(weight=2, gradient=2, states=6, compute=2, temporary=STEP_BYTES)
    if dtype == torch.float32:
        return Numbers(weight=4, gradient=4, states=8, compute=4)
    raise ValueError(f"model.dtype must be float32 or bfloat16 in training, got {dtype}")


@dataclass(frozen=True)
class ModelSizes:
    """What is known of a model without its weights."""

    shape: Shape
    parameters: Parameters
    numbers: Numbers
    """Bytes of each kind of number in training."""

    @classmethod
    def of(cls, config: ModelConfig) -> ModelSizes:
        """Sizes of the model that a run trains, with the parts frozen that it freezes.

        Raises:
            ValueError: sizes that are not known, another architecture, or a dtype that is not
                trained.
        """
        found = model_config(config.path)
        with torch.device("meta"):
            model = ARCHITECTURES[found.model_type]._from_config(found)
        freeze(model, vision=config.freeze_vision, merger=config.freeze_merger)
        dtype = found.dtype or torch.float32
        if config.dtype != "auto":
            dtype = getattr(torch, config.dtype)
        return cls(Shape.of(found), count(model), numbers(dtype))
