"""LoRA by PEFT (Hu et al., 2022): only low-rank additions are trained; exports have them merged.

Linear layers are replaced in place; the policy stays a plain transformers model. The in-process
engine samples with the additions beside their base. Servers and exports get W + alpha / r * B A,
computed in float32 and rounded to nearest: train.learner.merged says how much that loses.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tercet.core.config import ModelConfig

ADAPTER = "default"  # PEFT's name for the first adapter; there is no other
MATCH_S = 10.0
"""Seconds that lora_targets may take to match the names of a model's layers."""


def add_lora(model: nn.Module, config: ModelConfig) -> None:
    """Add W + alpha / r * B A to the chosen linear layers; only A and B are trained from now on.

    Args:
        model: changed in place.
        config: path, lora_rank, lora_alpha and lora_targets are used.

    Raises:
        ValueError: lora_targets match no layer, or one that takes no additions.
    """
    if config.lora_rank < 0 or config.lora_alpha <= 0:
        raise ValueError(
            "model.lora_rank must be at least 0 and model.lora_alpha positive, got "
            f"{config.lora_rank} and {config.lora_alpha}"
        )
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds, and only LoRA needs it

    path = Path(config.path)
    options = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=_targets(model, config.lora_targets),
        base_model_name_or_path=str(path.resolve()) if path.exists() else config.path,
    )
    inject_adapter_in_model(options, model)
    model.adapter_config = options


def _targets(model: nn.Module, pattern: str) -> list[str]:
    """Names of the layers that a regular expression matches as a whole."""
    names = _matching(pattern, [name for name, _ in model.named_modules()])
    if not names:
        raise ValueError(
            f"model.lora_targets {pattern!r} matches no layer's whole name; a name is "
            "model.language_model.layers.0.self_attn.q_proj"
        )
    for name in names:
        layer = model.get_submodule(name)
        wrong = None
        if not isinstance(layer, nn.Linear):
            wrong = f"which is no linear layer but {type(layer).__name__}"
        elif layer is model.lm_head:
            wrong = "the head, which takes no additions"
        elif not layer.weight.requires_grad:
            wrong = "which model.freeze_vision or model.freeze_merger keeps as it is"
        if wrong:
            raise ValueError(f"model.lora_targets {pattern!r} matches {name!r}, {wrong}")
    return names


def _matching(pattern: str, names: list[str]) -> list[str]:
    """The names that a regular expression of the user's matches, which may take for ever."""

    def give_up(*_):
        raise ValueError(
            f"model.lora_targets {pattern!r} was not matched within {MATCH_S} s: a repeat within a "
            "repeat, such as (a+)+, takes exponential time"
        )

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, MATCH_S)
    try:
        return [name for name in names if re.fullmatch(pattern, name)]
    except re.error as error:
        raise ValueError(
            f"model.lora_targets {pattern!r} is no regular expression: {error}"
        ) from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def is_added(name: str) -> bool:
    """Whether a parameter belongs to a low-rank addition."""
    return ".lora_" in name


def whole_weights(
    model: nn.Module, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Parameters as (Hugging Face name, tensor), in the same order on all ranks, tied ones once.

    Sharded parameters are gathered one at a time: a collective, so every rank iterates to the end.
    Low-rank additions are merged, in float32 or wider, and rounded once.

    Args:
        model: with or without additions.
        dtype: of all tensors; None: each parameter's own.
    """
    layers = {f"{name}.base_layer.weight": layer for name, layer in added_layers(model)}
    for name, parameter in model.named_parameters():
        if is_added(name):
            continue
        weight, layer = _whole(parameter), layers.get(name)
        kept = dtype or weight.dtype
        if layer is not None:
            low, high = (_whole(m[ADAPTER].weight) for m in (layer.lora_A, layer.lora_B))
            weight = _wide(weight) + _added(layer, low, high)
        yield name.replace(".base_layer.", "."), weight.to(kept)


def added_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A's and B's as (name in the model, tensor); otherwise as `whole_weights`."""
    for name, parameter in model.named_parameters():
        if is_added(name):
            yield name, _whole(parameter)


@torch.no_grad()
def merge_squares(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Sums of squares of what merging adds to the weights, and of what rounding takes from it.

    A collective where the model is sharded: each rank looks at its rows of W and B.

    Returns:
        `added` and `lost`: 0-d float64 on `device`, 0 without additions.
    """
    zero = torch.zeros((), dtype=torch.float64, device=device)
    sums = {"added": zero, "lost": zero}
    for _, layer in added_layers(model):
        low = _whole(layer.lora_A[ADAPTER].weight).to(device)
        parameters = (layer.base_layer.weight, layer.lora_B[ADAPTER].weight)
        weight, high = (_rows(parameter).to(device) for parameter in parameters)
        added = _added(layer, low, high)
        merged = (_wide(weight) + added).to(weight.dtype)
        lost = merged.double() - weight.double() - added.double()
        for name, found in (("added", added.double()), ("lost", lost)):
            sums[name] = sums[name] + found.square().sum()
    return sums


def save_adapter(model: nn.Module, added: dict[str, Tensor], folder: Path) -> str:
    """Write the folder of an adapter, as PEFT loads it.

    Args:
        model: that `add_lora` has changed.
        added: as `added_weights`, on the CPU.
        folder: made if it does not exist.

    Returns:
        Folder or hub id of the base.
    """
    config = model.adapter_config
    config.save_pretrained(folder)
    named = {name.replace(f".{ADAPTER}.", "."): weight for name, weight in added.items()}
    tensors = {f"base_model.model.{name}": weight.contiguous() for name, weight in named.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return config.base_model_name_or_path


def added_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers with additions, by name."""
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]


def _added(layer: nn.Module, low: Tensor, high: Tensor) -> Tensor:
    """s B A of a layer, in float32 or wider."""
    return _wide(high) @ _wide(low) * layer.scaling[ADAPTER]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _whole(parameter: nn.Parameter) -> Tensor:
    weight = parameter.detach()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _rows(parameter: nn.Parameter) -> Tensor:
    """This rank's rows; all where it is not sharded."""
    weight = parameter.detach()
    return weight.to_local() if isinstance(weight, DTensor) else weight
