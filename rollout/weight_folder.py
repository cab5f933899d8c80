"""The policy's weights as files for servers: written, in memory where there is room, and removed.

A folder's owner holds the kernel's lock on it. Where the owner has ended without removing it, the
server's guard or the next run does (rollout/guard.py).
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from tercet.rollout.guard import MEMORY_DISK, PREFIX

NamedWeights = Iterable[tuple[str, Tensor]]


def buckets(named_weights: NamedWeights, size: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Split weights, in order, into buckets of one dtype and at most `size` bytes.

    A tensor that is larger has a bucket to itself.
    """
    bucket: list[tuple[str, Tensor]] = []
    used = 0
    for name, tensor in named_weights:
        if bucket and (used + tensor.nbytes > size or tensor.dtype != bucket[0][1].dtype):
            yield bucket
            bucket, used = [], 0
        bucket.append((name, tensor))
        used += tensor.nbytes
    if bucket:
        yield bucket


def write_weights(
    named_weights: NamedWeights, config_from: Path, folder: Path, shard_bytes: int
) -> None:
    """Write a folder that a server can load, with one shard in memory at a time.

    Args:
        named_weights: (name in checkpoints, tensor), streamed.
        config_from: Hugging Face folder whose other files (configuration, tokenizer) are copied.
        folder: an empty folder.
        shard_bytes: most bytes of a file.
    """
    for file in config_from.iterdir():
        if file.is_file() and not file.name.startswith(("model.safetensors", "model-", "state")):
            shutil.copy(file, folder / file.name)
    index: dict[str, str] = {}
    total = 0
    for number, bucket in enumerate(buckets(named_weights, shard_bytes), start=1):
        name = f"model-{number:05}.safetensors"
        shard = {key: tensor.to("cpu").contiguous() for key, tensor in bucket}
        save_file(shard, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, name)
        total += sum(tensor.nbytes for tensor in shard.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index}), encoding="utf-8"
    )


@contextmanager
def own_folder(parent: Path) -> Iterator[Path]:
    """A new folder, removed at the end of the block, or later where the process is killed."""
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        with suppress(OSError):  # between the two calls it was taken for an abandoned one
            held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            break
    try:
        with suppress(OSError):  # a file system without locks: nobody can remove it either
            fcntl.flock(held, fcntl.LOCK_EX)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def roomy_folder(needed: int, otherwise: Path) -> Path:
    """/dev/shm if it has room for twice `needed` bytes, else the folder `otherwise`."""
    try:
        free = shutil.disk_usage(MEMORY_DISK).free
    except OSError:
        return otherwise
    return MEMORY_DISK if free > 2 * needed else otherwise
