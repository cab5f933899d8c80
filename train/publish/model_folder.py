"""The folder of a model that is given to others: whole weights in shards, or a LoRA adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from tercet.rollout.weight_folder import write_weights

SHARD_BYTES = 5 << 30
"""Most bytes of a file of weights."""
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_FOLDER = "adapter"
OF_THE_TRAINER = ("complete.json", "trainer_state.pt", "README.md", "environment.json")
"""Files of a checkpoint that say nothing to anybody but the run, or are written anew."""


def write_merged(checkpoint: Path, out: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a folder that transformers loads, one file of weights in memory at a time.

    Args:
        checkpoint: of the trainer; with LoRA its weights are merged already.
        out: an empty folder.
        shard_bytes: most bytes of a file of weights.

    Raises:
        ValueError: the checkpoint holds no weights, or those of an adapter alone.
    """
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        alone = (checkpoint / ADAPTER_FOLDER).is_dir()
        raise ValueError(
            f"{checkpoint} holds no weights"
            + (" but those of its adapter (run.save_lora adapter): give --adapter" if alone else "")
        )
    write_weights(_tensors(files), checkpoint, out, shard_bytes)
    for name in OF_THE_TRAINER:
        (out / name).unlink(missing_ok=True)


def _tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                yield name, opened.get_tensor(name)


def adapter_of(checkpoint: Path) -> Path:
    """The folder of a checkpoint's LoRA adapter: inside it, or itself.

    Raises:
        ValueError: there is none, or a file of it is missing.
    """
    for folder in (checkpoint / ADAPTER_FOLDER, checkpoint):
        if (folder / ADAPTER_CONFIG).is_file():
            if not (folder / ADAPTER_WEIGHTS).is_file():
                raise ValueError(f"{folder} has {ADAPTER_CONFIG}, but no {ADAPTER_WEIGHTS}")
            return folder
    raise ValueError(
        f"{checkpoint} holds no adapter: it was trained without model.lora_rank. Leave --adapter "
        "out: the whole model is exported then"
    )


def write_adapter(checkpoint: Path, out: Path, base: str | None) -> str:
    """Write a folder that PEFT loads.

    Args:
        checkpoint: of a run with LoRA.
        out: an empty folder.
        base: hub id of the base; None: the adapter's own is kept.

    Returns:
        Hub id of the base.

    Raises:
        ValueError: there is no adapter, or its base is a folder of this machine.
    """
    folder = adapter_of(checkpoint)
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    base = base or config.get("base_model_name_or_path") or ""
    if base.count("/") != 1 or Path(base).is_absolute() or Path(base).exists():
        raise ValueError(
            f"the adapter's base is the folder {base!r}, which nobody else has: give its hub id, "
            "--base USER/NAME (a base that was trained, such as stage 1's, must be on the hub)"
        )
    config["base_model_name_or_path"] = base
    (out / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.copy(folder / ADAPTER_WEIGHTS, out / ADAPTER_WEIGHTS)
    return base
