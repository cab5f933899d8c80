"""Options of a training command: preset, then YAML, then command line; the last one wins."""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

import jsonargparse
import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from tercet.core.config import PRESETS, RunConfig

Config = TypeVar("Config")
RECIPES = Path(__file__).parent / "recipes"

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


def parse(
    config_class: type[Config], argv: Sequence[str] | None, description: str
) -> tuple[Config, str | None, str]:
    """Read the options of `config_class`.

    Args:
        config_class: dataclass of dataclasses (see core.config).
        argv: command line without the program's name; None: sys.argv.
        description: first lines of --help.

    Returns:
        (config, value of --resume or None, resolved YAML).

    Raises:
        ValueError: naming an unknown option or a value that is not allowed.
    """
    parser = jsonargparse.ArgumentParser(description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML with the same names as below")
    parser.add_argument(
        "--resume",
        type=str | None,
        help="checkpoint to go on from, or auto for the newest good one",
    )
    parser.add_class_arguments(config_class)
    try:
        options = parser.parse_args(argv)
        if "preset" in options.run:
            parser.set_defaults(PRESETS[options.run.preset])
            options = parser.parse_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    resume = options.pop("resume")
    options.pop("config", None)
    sections = parser.instantiate(options)
    config = config_class(**{field.name: sections[field.name] for field in fields(config_class)})
    return config, resume, parser.dump(options, skip_unset=False)


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
