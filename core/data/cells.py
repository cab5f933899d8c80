"""Photos in cells of Parquet and Arrow files: a column of one part is read at a time, and kept."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tercet.core.data.files import regular

CACHE_BYTES = 2 * 1024**3
OPEN_FILES = 64


class RowGroups:
    """Columns of row groups or record batches, the most recently used ones kept; threads may
    share it.

    Args:
        cache_bytes: most bytes that are kept; the newest column is kept in any case.
    """

    def __init__(self, cache_bytes: int = CACHE_BYTES):
        self._lock = threading.Lock()
        self._cache_bytes = cache_bytes
        self._used_bytes = 0
        self._kept: OrderedDict[tuple[str, str, int], pa.ChunkedArray] = OrderedDict()

    def cell(self, path: str, column: str, row: int) -> object:
        """What a cell holds, as a Python value.

        Raises:
            OSError, KeyError, IndexError, ValueError, pa.ArrowException: there is no such cell.
        """
        with self._lock:
            read, ends = _open(path)
            if not 0 <= row < ends[-1]:
                raise IndexError(f"row {row} of {ends[-1]}")
            group = bisect_right(ends, row)
            key = (path, column, group)
            if key not in self._kept:
                self._keep(key, read(group, column))
            self._kept.move_to_end(key)
            values = self._kept[key]
        return values[row - (ends[group - 1] if group else 0)].as_py()

    def _keep(self, key: tuple[str, str, int], values: pa.ChunkedArray) -> None:
        self._kept[key] = values
        self._used_bytes += values.nbytes
        while self._used_bytes > self._cache_bytes and len(self._kept) > 1:
            self._used_bytes -= self._kept.popitem(last=False)[1].nbytes


ROW_GROUPS = RowGroups()


@lru_cache(maxsize=OPEN_FILES)
def _open(path: str) -> tuple[Callable[[int, str], pa.ChunkedArray], list[int]]:
    """What reads a column of one part of a file, and the row that follows each of its parts."""
    regular(path)
    if path.endswith(".arrow"):
        table = arrow_table(path)
        batches = table.to_batches()
        ends = list(accumulate(batch.num_rows for batch in batches))
        return lambda part, name: pa.chunked_array([batches[part].column(name)]), ends or [0]
    file = pq.ParquetFile(path, memory_map=True)
    groups = (file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
    return (
        lambda part, name: file.read_row_group(part, columns=[name]).column(name),
        list(accumulate(groups)) or [0],
    )


def arrow_table(path: str) -> pa.Table:
    """The table of an Arrow stream, as `datasets` writes them; its cells stay on the disk.

    Raises:
        OSError, pa.ArrowException: it is none, or damaged.
    """
    with pa.memory_map(path) as source, pa.ipc.open_stream(source) as stream:
        table = stream.read_all()
    table.validate(full=True)  # a wrong offset would be read without a check
    return table


def table_of(key: str) -> str | None:
    """The Parquet or Arrow file in which an image key names a cell; None for a photo's own file."""
    file = key.rpartition("#")[0]
    return file if file.endswith((".parquet", ".arrow")) else None


def cell_bytes(key: str) -> bytes:
    """The encoded photo that `file.parquet#row/column/index` names, or the same of an Arrow file.

    A cell holds one photo or a list; a photo is bytes, a path from the file's folder, or a struct
    of both.

    Raises:
        ValueError: there is none.
    """
    path, _, cell = key.rpartition("#")
    try:
        row, column, index = cell.split("/")
        if int(index) < 0:
            raise IndexError("row and index count from 0")
        value = ROW_GROUPS.cell(path, column, int(row))
        value = (value if isinstance(value, list) else [value])[int(index)]
        value = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
        if not value:
            raise ValueError("the cell is empty")
        if isinstance(value, bytes):
            return value
        beside = Path(path).parent.joinpath(value)
        regular(beside)
        return beside.read_bytes()
    except (OSError, KeyError, IndexError, TypeError, ValueError, pa.ArrowException) as error:
        raise ValueError(str(error)) from error
