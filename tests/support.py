"""What several tests build."""

from __future__ import annotations

import torch

from tercet.core.costs import Shape
from tercet.core.models import build_tiny, family_of
from tercet.core.types import PolicyParts

TEXTS = [
    "What bird is this? Which bird is shown? You first think, then answer.",
    "<think>The colour is red. The bill is long.</think><answer>red longbill</answer>",
]
LENGTH = """def length(rows):
    return [{'overall': row['response_length'] / 10} for row in rows]
"""
"""A module with a reward that most groups pass."""


def tiny(architecture: str = "qwen2_5_vl", **options) -> PolicyParts:
    """A random policy in which photos and biases matter."""
    layers = 3 if architecture == "qwen3_vl" else 2  # with DeepStack behind two of them
    defaults = {"hidden_size": 64, "layers": layers, "vision_size": 64, "vision_layers": layers}
    parts = build_tiny(TEXTS, architecture=architecture, **(defaults | options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parts.model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return parts


def shape_of(config) -> Shape:
    """Sizes of a configuration."""
    return family_of(config).shape(config)
