"""Threads, seeds and the device of a process."""

from __future__ import annotations

import os
import random

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from tercet.core.config import RunConfig


def set_up(run: RunConfig) -> torch.device:
    """Threads, seeds and this process's device."""
    transformers_logging.disable_progress_bar()
    if run.threads:
        torch.set_num_threads(run.threads)
    random.seed(run.seed)
    np.random.seed(run.seed)
    torch.manual_seed(run.seed)
    if run.device != "auto":
        return torch.device(run.device)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
