"""Options of where a run's metrics go beside metrics.jsonl."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tercet.core.option_types import Word


@dataclass
class TrackerConfig:
    log_to: list[Literal["tensorboard", "wandb", "mlflow", "swanlab"]] = field(
        default_factory=lambda: ["tensorboard"]
    )
    """What gets the metrics beside metrics.jsonl; all but tensorboard need their package. []: none.
    Of the options, paths, addresses and servers' flags are not sent."""
    project: Word = "tercet"
    """Project of wandb and swanlab, experiment of mlflow."""
