"""Sizes of a model without its weights: from a configuration, on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import Module
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from tercet.core.config import TapoConfig
from tercet.core.costs import Shape
from tercet.core.models import family_of, freeze, published
from tercet.train.fit.memory import ElementBytes, Parameters
from tercet.train.learner.lora import add_lora, is_added


def model_config(path: str) -> PretrainedConfig:
    """Configuration of a local folder or of one of the published models.

    Raises:
        ValueError: naming the path when it is neither, or when no family has its architecture.
    """
    if (Path(path) / "config.json").exists():
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        except Exception as error:  # transformers raises many kinds on a damaged file
            raise ValueError(f"model.path {path!r}: config.json cannot be read: {error}") from error
        family_of(config, path)
        return config
    known = published()
    if path not in known:
        raise ValueError(
            f"model.path {path!r} is no folder with a config.json; without a download the sizes "
            f"are known of {', '.join(known)}"
        )
    return known[path]


def count(model: PreTrainedModel) -> Parameters:
    """Counts of a model's parameters, tied ones once; the model may be on the meta device."""
    body, head = model.model, model.lm_head.weight
    layers, blocks = list(body.language_model.layers), list(body.visual.blocks)
    of_blocks = [_elements(block) for block in layers + blocks]
    trained_blocks = [_elements(block, trained=True) for block in layers + blocks]
    total, trained = _elements(model), _elements(model, trained=True)
    added = [p for name, p in layers[0].named_parameters() if is_added(f".{name}")]
    return Parameters(
        total=total,
        root=total - sum(of_blocks),
        block=max(of_blocks),
        tensor=max(parameter.numel() for parameter in model.parameters()),
        trained=trained,
        trained_root=trained - sum(trained_blocks),
        trained_block=max(trained_blocks),
        trained_head=head.numel() * head.requires_grad,
        trains_vision=any(trained_blocks[len(layers) :]),
        ranks=sum(min(parameter.shape) for parameter in added) // 2,
    )


def _elements(module: Module, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def element_bytes(
    dtype: torch.dtype, states: str = "bfloat16", mixed: bool = False
) -> ElementBytes:
    """Bytes per element in training: KahanAdamW for bfloat16 parameters, AdamW for float32 ones.

    Args:
        dtype: of the parameters.
        states: optim.states, which bfloat16 parameters follow.
        mixed: whether float32 parameters are cast to bfloat16 to compute.

    Raises:
        ValueError: another dtype, or mixed with bfloat16 parameters.
    """
    if dtype == torch.bfloat16 and not mixed:
        # Temporaries are float32: eight, or five with float32 states, which are updated in place.
        of_states, temporary = (12, 5 * 4) if states == "float32" else (6, 8 * 4)
        return ElementBytes(2, 2, states=of_states, compute=2, temporary=temporary)
    if dtype == torch.float32:
        return ElementBytes(4, 4, states=8, compute=2 if mixed else 4)
    needed = "float32 with parallel.mixed_precision" if mixed else "float32 or bfloat16"
    raise ValueError(f"model.dtype must be {needed}, got {dtype}")


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model, known without its weights."""

    shape: Shape
    parameters: Parameters
    element_bytes: ElementBytes

    @classmethod
    def of(cls, config: TapoConfig, found: PretrainedConfig | None = None) -> ModelSizes:
        """Sizes of the model that a run trains, with its LoRA matrices and frozen parts.

        Args:
            config: every option.
            found: the model's configuration; None: that of model.path.

        Raises:
            ValueError: for a path or architecture that is not known, or options that do not fit it.
        """
        options = config.model
        found = found or model_config(options.path)
        family = family_of(found)
        with torch.device("meta"):
            model = family.MODEL._from_config(found)
            freeze(model, vision=options.freeze_vision, merger=options.freeze_merger)
            if options.lora_rank:
                add_lora(model, options)
        dtype = found.dtype or torch.float32
        if options.dtype != "auto":
            dtype = getattr(torch, options.dtype)
        bytes_of = element_bytes(dtype, config.optim.states, config.parallel.mixed_precision)
        return cls(family.shape(found), count(model), bytes_of)
