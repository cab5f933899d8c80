"""How fast ranks add up a tensor; the doctor starts it under torchrun.

    torchrun --standalone --nproc-per-node 2 -m tercet.train.fit.reduce FOLDER

Rank 0 writes FOLDER/speed: GB/s of a ring's traffic a rank, 2 (N - 1) / N bytes for each byte.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tercet.train.cli.command_line import command

SIZES = {"nccl": 1 << 28, "gloo": 1 << 22}
"""Float32 elements."""
TIMES = 5


def speed() -> float:
    """GB/s; also checks the sum.

    Raises:
        RuntimeError: a sum is wrong.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    tensor = torch.ones(SIZES[dist.get_backend()], device=_device())
    dist.all_reduce(tensor)
    if not bool((tensor == ranks).all()):
        raise RuntimeError(f"rank {rank}: {ranks} ones do not add up to {ranks}")
    _wait()
    before = time.perf_counter()
    for _ in range(TIMES):
        dist.all_reduce(tensor)
    _wait()
    seconds = (time.perf_counter() - before) / TIMES
    return tensor.nbytes * 2 * (ranks - 1) / ranks / seconds / 1e9


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device("cpu")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize(_device())


def main() -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(_device())
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=60))
    found = speed()
    if dist.get_rank() == 0:
        Path(sys.argv[1], "speed").write_text(f"{found}\n")
    if backend == "nccl":  # gloo's threads end with the process, as `command` ends it
        dist.destroy_process_group()


if __name__ == "__main__":
    command(main)
