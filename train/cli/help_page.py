"""What --help prints: the options that matter first, or all of them, by section.

Nothing here imports torch or transformers: help is printed at once.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from itertools import groupby
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from tercet.core.option_types import PathOrEmpty, PathText

WIDTH = 80
MANY = 40
"""With so many options, --help alone shows those that matter first."""
FIRST = (
    "data.path",
    "model.path",
    "model.dtype",
    "model.lora_rank",
    "rollout.engine",
    "rollout.groups_per_step",
    "rollout.n_anchor",
    "rollout.n_positive",
    "rollout.max_response_tokens",
    "rollout.reward",
    "optim.lr",
    "optim.groups_per_minibatch",
    "optim.samples_per_step",
    "optim.max_tokens",
    "parallel.micro_batch_tokens",
    "run.preset",
    "run.out",
    "run.steps",
    "run.epochs",
    "run.eval_every",
    "run.save_every",
    "run.seed",
)
"""Of the commands that train; twenty of them are TAPO's."""


def asked(argv: Sequence[str]) -> Literal["", "first", "all"]:
    """Which help a command line asks for: none, --help, or --help all."""
    if not any(word in ("-h", "--help") or word.startswith("--help=") for word in argv):
        return ""
    return "all" if {"all", "--help=all"} & set(argv) else "first"


def help_page(
    description: str,
    options: Mapping[str, Any],
    meanings: Mapping[str, str],
    defaults: Mapping[str, object],
    everything: bool,
) -> str:
    """The page.

    Args:
        description: stands above the options.
        options: types by dotted name, sections among them.
        meanings: of options by name, for those that have one.
        defaults: by name; an option without one must be given.
        everything: show all options, also where there are many.
    """
    names = [name for name, hint in options.items() if not is_dataclass(hint)]
    shown = [*names]
    if len(names) > MANY and not everything:
        # Commands that do not train have the most important ones outside of sections.
        shown = [name for name in names if "." not in name or name in FIRST]
    program = sys.argv[0].rpartition("/")[2]
    lines = [f"usage: {program} --OPTION VALUE ...", "", _filled(description), ""]
    if len(shown) < len(names):
        more = f"{len(shown)} of {len(names)}; --help all lists every one."
        lines += [f"The options that matter first, {more}", ""]
    shown.sort(key=lambda name: "." in name)
    for section, of_section in groupby(shown, lambda name: name.rpartition(".")[0]):
        lines += [f"{section}:"] if section else []
        for name in of_section:
            value = f" (default: {_text(defaults[name])})" if name in defaults else " (needed)"
            lines.append(f"  --{name} {placeholder(options[name])}{value}")
            indent = {"initial_indent": " " * 6, "subsequent_indent": " " * 6}
            meaning = " ".join(meanings.get(name, "").split())
            lines += textwrap.wrap(meaning, WIDTH, break_long_words=False, **indent)
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def placeholder(hint: Any) -> str:
    """What stands for an option's value."""
    origin, inner = get_origin(hint), [part for part in get_args(hint) if part is not NoneType]
    if origin is Literal:
        return "|".join(map(str, inner))
    if origin in (Union, UnionType):
        return "|".join(dict.fromkeys(map(placeholder, inner)))
    if origin is dict:
        return "{NAME: VALUE}"
    if origin is list:
        return f"{placeholder(inner[0])} ..."
    if hint is bool:
        return "true|false"
    if hint in (PathText, PathOrEmpty):
        return "PATH"
    for kind, text in ((int, "N"), (float, "X"), (str, "TEXT")):
        if isinstance(hint, type) and issubclass(hint, kind):
            return text
    return "VALUE"


def _filled(text: str) -> str:
    """The text in lines of WIDTH; paragraphs that are set in, as examples are, stay as they are."""
    parts = text.strip().split("\n\n")
    return "\n\n".join(p if p.startswith(" ") else textwrap.fill(p, WIDTH) for p in parts)


def _text(default: object) -> str:
    if isinstance(default, bool) or default is None:
        return {True: "true", False: "false", None: "null"}[default]
    if isinstance(default, list):
        return " ".join(map(str, default)) or "none"
    return str(default) if str(default) else "empty"
