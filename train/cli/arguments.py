"""Command lines and the YAML files they name, read strictly, before jsonargparse sees them.

Whatever is wrong becomes one ValueError in one line that names the option, the value as it was
given, and what is allowed.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field, is_dataclass
from difflib import get_close_matches
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import jsonargparse
import yaml

from tercet.core.option_types import allowed

MOST = 10**12
"""No number of an option is larger in size; sums and products of them stay in 64 bits."""
MOST_TEXT = 100_000
"""Most characters of a text; what is longer is a slip, such as a file's content for its name."""
MOST_BYTES, MOST_DEPTH = 1 << 20, 16
"""Of a YAML file."""
NUMBER = re.compile(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?")
SHOWN = 80
"""Most characters of a value in an error."""


def options_of(config_class: type, prefix: str = "") -> dict[str, Any]:
    """Types of a dataclass's options by dotted name; a section's own name has its dataclass."""
    found = {}
    for name, hint in get_type_hints(config_class).items():
        found[prefix + name] = hint
        if is_dataclass(hint):
            found |= options_of(hint, f"{prefix}{name}.")
    return found


def shown(value: object) -> str:
    """A value for an error, on one line and not too long."""
    if isinstance(value, str):
        text = value if NUMBER.fullmatch(value) else repr(value)
    else:
        text = json.dumps(value, default=repr)
    if len(text) <= SHOWN:
        return text
    return f"{text[: SHOWN - 20]}... ({len(text):,} characters)"


def one_line(text: str) -> str:
    """A text on one line; what cannot be printed is escaped, and what is long is cut."""
    text = " ".join(text.split())
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= 500 else f"{text[:500]}..."


def split_arguments(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Words of a command line as (option without its dashes, values).

    Words before the first option have the name "". A word with blanks after an option
    without a value is its value, dashes or not: flags for another program, as "--tp 2 --ep 2".
    """
    found: list[tuple[str, list[str]]] = []
    for word in argv:
        name, equals, value = word.removeprefix("--").partition("=")
        is_flags = found and not found[-1][1] and " " in word and "." not in name.partition(" ")[0]
        if name and word.startswith("--") and not is_flags:
            found.append((name, [value] if equals else []))
        elif found:
            found[-1][1].append(word)
        else:
            found.append(("", [word]))
    return found


def join_arguments(found: Sequence[tuple[str, list[str]]]) -> list[str]:
    """The words again, each option with its first value in one word."""
    words = []
    for name, values in found:
        if name:
            words.append(f"--{name}={values[0]}" if values else f"--{name}")
        words += values[1:] if name else values
    return words


def overridden(argv: Sequence[str], by: Sequence[str]) -> list[str]:
    """The command line `argv` with the options of `by` in place of its own."""
    new = {name for name, _ in split_arguments(by)} - {"config"}
    kept = [(name, values) for name, values in split_arguments(argv) if name not in new]
    return [*join_arguments(kept), *by]


@dataclass
class Arguments:
    """A command line that was read: words for jsonargparse, and what was given by option.

    Args:
        argv: words after the program's name.
        options: types by dotted name; see `options_of`.

    Raises:
        ValueError: an option that does not exist, that is a section, that is given twice or
            without one value, or a YAML file that cannot be read.
    """

    argv: Sequence[str]
    options: dict[str, Any]
    words: list[str] = field(default_factory=list)
    """YAML files come first, so that options of the command line apply after them."""
    given: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        files: list[str] = []
        seen: dict[str, list[str]] = {}
        for name, values in split_arguments(self.argv):
            option = name.removesuffix("+")
            if not values and self.options.get(option) is bool:
                values = ["true"]  # --run.verbose alone
            if name == "print_config":
                self.words += join_arguments([(name, values)])
                continue
            self._check(option, values, "")
            if name == "config":
                files.append(os.path.expanduser(values[0]))
                continue
            if option in seen and not (name.endswith("+") and self._is_list(option)):
                raise ValueError(
                    f"{option} is given twice: {shown(seen[option][0])} and {shown(values[0])}"
                )
            seen[option] = values
            self.given[option] = values[0] if len(values) == 1 else values
            if self._is_list(option) and not name.endswith("+") and values[0][:1] != "[":
                values = [json.dumps(values)]
            self.words += join_arguments([(name, values)])
        for file in files:
            self.given = {**self._read(file), **self.given}
        self.words = [*(f"--config={file}" for file in files), *self.words]

    def _is_list(self, name: str) -> bool:
        return get_origin(self.options[name]) is list

    def _check(self, name: object, values: list, where: str) -> None:
        """The option exists, is not a section, and has one value, or is a list and has several."""
        if name not in self.options:
            near = get_close_matches(str(name), self.options, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{where}there is no option {shown(name or values[0])}{hint}")
        if is_dataclass(self.options[name]):
            raise ValueError(f"{where}{name} has options of its own; give them as --{name}.NAME")
        if not values or (len(values) > 1 and not self._is_list(name)):
            text = " ".join(map(shown, values[:3])) or "none"
            raise ValueError(f"{name} needs one value, got {text}")

    def _read(self, file: str) -> dict[str, object]:
        """Options of a YAML file by dotted name."""
        found = {}
        for name, value in read_mapping(file).items():
            section = self.options.get(name)
            if not is_dataclass(section):
                self._check(name if name != "config" else "", [name], f"{file}: ")
                found[name] = value
                continue
            if not isinstance(value, dict):
                raise ValueError(
                    f"{file}: {name} must hold options, NAME: VALUE, got {shown(value)}"
                )
            for key, inner in value.items():
                self._check(f"{name}.{key}", [key], f"{file}: ")
                found[f"{name}.{key}"] = inner
        return found

    def explained(self, name: str) -> str:
        """Why the value that was given for an option is refused."""
        return f"{name} must be {allowed(self.options[name])}, got {shown(self.given.get(name))}"

    def check(self, name: str, value: object) -> None:
        """Refuses what jsonargparse lets through: a null in YAML for a value that is needed, a
        number that is not finite, and a text that no file can hold."""
        if value is None and NoneType not in get_args(self.options[name]):
            raise ValueError(self.explained(name))
        if isinstance(value, list | dict):
            for entry in value.values() if isinstance(value, dict) else value:
                self.check(name, entry)
        elif isinstance(value, int | float) and not abs(value) <= MOST:
            raise ValueError(f"{self.explained(name)} (at most {MOST:,} in size)")
        elif isinstance(value, str):
            if len(value) > MOST_TEXT or "\0" in value or not _is_utf8(value):
                raise ValueError(
                    f"{self.explained(name)} (at most {MOST_TEXT:,} characters that UTF-8 can hold)"
                )


def _is_utf8(text: str) -> bool:
    try:
        return text.encode("utf-8") is not None
    except UnicodeEncodeError:
        return False


def read_mapping(file: str) -> dict:
    """The mapping in a YAML file.

    Raises:
        ValueError: not a regular file, too large, not UTF-8, not YAML, nested too deep, an alias or
            a key that is there twice.
    """
    if not file or not os.path.exists(file) or not stat.S_ISREG(os.stat(file).st_mode):
        raise ValueError(f"config must be a YAML file that exists, got {shown(file)}")
    with open(file, "rb") as opened:
        content = opened.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"{file}: a YAML file of options has at most {MOST_BYTES:,} bytes")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: byte {error.start} is not UTF-8") from error
    try:
        found = load_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: {one_line(str(error))}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold sections of options, got {shown(found)}")
    return found


def load_yaml(text: str) -> object:
    """What a YAML text holds, as jsonargparse reads it: 1e-6 is a number there.

    Raises:
        yaml.YAMLError: whatever is wrong with the text.
    """
    try:
        _check_events(text)
        return jsonargparse.get_loader("yaml")(text)
    except ValueError as error:  # a number of thousands of digits
        raise yaml.YAMLError(str(error)) from error


def _check_events(text: str) -> None:
    """Refuses aliases, deep nesting, and keys that are there twice.

    An alias could stand for billions of entries, or for the very list that it is in.
    """
    names: list[set[str] | None] = []  # of each open mapping; None: a list
    key_next: list[bool] = []
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"line {line}: aliases are not allowed")
        if isinstance(event, yaml.CollectionEndEvent):
            names.pop(), key_next.pop()
        elif isinstance(event, yaml.NodeEvent):
            if names and names[-1] is not None:
                if key_next[-1] and isinstance(event, yaml.ScalarEvent):
                    if event.value in names[-1]:
                        raise yaml.YAMLError(f"line {line}: {shown(event.value)} is there twice")
                    names[-1].add(event.value)
                key_next[-1] = not key_next[-1]
            if isinstance(event, yaml.CollectionStartEvent):
                names.append(set() if isinstance(event, yaml.MappingStartEvent) else None)
                key_next.append(True)
        if len(names) > MOST_DEPTH:
            raise yaml.YAMLError(f"line {line}: nested more than {MOST_DEPTH} deep")
