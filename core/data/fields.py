"""JSON files and the fields of their records; errors name file, line and field.

`where` is everywhere the place that an error names, such as `photos.jsonl:3`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from tercet.core.types import Partition


def load_json(path: Path):
    """The content of a JSON file.

    Raises:
        ValueError: naming the file, and the line where the JSON is malformed.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: malformed JSON: {error.msg}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """The objects of a JSON Lines file, each with its place `file:line`; empty lines are skipped.

    Raises:
        ValueError: naming file and line of what is not a JSON object.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: malformed JSON line: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: a line must be a JSON object, got {record!r}")
        yield where, record


def text_of(record: object, field: str, where: str) -> str:
    """A field that must hold a text that is not blank; ValueError for anything else."""
    value = record.get(field) if isinstance(record, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {field!r} must be a text, got {value!r}")
    return value


def choice_of(record: object, field: str, allowed: tuple[str, ...], where: str) -> str:
    """A field that must hold one of the allowed texts; ValueError for anything else."""
    value = record.get(field) if isinstance(record, dict) else None
    if value not in allowed:
        raise ValueError(f"{where}: {field!r} must be {' or '.join(allowed)}, got {value!r}")
    return value


def has_partition(record: dict) -> bool:
    """Whether a record says to which partition it belongs."""
    return "partition" in record or "world" in record


def partition_of(record: dict, where: str) -> Partition:
    """A record's `partition`, which older files call `world`; ValueError for another value."""
    field = "world" if "world" in record and "partition" not in record else "partition"
    return choice_of(record, field, get_args(Partition), where)


def as_words(name: str) -> str:
    """A name with `_` and any white space as single spaces."""
    return " ".join(name.replace("_", " ").split())
