"""Checkpoints that are either whole or not there, and finding one to resume from.

    <out>/checkpoints/step_000020/   a Hugging Face folder, and in it
        sharded/                     optimiser states, each rank's own (see saving.py)
        trainer_state.pt             random numbers, data position, carried groups
        complete.json                size and CRC-32 of every other file, written last

A checkpoint is written in a hidden folder beside its place and renamed when everything is on disk.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from tercet.core.types import Group, Response, Triplet

STATE = "trainer_state.pt"
COMPLETE = "complete.json"
STATE_TYPES = [Group, Response, Triplet]
"""What a trainer state may hold beside tensors and plain Python values."""


def save_checkpoint(
    out: Path | str,
    step: int,
    save_model: Callable[[Path], None],
    state: dict,
    keep_last: int,
    best: int | None = None,
) -> Path:
    """Writes the checkpoint of a step, then removes those written longest ago.

    Whenever it is interrupted, the previous checkpoints can be found and are whole; what it left
    is removed by the next call.

    Args:
        out: folder of the run.
        step: rollout steps done; a checkpoint of the same step is replaced.
        save_model: writes weights, config, tokenizer and image processor into a folder.
        state: plain values, tensors and the dataclasses of STATE_TYPES.
        keep_last: checkpoints kept, counted in the order in which they were written.
        best: step whose checkpoint is kept besides, however old.

    Returns:
        The folder.

    Raises:
        ValueError: keep_last below 1.
        TypeError: A type in `state` that `load_state` would refuse.
        OSError: The folder cannot be written, for instance because the disk is full.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last must be at least 1, got {keep_last}")
    root = checkpoints(out)
    folder = root / f"step_{step:06d}"
    partial, replaced = root / f".{folder.name}.partial", root / f".{folder.name}.replaced"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(root)
        _write(partial, step, save_model, state, 1 + max(_serials(root).values(), default=0))
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if found := disk_error(folder, error):
            raise found from error
        raise
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    _sync(root)
    shutil.rmtree(replaced, ignore_errors=True)
    serials = _serials(root)
    for old in sorted(serials, key=serials.get)[:-keep_last]:
        if best is None or old.name != f"step_{best:06d}":
            shutil.rmtree(old)
    return folder


def checkpoints(out: Path | str) -> Path:
    """The folder of a run's checkpoints."""
    return Path(out) / "checkpoints"


def disk_error(folder: Path, error: BaseException) -> OSError | None:
    """What to raise when `error` kept a checkpoint from the disk; None when it is of another kind.

    torch raises an error of its own on top of the operating system's, safetensors puts its number
    into the text.
    """
    cause: BaseException | None = error
    while cause is not None:
        found = re.search(r"os error (\d+)", str(cause))
        number = cause.errno if isinstance(cause, OSError) else found and int(found[1])
        if number:
            said = "could not be written, earlier ones are as they were"
            return OSError(number, f"checkpoint {folder} {said}: {os.strerror(number)}")
        cause = cause.__cause__ or cause.__context__
    return None


def find_checkpoint(out: Path | str, resume: Path | str) -> Path | None:
    """The checkpoint to resume from, every file of it checked.

    Args:
        out: folder of the run.
        resume: "auto" for the one written last that is whole, or the folder of a checkpoint.

    Returns:
        Its folder; None when "auto" finds none. A damaged one is passed over with a warning.

    Raises:
        ValueError: The folder named by `resume` is not a whole checkpoint.
    """
    if str(resume) != "auto":
        if problem := _problem(Path(resume)):
            raise ValueError(f"cannot resume from {resume}: {problem}")
        return Path(resume)
    root = checkpoints(out)
    serials = _serials(root)
    # One whose complete.json cannot be read may be the newest: it comes first, to be named.
    newest_first = sorted(
        _folders(root), key=lambda folder: (serials.get(folder, np.inf), folder.name), reverse=True
    )
    for folder in newest_first:
        problem = _problem(folder)
        if problem is None:
            return folder
        warnings.warn(f"checkpoint {folder} is passed over: {problem}", stacklevel=2)
    return None


