"""Types of options that jsonargparse lacks: numbers between two bounds, and texts of one form.

`allowed` says in words what an option's type admits; the docstring of each type here is that text.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import typing as number_types
from jsonargparse.typing import extend_base_type, restricted_number_type

PER_STEP = 1_000_000
"""Most groups, samples or requests of a step: all of them are in memory at once."""

_NUMBERS = {
    int: "a whole number",
    float: "a number",
    number_types.PositiveInt: "a whole number of at least 1",
    number_types.NonNegativeInt: "a whole number of at least 0",
    number_types.PositiveFloat: "a number above 0",
    number_types.NonNegativeFloat: "a number of at least 0",
}


def allowed(hint: Any) -> str:
    """What the type of an option admits, in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin in (Union, UnionType):
        return ", or ".join("null" if part is NoneType else allowed(part) for part in inner)
    if origin is dict:
        return f"a mapping, each value {allowed(inner[1])}"
    if origin is list:
        return f"a list, each entry {allowed(inner[0])}"
    words = {**_NUMBERS, bool: "true or false", str: "text"}
    return words[hint] if hint in words else hint.__doc__


def _whole(name: str, low: int, high: int):
    bounds = [(">=", low), ("<=", high)]
    text = f"a whole number from {low} to {high:,}"
    return restricted_number_type(name, int, bounds, docstring=text)


def _text(name: str, text: str, holds: Callable[[str], object], clean: Callable[[str], str] = str):
    """A type of texts: what `clean` makes of a value must satisfy `holds`."""

    def check(_, value: object) -> None:
        if not isinstance(value, str) or not holds(clean(value)):
            raise ValueError(f"must be {text}")

    return extend_base_type(
        name,
        str,
        check,
        docstring=text,
        register_key=(name, str),
        extra_attrs={"_type": staticmethod(clean)},
    )


def _expanded(path: str) -> str:
    return str(os.path.expanduser(path))


def _is_path(path: str) -> bool:
    """A `~` that is left at the beginning names a user who is not known."""
    if path and not path.strip():
        return False
    return len(os.fsencode(path)) < 4096 and not path.startswith("~") and "\n" not in path


def _is_regex(text: str) -> bool:
    try:
        return re.compile(text) is not None
    except (re.error, OverflowError, RecursionError):
        return False


def _is_command_line(text: str) -> bool:
    try:
        return shlex.split(text) is not None
    except ValueError:
        return False


_HOST = r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?)"
_PORT = r"(:([1-9]\d{0,3}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d\d|655[0-2]\d|6553[0-5]))"
_GPU = r"(\d{1,3}|(GPU|MIG)-[0-9A-Za-z/-]+)"


def _matches(pattern: str) -> Callable[[str], object]:
    return re.compile(pattern, re.ASCII).fullmatch


PerStep = _whole("PerStep", 1, PER_STEP)
Few = _whole("Few", 1, 10_000)
FewOrNone = _whole("FewOrNone", 0, 10_000)
Bits = _whole("Bits", 0, 64)
Choices = _whole("Choices", 0, 26)  # letters
Threads = _whole("Threads", 1, 1024)
Port = _whole("Port", 0, 65_535)
Seed = _whole("Seed", 0, 2**32 - 1)  # as far as numpy's seeds go
Share = restricted_number_type(
    "Share", float, [(">", 0), ("<=", 1)], docstring="a number above 0 and at most 1"
)
Decay = restricted_number_type(
    "Decay", float, [(">=", 0), ("<", 1)], docstring="a number of at least 0 and below 1"
)
Epsilon = restricted_number_type(  # a smaller one is 0 in float32
    "Epsilon", float, [(">=", 1e-30), ("<=", 1)], docstring="a number from 1e-30 to 1"
)
Temperature = restricted_number_type(
    "Temperature", float, [(">=", 0.001), ("<=", 1000)], docstring="a number from 0.001 to 1000"
)
TemperatureOrZero = restricted_number_type(
    "TemperatureOrZero", float, [(">=", 0), ("<=", 1000)], docstring="a number from 0 to 1000"
)
Seconds = restricted_number_type(  # sockets count milliseconds in 31 bits
    "Seconds", float, [(">", 0), ("<=", 1e6)], docstring="a number above 0 and at most 1,000,000"
)
Word = _text("Word", "a text that is not empty", str.strip)
PathText = _text(
    "PathText",
    "a path of at most 4,095 bytes (~ and ~user are home folders)",
    lambda path: path and _is_path(path),
    _expanded,
)
PathOrEmpty = _text("PathOrEmpty", f"empty, or {PathText.__doc__}", _is_path, _expanded)
Device = _text(
    "Device",
    "'auto', 'cpu', 'cuda' or 'cuda:0', 'cuda:1' ...",
    _matches(r"auto|cpu|cuda(:\d{1,3})?"),
)
Url = _text(
    "Url",
    "an address such as 'http://host:30000'",
    _matches(rf"https?://{_HOST}{_PORT}?(/[!-~]*)?"),
)
Host = _text("Host", "a host name or an IP address", _matches(rf"{_HOST}|[0-9a-fA-F:.]+"))
Gpus = _text("Gpus", "GPUs such as '0' or '2,3', or empty", _matches(rf"({_GPU}(,{_GPU})*)?"))
Flags = _text("Flags", "flags as on a command line, quotes closed", _is_command_line)
Regex = _text("Regex", "a regular expression", lambda text: text and _is_regex(text))
