"""JSON and CSV files and the fields of their records; errors name file, line and field.

`where` is everywhere the place that an error names, such as `photos.jsonl:3`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import NoReturn, get_args

from tercet.core.data.files import check_text, read_bytes, shown
from tercet.core.types import Partition

MAX_JSON_BYTES = 2**30
"""Of a file; a manifest takes about 1,000 bytes an anchor."""
MAX_CSV_BYTES = 2**28


def load_json(path: Path):
    """The content of a JSON file.

    Raises:
        ValueError: naming the file, and the line where the JSON is malformed.
    """
    content = read_bytes(path, MAX_JSON_BYTES)
    try:
        return _parse(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: malformed JSON: {error.msg}") from error
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def json_lines(
    path: Path, on_half_line: Callable[[str], None] | None = None
) -> Iterator[tuple[str, dict]]:
    """The objects of a JSON Lines file, each with its place `file:line`; empty lines are skipped.

    Args:
        path: the file.
        on_half_line: called with the place of a last line that breaks off, as a killed writer
            leaves it. None: it is an error as any other.

    Raises:
        ValueError: naming file and line of what is not a JSON object.
    """
    lines = read_bytes(path, MAX_JSON_BYTES).removeprefix(b"\xef\xbb\xbf").splitlines(True)
    for number, line in enumerate(lines, start=1):
        if on_half_line and not line.endswith((b"\n", b"\r")) and _is_half(line):
            on_half_line(f"{path}:{number}")
            return
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            record = _parse(line.decode())
        except ValueError as error:
            raise ValueError(f"{where}: malformed JSON line: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: a line must be a JSON object, got {shown(record)}")
        yield where, record


def _is_half(line: bytes) -> bool:
    try:
        _parse(line.decode())
    except ValueError:
        return True
    return False


def csv_rows(path: Path, needed: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a CSV file in UTF-8 with a line of column names, each with its `file:line`.

    Args:
        path: the file.
        needed: columns that it must have.

    Raises:
        ValueError: naming the file, or file and line, at fault.
    """
    try:
        text = read_bytes(path, MAX_CSV_BYTES).decode("utf-8-sig")
        rows = csv.DictReader(StringIO(text, newline=""), strict=True)
        columns = rows.fieldnames or []
        if missing := [name for name in needed if name not in columns]:
            raise ValueError(f"{path} has no column {missing[0]!r}; needed: {', '.join(needed)}")
        for row in rows:
            if None in row:
                raise ValueError(f"{path}:{rows.line_num}: more cells than {len(columns)} columns")
            yield f"{path}:{rows.line_num}", row
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _parse(text: str):
    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON number")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def text_of(record: object, field: str, where: str) -> str:
    """A field that must hold a text as `check_text` allows; ValueError for anything else."""
    value = record.get(field) if isinstance(record, dict) else None
    return check_text(value, f"{where}: {field!r}")


def texts_of(record: object, field: str, where: str, what: str = "names") -> tuple[str, ...]:
    """A field that must hold a list of at least one such text; ValueError for anything else."""
    values = record.get(field) if isinstance(record, dict) else None
    if not isinstance(values, list) or not values:
        raise ValueError(f"{where}: {field!r} must be a list of {what}, got {shown(values)}")
    return tuple(check_text(v, f"{where}: {field!r}[{i}]") for i, v in enumerate(values))


def choice_of(record: object, field: str, allowed: tuple[str, ...], where: str) -> str:
    """A field that must hold one of the allowed texts; ValueError for anything else."""
    value = record.get(field) if isinstance(record, dict) else None
    if value not in allowed:
        raise ValueError(f"{where}: {field!r} must be {' or '.join(allowed)}, got {shown(value)}")
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
