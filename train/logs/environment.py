"""environment.json: what a run was started on, and how many steps it is to have."""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from tercet.core.commit import code_version
from tercet.train.logs.metrics import ENVIRONMENT

PACKAGES = ("torch", "triton", "transformers", "peft", "flash-attn", "liger-kernel", "numpy")


def describe(device: torch.device, ranks: int) -> dict[str, object]:
    """The machine and the packages of a process, by what a person calls them.

    Args:
        device: what it computes on.
        ranks: processes of the run.
    """
    found: dict[str, object] = {"started": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    found |= {"host": platform.node(), "system": platform.platform(), "CPUs": os.cpu_count()}
    found["device"] = str(device)
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found["GPU"] = f"{ranks} x {card.name}, {card.total_memory / 2**30:.0f} GiB"
        found["CUDA"] = torch.version.cuda
    found |= {"processes": ranks, "Tercet": code_version(), "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_environment(out: Path, device: torch.device, ranks: int, total_steps: int) -> None:
    """Write environment.json for this start of a run; the last start's is the one that stays."""
    found = describe(device, ranks) | {"steps of the run": total_steps}
    (out / ENVIRONMENT).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def peak_memory_gib(device: torch.device) -> float:
    """Most GiB of memory so far: of the GPU, as PyTorch reserves it; on a CPU of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
