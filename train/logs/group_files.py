"""The files of logged groups: groups/step_000012.jsonl.gz holds a JSON object a line, one a group.

step, id, kept, why, super_category, question
photos, names   of anchor, positive and negative; photos are keys relative to triplets.json's
                `root`, and the negative's name is empty where it is not known
responses       role, text, tokens (the text of each), reward, metrics, advantage (null: the
                group was dropped), finish_reason, weight_version, and a log-prob a token as
                float16 in base64, or null: logprobs and neg_logprobs (of the update, on its
                photo and on the negative), old_logprobs, rollout_logprobs
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import zlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np

from tercet.core.data.files import read_bytes

GROUPS, ENDING = "groups", ".jsonl.gz"
MOST_BYTES, MOST_UNPACKED = 256 << 20, 1 << 30
"""Of a file, as it is and unpacked."""


def packed(values: Sequence[float] | None) -> str | None:
    """Numbers as float16 in base64."""
    if values is None:
        return None
    return base64.b64encode(np.asarray(values, dtype="<f2").tobytes()).decode()


def write_groups(folder: Path, step: int, lines: Sequence[dict]) -> None:
    """Write the file of a step, whole or not at all."""
    file = folder / f"step_{step:06d}{ENDING}"
    partial = file.with_name(f".{file.name}.partial")
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    folder.mkdir(exist_ok=True)
    content = text.encode("utf-8", errors="backslashreplace")
    partial.write_bytes(gzip.compress(content, 6, mtime=0))
    os.replace(partial, file)


def read_groups(file: Path) -> tuple[list[dict], str]:
    """The groups of a file, and what is wrong with the rest of it; empty where nothing is."""
    lines: list[dict] = []
    try:
        with gzip.open(BytesIO(read_bytes(file, MOST_BYTES))) as unpacked:
            content = unpacked.read(MOST_UNPACKED)
    except (ValueError, OSError, EOFError, zlib.error) as error:
        return lines, f"{file.name} cannot be read: {error}"
    for number, line in enumerate(content.splitlines(), 1):
        try:
            group = json.loads(line)
        except (ValueError, RecursionError):
            return lines, f"{file.name}, line {number}: not a JSON object"
        lines.append(group)
    return lines, ""


def step_files(folder: Path) -> dict[int, Path]:
    """The files of a folder of groups by step, ascending."""
    files = {file.name[5:11]: file for file in folder.glob(f"step_??????{ENDING}")}
    return {int(number): files[number] for number in sorted(files) if number.isdigit()}


def thin_out(folder: Path, most_bytes: int) -> None:
    """Remove every second file of the older half, again and again, until the rest fits."""
    files = list(step_files(folder).values())
    sizes = {file: file.stat().st_size for file in files}
    while len(files) > 1 and sum(sizes[file] for file in files) > most_bytes:
        older = files[: max(2, len(files) // 2)]
        for file in older[::2]:
            file.unlink()
        files = [*older[1::2], *files[len(older) :]]
