"""Options of the model: where it is, what of it is trained, LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jsonargparse.typing import PositiveInt

from tercet.core.option_types import FewOrNone, PathOrEmpty, Regex


@dataclass
class ModelConfig:
    path: PathOrEmpty = ""
    """Folder or hub id of the model."""
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """Parameter dtype; auto: as stored."""
    min_pixels: PositiveInt | None = None
    """Fewest pixels of a resized image; None: the image processor's own."""
    max_pixels: PositiveInt | None = None
    """Most pixels of a resized image; None: the image processor's own."""
    system_prompt: str | None = None
    """System message of every prompt; None: the chat template's own default."""
    freeze_vision: bool = False
    """Do not train the vision tower (its merger is another option)."""
    freeze_merger: bool = False
    """Do not train the merger between vision tower and language model."""
    gradient_checkpointing: bool = False
    """Recompute layers in the backward pass instead of keeping their activations."""
    lora_rank: FewOrNone = 0
    """Train LoRA adapters of this rank and nothing else; 0: train the weights themselves."""
    lora_alpha: PositiveInt = 128
    """Adapters are scaled by lora_alpha / lora_rank."""
    lora_targets: Regex = r".*language_model\.layers\..*_proj"
    """Linear layers with adapters: a regular expression that matches the layer's whole name."""
    compile: bool = False
    """torch.compile the parts of each decoder layer, except attention itself."""
    liger: bool = False
    """Liger's RMSNorm and SwiGLU (on a GPU; needs liger-kernel)."""
