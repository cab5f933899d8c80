"""Threads, seeds, random numbers and the device of a process."""

from __future__ import annotations

import os
import random
import warnings

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from tercet.core.config import RunConfig


def set_up(run: RunConfig) -> torch.device:
    """Threads, seeds and this process's device.

    Raises:
        ValueError: run.device names a GPU that is not there, or one GPU for several processes.
    """
    transformers_logging.disable_progress_bar()
    if run.threads:
        torch.set_num_threads(run.threads)
    random.seed(run.seed)
    np.random.seed(run.seed)
    torch.manual_seed(run.seed)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if run.device == "cpu" or (run.device == "auto" and not gpus):
        return torch.device("cpu")
    _, _, number = run.device.partition(":")
    if number and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"run.device must be auto, cpu or cuda with several processes, got {run.device!r}: "
            "each has a GPU of its own"
        )
    number = int(number or os.environ.get("LOCAL_RANK", "0"))
    if number >= gpus:
        raise ValueError(
            f"run.device is {run.device!r}, which needs GPU {number}; this process sees {gpus} GPUs"
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def rng_state() -> dict:
    """States of the random numbers of torch (CPU and this process's GPU), numpy and Python."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": (name, keys.tolist(), *rest),
        "python": random.getstate(),
    }


def set_rng_state(state: dict) -> None:
    """Continue the random numbers from what `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if (state["cuda"] is not None) != torch.cuda.is_available():
        warnings.warn(
            "the checkpoint is of a machine with another kind of device: GPU random numbers "
            "do not continue",
            stacklevel=2,
        )
    elif state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
