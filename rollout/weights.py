"""The policy's weights on their way to a server: names as on disk, safetensors in shards.

transformers keeps Qwen2-VL and Qwen2.5-VL in memory as `model.visual.*` and
`model.language_model.*`; checkpoints, and so servers, name them `visual.*` and `model.*`. A tied
head is not among the weights: servers tie it themselves.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 2 << 30
PREFIXES = (("model.visual.", "visual."), ("model.language_model.", "model."))


def disk_names(named_weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same weights under the names of Hugging Face checkpoints."""
    for name, tensor in named_weights:
        for inside, on_disk in PREFIXES:
            if name.startswith(inside):
                name = on_disk + name.removeprefix(inside)
                break
        yield name, tensor


def write_weights(
    named_weights: Iterator[tuple[str, Tensor]], config_from: Path, folder: Path
) -> None:
    """Write weights as a folder that a server can load, a shard in memory at a time.

    Args:
        named_weights: (name in the transformers model, tensor), streamed.
        config_from: Hugging Face folder whose other files (configuration, tokenizer) are copied.
        folder: emptied and filled.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in config_from.iterdir():
        if file.is_file() and not file.name.startswith(("model.safetensors", "model-", "state")):
            shutil.copy(file, folder / file.name)
    index: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal shard, size
        name = f"model-{len(set(index.values())) + 1:05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, name))
        shard, size = {}, 0

    for name, tensor in disk_names(named_weights):
        if shard and size + tensor.nbytes > SHARD_BYTES:
            flush()
        shard[name] = tensor.detach().to("cpu").contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index}), encoding="utf-8"
    )
