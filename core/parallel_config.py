"""Options of how a step is computed: micro-batches, ranks, precision, memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jsonargparse.typing import PositiveInt

from tercet.core.option_types import Seconds


@dataclass
class ParallelConfig:
    micro_batch_tokens: PositiveInt = 16384
    """Most packed tokens of one branch (update or negative) in one forward pass."""
    branches: Literal["joint", "one_at_a_time"] = "joint"
    """Forward and backward passes of both branches together, or of one branch after the other: the
    same gradient with half the activations and one more forward pass."""
    head_chunk_rows: PositiveInt | None = None
    """Response rows that reach the head at once; None: what suits the device."""
    replicas: PositiveInt = 1
    """Sharded copies of the model (HSDP), each on an equal share of the ranks."""
    mixed_precision: bool = False
    """Compute in bfloat16 with float32 parameters (`model.dtype`); gradients are summed over ranks
    in float32."""
    offload: bool = False
    """Keep parameters, gradients and optimiser states in CPU memory and take the optimiser step
    there; a layer's parameters are on the GPU while it is computed."""
    pixel_cache_mib: PositiveInt = 2048
    """Most memory for the photos that a rank keeps decoded: 3 MiB a megapixel."""
    timeout_s: Seconds = 7200.0
    """Longest that a rank waits for the others, sampling included."""
