"""The same photo twice: under two labels, or to learn from and held out, by what its file holds."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b

from tercet.core.data.cells import cell_bytes, table_of
from tercet.core.types import Photo

CHUNK = 1 << 20


def find_copies(keys: Iterable[str]) -> list[list[str]]:
    """Groups of photos whose files hold the same bytes, each in the order of the keys.

    Only files of equal size are read, and cells of tables.

    Args:
        keys: image keys.
    """
    by_size: dict[int, list[str]] = defaultdict(list)
    for key in dict.fromkeys(keys):
        size = len(cell_bytes(key)) if table_of(key) else os.stat(key).st_size
        by_size[size].append(key)
    alike = [key for same in by_size.values() if len(same) > 1 for key in same]
    by_content: dict[bytes, list[str]] = defaultdict(list)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for key, content in zip(alike, pool.map(content_digest, alike), strict=True):
            by_content[content].append(key)
    return [group for group in by_content.values() if len(group) > 1]


def content_digest(key: str) -> bytes:
    """Digest of what a photo's file, or its cell of a table, holds."""
    found = blake2b(digest_size=16)
    if table_of(key):
        found.update(cell_bytes(key))
        return found.digest()
    with open(key, "rb") as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
    return found.digest()


def spoilt_tests(
    learnt: Iterable[Photo], held_out: Iterable[Photo], paths: dict[str, str]
) -> tuple[set[str], list[str]]:
    """Held-out photos that must not be tested on, and a line about each group of copies.

    A held-out photo is spoilt if a copy of it is learnt from, or bears another label.

    Args:
        learnt: photos of TAPO and stage 1.
        held_out: photos of the tests.
        paths: files of the photos, by image key.
    """
    learnt = {photo.image: photo for photo in learnt}
    tests = {photo.image: photo for photo in held_out}
    photos = learnt | tests
    by_path = {paths[key]: key for key in photos}
    spoilt: set[str] = set()
    lines = []
    for group in find_copies(by_path):
        keys = [by_path[path] for path in group]
        names = sorted({f"{photos[k].super_category}/{photos[k].sub_category}" for k in keys})
        both = any(key in learnt for key in keys) and any(key in tests for key in keys)
        if len(names) == 1 and not both:
            continue
        dropped = [key for key in keys if key in tests and key not in learnt]
        spoilt.update(dropped)
        what = f"under the labels {', '.join(names)}" if len(names) > 1 else "learnt and held out"
        left = f"; {len(dropped)} left out of the tests" if dropped else ""
        lines.append(f"one photo {what}: {' = '.join(sorted(keys)[:4])}{left}")
    return spoilt, lines
