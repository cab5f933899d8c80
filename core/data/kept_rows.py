"""Rows of numbers that took long to make, kept in an SQLite file and found again by an id."""

from __future__ import annotations

import os
import sqlite3
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

LOCK_TIMEOUT_S = 60.0
CACHE = "TERCET_CACHE"
"""Environment variable: the folder that keeps such files; else `tercet` in the user's cache."""


def cache_folder() -> Path | None:
    """The folder of CACHE; None, with a warning, where it cannot be written."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get(CACHE) or Path(home) / "tercet")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    warnings.warn(
        f"{folder} cannot be written, embeddings and checks of photos are not kept: {CACHE} names "
        "another folder",
        stacklevel=3,
    )
    return None


def kept_rows(
    file: Path,
    ids: Sequence[bytes],
    make: Callable[[list[int]], np.ndarray],
    at_once: int,
) -> Iterator[np.ndarray]:
    """Rows by id, a batch at a time: from the file where it has them, else made and kept there.

    Args:
        file: made where there is none; several processes may use it.
        ids: of the rows that are wanted; the same id stands for the same row.
        make: places in `ids` to [N, D] float32.
        at_once: rows of a batch.

    Yields:
        [N, D] float32 for each batch, in the order of the ids.

    Raises:
        ValueError: the file is no database, or another process writes to it for too long.
    """
    try:
        with closing(sqlite3.connect(file, timeout=LOCK_TIMEOUT_S)) as store:
            store.execute("CREATE TABLE IF NOT EXISTS kept (id BLOB PRIMARY KEY, row BLOB)")
            for start in range(0, len(ids), at_once):
                yield _batch(store, ids, range(start, min(start + at_once, len(ids))), make)
    except sqlite3.Error as error:
        raise ValueError(f"{file} cannot be used: {error}; it may be removed") from error


def _batch(
    store: sqlite3.Connection,
    ids: Sequence[bytes],
    places: range,
    make: Callable[[list[int]], np.ndarray],
) -> np.ndarray:
    wanted = {ids[place]: place for place in places}
    marks = ",".join("?" * len(wanted))
    rows = store.execute(f"SELECT id, row FROM kept WHERE id IN ({marks})", list(wanted))
    known = {id_: np.frombuffer(row, np.float32) for id_, row in rows}
    missing = {id_: place for id_, place in wanted.items() if id_ not in known}
    if missing:
        fresh = dict(zip(missing, make(list(missing.values())), strict=True))
        with store:
            store.executemany(
                "INSERT OR REPLACE INTO kept VALUES (?, ?)",
                [(id_, row.tobytes()) for id_, row in fresh.items()],
            )
        known |= fresh
    return np.stack([known[ids[place]] for place in places])