def load_state(folder: Path | str) -> dict:
    """The trainer state of a checkpoint, tensors on the CPU; loads data only, never code.

    Raises:
        ValueError: No trainer state in the folder.
    """
    file = Path(folder) / STATE
    if not file.is_file():
        raise ValueError(f"{folder} holds no {STATE}: it is not a checkpoint of this trainer")
    with safe_globals(STATE_TYPES):
        return torch.load(file, map_location="cpu", weights_only=True)


def rng_state() -> dict:
    """States of the random numbers of torch (CPU and this process's GPU), numpy and Python."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": (name, keys.tolist(), *rest),
        "python": random.getstate(),
    }


def set_rng_state(state: dict) -> None:
    """Continues the random numbers where `rng_state` took them."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if (state["cuda"] is not None) != torch.cuda.is_available():
        warnings.warn(
            "the checkpoint is of a machine with another kind of device: GPU random numbers "
            "do not continue",
            stacklevel=2,
        )
    elif state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def _write(
    folder: Path, step: int, save_model: Callable[[Path], None], state: dict, serial: int
) -> None:
    """Fills a new folder; when this returns, everything in it is on disk."""
    folder.mkdir()
    save_model(folder)
    with open(folder / STATE, "wb") as file:
        torch.save(state, file)
    with safe_globals(STATE_TYPES):
        refused = get_unsafe_globals_in_checkpoint(str(folder / STATE))
    if refused:
        raise TypeError(
            f"the trainer state holds {', '.join(sorted(refused))}; allowed are plain values, "
            f"tensors and {', '.join(kind.__name__ for kind in STATE_TYPES)}"
        )
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "crc32": _crc32(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    text = json.dumps({"step": step, "serial": serial, "files": files}, indent=1)
    (folder / COMPLETE).write_text(text, encoding="utf-8")
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on disk."""
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


def _place(replaced: Path) -> Path:
    """Where a folder set aside by save_checkpoint belongs."""
    return replaced.with_name(replaced.name.removeprefix(".").removesuffix(".replaced"))


def _clear_leftovers(root: Path) -> None:
    """Removes what an interrupted save left; a checkpoint that it had set aside is put back."""
    for path in root.glob(".step_*.replaced"):
        if _place(path).exists():
            shutil.rmtree(path)
        else:
            path.rename(_place(path))
    for path in root.glob(".step_*.partial"):
        shutil.rmtree(path)


def _serials(root: Path) -> dict[Path, int]:
    """Order of writing of the checkpoints whose complete.json can be read."""
    completes = {folder: _complete(folder) for folder in _folders(root)}
    return {folder: complete["serial"] for folder, complete in completes.items() if complete}


def _folders(root: Path) -> list[Path]:
    """Every checkpoint, among them one set aside whose replacement never arrived."""
    folders = [path for path in root.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return folders + [p for p in root.glob(".step_*.replaced") if not _place(p).exists()]


def _complete(folder: Path) -> dict | None:
    """What complete.json says; None when it cannot be read."""
    try:
        complete = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    kinds = {"serial": int, "files": dict}
    if isinstance(complete, dict) and all(isinstance(complete.get(k), kinds[k]) for k in kinds):
        return complete
    return None


def _problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None when it is whole."""
    if not folder.is_dir():
        return "there is no such folder"
    if not (folder / COMPLETE).is_file():
        return f"it has no {COMPLETE}, so it was not written to the end or is no checkpoint"
    complete = _complete(folder)
    if complete is None:
        return f"its {COMPLETE} cannot be read"
    for name, expected in complete["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
        if _crc32(path) != expected["crc32"]:
            return f"the checksum of {name} does not match: its content has changed"
    return None
