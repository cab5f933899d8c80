"""A command's beginning and end: its options (preset, YAML, command line), its exit code.

Nothing here imports torch or transformers, so that --help and a misspelt option answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

import jsonargparse

from tercet.core.config import PRESETS
from tercet.rollout.server import ServerError
from tercet.train.learner.interrupt import Interrupted

Config = TypeVar("Config")
RECIPES = Path(__file__).parents[1] / "recipes"

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
    parser = _parser(config_class, description)
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
    for field in fields(config_class):
        _plain_numbers(sections[field.name])
    config = config_class(**{field.name: sections[field.name] for field in fields(config_class)})
    options.run.overwrite = False  # who runs the saved YAML again does not ask for it
    return config, resume, parser.dump(options, skip_unset=False)


def _plain_numbers(section) -> None:
    """Turn numbers of jsonargparse's restricted types into int and float: checkpoints hold some."""
    for name, value in vars(section).items():
        for kind in (int, float):
            if isinstance(value, kind) and type(value) not in (kind, bool):
                setattr(section, name, kind(value))


def show_help(config_class: type, description: str) -> None:
    """Print the options of `config_class` and end, where the command line asks for them."""
    if {"-h", "--help"} & set(sys.argv):
        _parser(config_class, description).parse_args(["--help"])


def _parser(config_class: type, description: str) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML with the same names as below")
    parser.add_argument(
        "--resume",
        type=str | None,
        help="checkpoint to go on from, or auto for the newest good one",
    )
    parser.add_class_arguments(config_class)
    return parser


def command(main) -> None:
    """Run `main()` and end the process.

    Bad input, a full disk and servers that fail end it with one line, an interruption with 128 +
    its signal.
    """
    code = 0
    try:
        main()
    except (ValueError, OSError, ServerError) as error:
        code = 1
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
    except Interrupted as error:
        code = error.exit_code
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Taking gloo's threads down aborts a process now and then, when all is done.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
