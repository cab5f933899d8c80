"""Files from outside: regular ones only, read up to a limit, and text that a prompt can hold."""

from __future__ import annotations

import os
import re
import reprlib
import stat
from pathlib import Path

import yaml

from tercet.core.prompts import IMAGE_MARKER

CONTROL_TOKENS = re.compile(
    r"<\|(?:im_start|im_end|endoftext|vision_start|vision_end|vision_pad|image_pad|video_pad)\|>"
)
"""Tokens that shape a prompt; in a text they would end its turn or stand for a photo."""


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 200
_short.maxlist = _short.maxtuple = _short.maxdict = 6


def shown(value: object) -> str:
    """A value as an error message shows it: like `repr`, cut to a line."""
    return _short.repr(value)


def regular(path: str | Path) -> int:
    """Size in bytes of a regular file: a pipe would block and a device need not end.

    Raises:
        OSError: there is no such file.
        ValueError: it is something else.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is not a regular file")
    return found.st_size


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        ValueError: naming the file, and the limit if it is larger.
    """
    try:
        size = regular(path)
        if size <= limit:
            with open(path, "rb") as file:
                content = file.read(limit + 1)  # it may grow, and /proc gives sizes of 0
            size = len(content)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if size > limit:
        raise ValueError(f"{path} cannot be read: it is larger than {limit:,} bytes")
    return content


def read_yaml(path: Path, limit: int, loader: type[yaml.Loader | yaml.SafeLoader]):
    """The content of a YAML file without aliases, which a few lines of can blow up a parser.

    Args:
        path: a regular file in UTF-8.
        limit: most bytes.
        loader: of PyYAML; BaseLoader leaves every scalar a text.

    Raises:
        ValueError: naming the file and what is wrong.
    """

    class NoAliases(loader):
        def compose_node(self, parent, index):
            if self.check_event(yaml.AliasEvent):
                mark = self.peek_event().start_mark
                raise yaml.YAMLError(f"line {mark.line + 1}: aliases (*name) are not allowed")
            return super().compose_node(parent, index)

    try:
        return yaml.load(read_bytes(path, limit).decode("utf-8-sig"), NoAliases)
    except RecursionError:
        raise ValueError(f"{path} cannot be read: it is nested too deeply") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        message = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read: {message}") from error


def check_text(text: object, what: str, markers: bool = False) -> str:
    """A text that a prompt, a file or a log can hold; returned as it is.

    Args:
        text: to be checked.
        what: its place and name, which an error begins with.
        markers: whether it may hold `<image>`.

    Raises:
        ValueError: no text, a blank one, or one with surrogates, control tokens or markers.
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{what} must be a text, got {shown(text)}")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{what} holds {text[error.start]!r}, half a character: {shown(text)}"
            ) from None
    if found := CONTROL_TOKENS.search(text):
        raise ValueError(
            f"{what} must not hold {found.group()}, a token that shapes prompts: {shown(text)}"
        )
    if not markers and IMAGE_MARKER in text:
        raise ValueError(f"{what} must not hold {IMAGE_MARKER}: {shown(text)}")
    return text
