"""complete.json: step, serial number, run and files of a checkpoint, all with checksums.

It is written last. A file that is sealed holds the CRC-32 of its own text, so that one flipped bit
anywhere in it is noticed.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

COMPLETE = "complete.json"
EARLIER = {"step", "serial", "files"}
"""Keys of a complete.json that an earlier version wrote, which did not seal it."""
KEYS = EARLIER | {"identity", "checksum"}
UNKNOWN = "00000000"


def seal(content: dict) -> str:
    """JSON with one key more, `checksum`: the CRC-32 of the text with eight zeros in its place."""
    text = json.dumps(content | {"checksum": UNKNOWN}, indent=1)
    return _with_checksum(text, UNKNOWN, f"{zlib.crc32(text.encode()):08x}")


def unseal(raw: bytes) -> dict | None:
    """The JSON object in a sealed text, with its checksum; None when anything in it has changed."""
    content = _json_object(raw)
    checksum = (content or {}).get("checksum")
    if not isinstance(checksum, str) or len(checksum) != len(UNKNOWN):
        return None
    text = _with_checksum(raw.decode(), checksum, UNKNOWN)
    return content if f"{zlib.crc32(text.encode()):08x}" == checksum else None


def _with_checksum(text: str, old: str, new: str) -> str:
    before, key, after = text.rpartition(f'"checksum": "{old}"')
    return before + key.replace(old, new) + after


def _json_object(raw: bytes) -> dict | None:
    try:
        content = json.loads(raw.decode())
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def write_complete(folder: Path, step: int, serial: int, identity: dict | None) -> None:
    """Write complete.json; then everything in the folder is on disk."""
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "crc32": _crc32(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    content = {"step": step, "serial": serial, "identity": identity, "files": files}
    (folder / COMPLETE).write_text(seal(content), encoding="utf-8")
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _crc32(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def read_complete(folder: Path) -> dict | None:
    """What complete.json says; None when it cannot be read or is damaged."""
    try:
        raw = (folder / COMPLETE).read_bytes()
    except OSError:
        return None
    return complete_in(raw)


def complete_in(raw: bytes) -> dict | None:
    """What the bytes of a complete.json say; None when they are damaged."""
    complete = _json_object(raw) or {}
    if complete.keys() != (KEYS if "checksum" in complete else EARLIER):
        return None
    if "checksum" in complete and unseal(raw) is None:
        return None
    if type(complete["step"]) is not int or type(complete["serial"]) is not int:
        return None
    files = complete["files"]
    return complete if isinstance(files, dict) and all(map(_is_entry, files.values())) else None


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and entry.keys() == {"size", "crc32"}
        and all(type(number) is int for number in entry.values())
    )


def problem_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None when it is whole."""
    if not folder.is_dir():
        return "there is no such folder"
    if not (folder / COMPLETE).is_file():
        return f"it has no {COMPLETE}, so it was not written to the end or is no checkpoint"
    complete = read_complete(folder)
    if complete is None:
        return f"its {COMPLETE} cannot be read"
    for name, expected in complete["files"].items():
        try:
            if problem := _problem_of_file(folder / name, name, expected):
                return problem
        except (OSError, ValueError) as error:  # a failing disk; a name that no file can have
            return f"{name!r} cannot be read: {error}"
    return None


def _problem_of_file(path: Path, name: str, expected: dict[str, int]) -> str | None:
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != expected["size"]:
        return f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
    if _crc32(path) != expected["crc32"]:
        return f"the checksum of {name} does not match: its content has changed"
    return None
