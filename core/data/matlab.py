"""MATLAB files from outside, of version 5 as data sets ship them, limited in unpacked size too."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np

from tercet.core.data.files import read_bytes

MAX_BYTES = 2**24
MAX_UNPACKED = 2**26
HEADER = b"MATLAB 5.0 MAT-file"
_COMPRESSED = 15


def read_mat(path: Path) -> dict[str, np.ndarray]:
    """The variables of a MATLAB file, dimensions of 1 left out; structs have named fields.

    Raises:
        ValueError: naming the file, where it is larger than MAX_BYTES or MAX_UNPACKED, no file of
            version 5, or damaged.
    """
    from scipy.io import loadmat  # 0.2 s, which commands without such files need not wait for

    content = read_bytes(path, MAX_BYTES)
    if not content.startswith(HEADER) or len(content) < 128:
        raise ValueError(f"{path} cannot be read: it is no MATLAB file of version 5")
    try:
        _check_unpacked(content)
        found = loadmat(BytesIO(content), squeeze_me=True)
    except Exception as error:  # a damaged file makes scipy raise whatever its bytes lead to
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    return {name: value for name, value in found.items() if not name.startswith("__")}


def column(variables: dict[str, np.ndarray], name: str, path: Path, field: str = "") -> np.ndarray:
    """A variable, or a field of a variable that is a list of structs, as a 1-D array.

    Raises:
        ValueError: naming the file and what it lacks: it may be another release.
    """
    found = variables.get(name)
    if found is None:
        others = ", ".join(sorted(variables)) or "nothing"
        raise ValueError(f"{path} holds no {name!r}, but {others}: is it of another release?")
    found = np.atleast_1d(found)
    if field:
        if field not in (found.dtype.names or ()):
            fields = ", ".join(found.dtype.names or ["none"])
            raise ValueError(f"{path}: {name!r} has no field {field!r}; its fields: {fields}")
        found = found[field]
    if found.ndim != 1:
        raise ValueError(f"{path}: {name!r} must be a list, got {found.ndim} dimensions")
    return found


def _check_unpacked(content: bytes) -> None:
    """Raises ValueError where compressed variables take more than MAX_UNPACKED bytes in all."""
    order = "<" if content[126:128] == b"IM" else ">"
    place, left = 128, MAX_UNPACKED
    while place + 8 <= len(content):
        kind, size = struct.unpack_from(f"{order}II", content, place)
        if kind == _COMPRESSED:
            packed = content[place + 8 : place + 8 + size]
            left -= len(zlib.decompressobj().decompress(packed, left + 1))
            if left < 0:
                raise ValueError(f"it is larger than {MAX_UNPACKED:,} bytes unpacked")
        place += 8 + size
