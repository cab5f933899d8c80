"""LoRA by PEFT (Hu et al., 2022): only low-rank additions are trained; exports have them merged.

Linear layers are replaced in place; the policy stays a plain transformers model.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tercet.core.config import ModelConfig

ADAPTER = "default"  # PEFT's name for the first adapter; there is no other


def add_lora(model: nn.Module, config: ModelConfig) -> None:
    """Add W + alpha / r * B A to the chosen linear layers; only A and B are trained from now on.

    Args:
        model: changed in place.
        config: lora_rank, lora_alpha and lora_targets are used.

    Raises:
        ValueError: no layer's name matches lora_targets, or a matching one is not linear.
    """
    if config.lora_rank < 0 or config.lora_alpha <= 0:
        raise ValueError(
            "model.lora_rank must be at least 0 and model.lora_alpha positive, got "
            f"{config.lora_rank} and {config.lora_alpha}"
        )
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds, and only LoRA needs it

    options = LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=config.lora_targets
    )
    try:
        inject_adapter_in_model(options, model)
    except ValueError as error:
        raise ValueError(f"model.lora_targets {config.lora_targets!r}: {error}") from error


def is_added(name: str) -> bool:
    """Whether a parameter belongs to a low-rank addition."""
    return ".lora_" in name


def whole_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters as (Hugging Face name, tensor), in the same order on all ranks, tied ones once.

    Sharded parameters are gathered one at a time: a collective, so every rank iterates to the end.
    Low-rank additions are merged, in float32 or wider, and cast back to the weight's dtype.
    """
    lora = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    for name, parameter in model.named_parameters():
        if is_added(name):
            continue
        weight, layer = _whole(parameter), lora.get(name.rpartition(".base_layer.")[0])
        if layer is not None and name.endswith(".weight"):
            low, high = (_whole(m[ADAPTER].weight) for m in (layer.lora_A, layer.lora_B))
            wide = torch.promote_types(weight.dtype, torch.float32)
            added = high.to(wide) @ low.to(wide) * layer.scaling[ADAPTER]
            weight = (weight.to(wide) + added).to(weight.dtype)
        yield name.replace(".base_layer.", "."), weight


def _whole(parameter: nn.Parameter) -> Tensor:
    weight = parameter.detach()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
