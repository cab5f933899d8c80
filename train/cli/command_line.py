"""A command's beginning and end: its options (preset, YAML, command line), its exit code.

Nothing here imports torch or transformers, so that --help and a misspelt option answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse
import yaml

from tercet.core.option_types import PathText
from tercet.core.presets import PRESETS
from tercet.rollout.server import ServerError
from tercet.train.cli.arguments import Arguments, load_yaml, one_line, options_of
from tercet.train.cli.help_page import asked, help_page
from tercet.train.cli.interrupt import Interrupted

Config = TypeVar("Config")
DEFAULT_PRESET = "tercet"
RECIPES = Path(__file__).parents[1] / "recipes"

EXTRA = {"config": PathText, "resume": PathText | None}
"""Options of a command that trains which are not in its dataclass."""
EXTRA_DEFAULTS = dict.fromkeys(EXTRA)
NAMED = re.compile(r'Parser key "([^"]+)"')
"""How jsonargparse names the option whose value it refuses."""

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
jsonargparse.set_loader("strict_yaml", load_yaml, (yaml.YAMLError,))


def parse(
    config_class: type[Config], argv: Sequence[str] | None, description: str
) -> tuple[Config, str | None, str]:
    """Read the options of a command that trains: those of `config_class`, --config and --resume.

    Args:
        config_class: dataclass of dataclasses (see core.config).
        argv: command line without the program's name; None: sys.argv.
        description: first lines of --help.

    Returns:
        (config, value of --resume or None, resolved YAML).

    Raises:
        ValueError: in one line, naming an unknown option or a value that is not allowed.
    """
    config, options, parser = _read(config_class, argv, description, EXTRA)
    resume = options.pop("resume")
    if "run" in options:
        options.run.overwrite = False  # who runs the saved YAML again does not ask for it
    return config, None if resume is None else str(resume), parser.dump(options, skip_unset=False)


def read_options(
    config_class: type[Config], argv: Sequence[str] | None, description: str
) -> Config:
    """Read the options of any other command; arguments and errors are those of `parse`."""
    return _read(config_class, argv, description, {})[0]


def _read(
    config_class: type[Config], argv: Sequence[str] | None, description: str, extra: dict[str, Any]
) -> tuple[Config, jsonargparse.Namespace, jsonargparse.ArgumentParser]:
    argv = sys.argv[1:] if argv is None else argv
    if which := asked(argv):
        print(help_text(config_class, description, bool(extra), which == "all"), end="")
        sys.exit(0)
    arguments = Arguments(argv, options_of(config_class) | extra)
    parser = _parser(config_class, description, bool(extra))
    options = _parse_args(parser, arguments)
    preset = options.run.get("preset") if "run" in options else None
    if preset in PRESETS and preset != DEFAULT_PRESET:
        parser = _parser(config_class, description, bool(extra), preset)
        options = _parse_args(parser, arguments)
    made = parser.instantiate(options)
    config = config_class(**{f.name: _plain(made[f.name]) for f in fields(config_class)})
    return config, options, parser


def _parse_args(
    parser: jsonargparse.ArgumentParser, arguments: Arguments
) -> jsonargparse.Namespace:
    try:
        options = parser.parse_args(arguments.words)
    except argparse.ArgumentError as error:
        found = NAMED.search(str(error))
        if found and found[1] in arguments.options:
            raise ValueError(arguments.explained(found[1])) from error
        raise ValueError(one_line(str(error))) from error
    options.pop("config", None)
    for name, value in options.items():
        arguments.check(name, value)
    return options


def _plain(value: object) -> object:
    """Numbers and texts without the classes of restricted types: checkpoints hold some of them."""
    if is_dataclass(value):
        for name, inner in vars(value).items():
            plain = _plain(inner)
            if type(plain) is not type(inner) or isinstance(inner, list):
                setattr(value, name, plain)
        return value
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def show_help(config_class: type, description: str) -> None:
    """Print the options of a command that trains and end, where the command line asks for them."""
    if asked(sys.argv):
        _read(config_class, None, description, EXTRA)


def help_text(config_class: type, description: str, trains: bool, everything: bool) -> str:
    """What --help prints.

    Args:
        config_class: as for `parse`.
        description: stands above the options.
        trains: whether --config and --resume are among them.
        everything: all options, also where there are many.
    """
    parser = _parser(config_class, description, trains)
    options = (EXTRA if trains else {}) | options_of(config_class)
    meanings = {action.dest: action.help or "" for action in parser._actions}
    found = parser.get_defaults().as_dict()
    flat = {
        name: reduce(lambda inner, part: inner[part], name.split("."), found)
        for name, hint in options.items()
        if not is_dataclass(hint) and name != "config"
    }
    needed = {f.name for f in fields(config_class) if f.default is f.default_factory is MISSING}
    defaults = {name: value for name, value in flat.items() if name not in needed}
    return help_page(description, options, meanings, defaults | EXTRA_DEFAULTS, everything)


def _parser(
    config_class: type, description: str, trains: bool, preset: str = DEFAULT_PRESET
) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        description=description, exit_on_error=False, allow_abbrev=False, parser_mode="strict_yaml"
    )
    if trains:
        parser.add_argument("--config", action="config", help="YAML with the same names as below")
        parser.add_argument(
            "--resume",
            type=PathText | None,
            help="checkpoint to go on from, or auto for the newest good one",
        )
    parser.add_class_arguments(config_class)
    if "run.preset" in options_of(config_class):
        parser.set_defaults(PRESETS[preset])
    return parser


def check_output(path: Path, option: str) -> None:
    """Raises ValueError where a command could not write a file at its end; nothing is made yet."""
    folder = Path(os.path.abspath(path)).parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if path.is_dir():
        raise ValueError(f"--{option}: {path} is a folder, where a file is to be written")
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"--{option}: {path} cannot be written: {folder} is no folder to write in")


def tell_torchrun(said: str) -> None:
    """Leave a line where torchrun looks for it: its report of a failed rank ends with that line."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    # As torch.distributed.elastic's own error handler writes it.
    found = {"extraInfo": {"py_callstack": said, "timestamp": str(int(time.time()))}}
    with suppress(OSError):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({"message": {"message": said, **found}}), encoding="utf-8")


def command(main) -> None:
    """Run `main()` and end the process.

    Bad input, a full disk and servers that fail end it with one line. So does an interruption, with
    128 + its signal; under torchrun with 0, and the line is rank 0's: a rank that stops on purpose
    must not be restarted, nor called failed. torchrun is told what failed, and says it last.
    """
    code, under_torchrun = 0, "TORCHELASTIC_RUN_ID" in os.environ
    at_once = under_torchrun  # taking gloo's threads down aborts a process now and then
    name = Path(sys.argv[0]).name
    try:
        main()
    except (ValueError, OSError, ServerError) as error:
        code = 1
        print(f"{name}: {error}", file=sys.stderr)
        tell_torchrun(f"{name}: {error}")
    except (Interrupted, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt):  # before the run began, or after its end
            error = Interrupted(signal.SIGINT)
        code = 0 if under_torchrun else error.exit_code
        at_once = True  # taking torch and transformers down takes seconds on a busy machine
        if os.environ.get("RANK", "0") == "0":
            print(f"{name}: {error}", file=sys.stderr)
    except Exception as error:
        tell_torchrun(f"{name}: {type(error).__name__}: {error}")
        raise
    if at_once:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
