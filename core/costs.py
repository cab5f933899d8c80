"""What a forward pass costs: floating-point operations of a pack, counted from a model's sizes.

A multiplication and an addition count as two; only matrix products count, as is the custom. Causal
attention counts the half that is not masked. The backward pass costs twice the forward pass, and
recomputed layers (`model.gradient_checkpointing`) cost one forward pass more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

CHUNK_ELEMENTS = 1 << 24
"""Elements that the optimiser updates at a time, which bounds its float32 temporaries.

Here, so that train/plan.py can count them without importing the trainer."""
Grid = tuple[int, int, int]
"""Patches of a photo in time, height and width."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, as its family reads them from a configuration (`core.families`)."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    head_dim: int
    head_norms: bool
    """Whether queries and keys are normalised head by head."""
    vocabulary: int
    vision_layers: int
    vision_hidden: int
    vision_heads: int
    vision_intermediate: int
    vision_matrices: int
    """Matrices of a vision block's MLP: 3 when it is gated, else 2."""
    vision_kept: int
    """Tensors of its MLP's width that autograd keeps of a vision block."""
    deepstack: int
    """Vision blocks whose outputs have mergers of their own."""
    full_layers: int
    """Vision blocks that attend to the whole photo; the others see one window."""
    window: int
    """Side of an attention window in tokens (merged patches); 0: no block has windows."""
    merge: int
    """Side of one token in patches."""
    patch: int
    """Values of one patch: channels x frames x height x width."""

    @property
    def layer_matrices(self) -> int:
        """Parameters in the matrices of a decoder layer."""
        attention = 2 * self.hidden * (self.heads + self.key_heads) * self.head_dim
        return attention + 3 * self.hidden * self.intermediate

    @property
    def vision_block_matrices(self) -> int:
        """Parameters in the matrices of a vision block."""
        width = self.vision_hidden
        return 4 * width**2 + self.vision_matrices * width * self.vision_intermediate


class PromptLoad(NamedTuple):
    """Sizes of a prompt and of the responses that share it."""

    prompt_tokens: int
    """Image tokens included."""
    grids: Sequence[Grid]
    responses: Sequence[int]
    """Tokens of each response; the last token of each is not fed to the model."""


class Flops(NamedTuple):
    """Floating-point operations of one forward pass, by part."""

    vision: float
    body: float
    head: float

    @property
    def total(self) -> float:
        return self.vision + self.body + self.head


def vision_flops(shape: Shape, grids: Iterable[Grid]) -> float:
    """Forward pass of the vision tower with its mergers."""
    width, total = shape.vision_hidden, 0.0
    for time, height, across in grids:
        patches = time * height * across
        merged = width * shape.merge**2
        matrices = shape.vision_layers * shape.vision_block_matrices + shape.patch * width
        total += 2 * patches * matrices
        merger = 2 * patches / shape.merge**2 * merged * (merged + shape.hidden)
        total += (1 + shape.deepstack) * merger
        full, windows = time * (height * across) ** 2, 0
        if shape.window:
            sides = [_cut(side // shape.merge, shape.window) for side in (height, across)]
            squares = [sum((part * shape.merge) ** 2 for part in side) for side in sides]
            windows = time * squares[0] * squares[1]
        blocks = shape.full_layers * full + (shape.vision_layers - shape.full_layers) * windows
        total += 4 * width * blocks
    return total


def _cut(length: int, size: int) -> list[int]:
    """Lengths of the windows along a side; the last one may be shorter."""
    return [min(size, length - start) for start in range(0, length, size)]


def forward_flops(shape: Shape, loads: Iterable[PromptLoad]) -> Flops:
    """Forward pass over a pack in which responses share their prompts.

    Args:
        shape: of the model.
        loads: prompts with their photos and responses. One response per prompt gives the cost
            without sharing.

    Returns:
        FLOPs of vision tower, language model and head.
    """
    vision = body = head = 0.0
    across_heads = shape.heads * shape.head_dim
    for prompt, grids, responses in loads:
        vision += vision_flops(shape, grids)
        fed = [max(0, length - 1) for length in responses]
        pairs = prompt**2 / 2 + sum(length**2 / 2 + length * prompt for length in fed)
        tokens = prompt + sum(fed)
        body += shape.layers * (2 * tokens * shape.layer_matrices + 4 * across_heads * pairs)
        head += 2 * sum(responses) * shape.hidden * shape.vocabulary
    return Flops(vision, body, head)
