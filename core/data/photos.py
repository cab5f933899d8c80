"""Labelled photos: read from a folder or a JSON Lines file, and checked.

Pixels are never kept: a photo is carried by its key and decoded where it is needed. Every photo is
checked while reading, though, so that a bad file is named before the first step.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import PIL

from tercet.core.data import decoding
from tercet.core.data.cells import table_of
from tercet.core.data.copies import content_digest
from tercet.core.data.fields import (
    as_words,
    choice_of,
    has_partition,
    json_lines,
    load_json,
    partition_of,
    text_of,
)
from tercet.core.data.files import regular
from tercet.core.data.folder_names import read_names
from tercet.core.data.kept_rows import cache_folder, kept_rows
from tercet.core.data.labelled_tables import read_tables, table_files
from tercet.core.data.layouts import Split, read_layout
from tercet.core.data.photo_table import read_photo_table
from tercet.core.data.vision import check_image
from tercet.core.names import refuse_alike
from tercet.core.types import Partition, Photo

OnBadImage = Literal["error", "skip"]
CHECKED_AT_ONCE = 256
"""Verdicts on files that are written at once."""
MOST_DIGESTED = 2**26
"""Bytes; larger files are checked each time."""


@dataclass(frozen=True)
class PhotoSet:
    """Labelled photos of one folder or JSON Lines file."""

    root: str
    """Folder of the photos; draws use their paths relative to it."""
    photos: list[Photo]
    """Sorted by super-category, sub-category and key."""
    skipped: list[str]
    """Bad photos that were left out, with the reason."""
    partitions: dict[tuple[str, str], Partition] | None = None
    """Seen or unseen, for each (super-category, sub-category); None: still to be drawn."""
    splits: dict[str, Split] | None = None
    """Split by image key, "stage1" where stage 1 uses the photo already; None: still to be
    drawn."""
    notes: list[str] = field(default_factory=list)
    """What was made of folders' names, and which files are no photos, a line each."""


def read_photos(
    path: str | Path,
    on_bad_image: OnBadImage = "error",
    names: str | Path | None = None,
    super_category: str | None = None,
) -> PhotoSet:
    """Read labelled photos from a folder or a JSON Lines file.

    A folder holds `<super_category>/<sub_category>/<photo>`, perhaps with train, valid and test
    folders on the way (see core.data.layouts). If it has a manifest.json with the
    lists `classes` (super_category, sub_category, partition) and `images` (path, super_category,
    sub_category, split), exactly the images of those classes are read; their paths are relative to
    its `root`, itself relative to the folder, or to the folder without one. A line of JSON Lines is
    {"image", "super_category", "sub_category", "question"?}; paths are relative to the file. A CSV
    table is read by core.data.photo_table, a folder of `datasets` or a Parquet file of photos and
    labels by core.data.labelled_tables.

    Args:
        path: the folder, or a file ending in .jsonl, .csv or .parquet.
        on_bad_image: "error" raises for a bad photo, "skip" leaves it out and lists it.
        names: JSON or YAML of names by folder (see `read_names`); None: the folders' own.
        super_category: what all photos show, for a folder `<sub_category>/<photo>` or a CSV table.

    Returns:
        The photos in an order that does not depend on the file system, `_` in names as a space.

    Raises:
        ValueError: naming the folder, file and line, or photo at fault.
    """
    path = Path(os.path.abspath(path))
    root, partitions, splits, notes = path, None, None, []
    listing = _read_listing(path / "manifest.json") if path.is_dir() else None
    is_csv, tables = path.suffix == ".csv" and path.is_file(), not listing and table_files(path)
    may_name = path.is_dir() or tables
    if (names or super_category) and (listing or not (may_name or is_csv and not names)):
        option = "names" if names else "super_category"
        raise ValueError(f"data.{option} is for folders of photos by sub-category, not for {path}")
    if listing:
        root, photos, partitions, splits = listing
    elif may_name:
        root, read = path if path.is_dir() else path.parent, read_tables if tables else read_layout
        layout = read(path, None if names is None else read_names(names), super_category)
        photos, splits, notes = layout.photos, layout.splits, layout.notes
    elif path.suffix == ".jsonl":
        root, photos = path.parent, list(_read_photo_lines(path))
    elif is_csv:
        root = path.parent
        photos, splits = read_photo_table(path, super_category)
    else:
        raise ValueError(
            f"{path}: no such folder, nor a .jsonl file of photos, nor a .csv table of them"
        )
    if not photos:
        raise ValueError(f"{path} holds no photos")
    refuse_alike({(p.super_category, p.sub_category) for p in photos}.union(partitions or ()), path)
    photos.sort(key=lambda photo: (photo.super_category, photo.sub_category, photo.image))
    bad = check_images([photo.image for photo in photos], on_bad_image)
    photos = [photo for photo in photos if photo.image not in bad]
    if not photos:
        raise ValueError(f"{path}: all {len(bad)} photos are bad: {next(iter(bad.values()))}")
    return PhotoSet(str(root), photos, list(bad.values()), partitions, splits, notes)


def check_images(keys: Iterable[str], on_bad_image: OnBadImage = "error") -> dict[str, str]:
    """Find the keys that load_image would refuse, in much less time than decoding them all takes.

    A JPEG is decoded at an eighth of its size, everything else in full (see `check_image`). What
    was found about a file is kept in the user's cache, by what the file holds: a digest takes a
    ninth of the time.

    Args:
        keys: image keys; a repeated one is checked once.
        on_bad_image: "error" raises for bad ones, "skip" returns them.

    Returns:
        The reason for each bad key, in the order of the keys.

    Raises:
        ValueError: naming the first bad key and how many there are.
    """
    if on_bad_image not in get_args(OnBadImage):
        raise ValueError(f"on_bad_image must be 'error' or 'skip', got {on_bad_image!r}")
    unique = list(dict.fromkeys(keys))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        good = _known_good(unique, pool)
        others = [key for key in unique if key not in good]
        faults = zip(others, pool.map(_fault, others), strict=True)
        bad = {key: fault for key, fault in faults if fault}
    if bad and on_bad_image == "error":
        more = f" ({len(bad)} of {len(unique)} photos are bad)" if len(bad) > 1 else ""
        raise ValueError(
            f"{next(iter(bad.values()))}{more}; data.on_bad_image=skip leaves bad photos out"
        )
    return bad


def _known_good(keys: list[str], pool: ThreadPoolExecutor) -> set[str]:
    """The keys of good files, checked now or earlier; of others it cannot be told here."""
    folder, ids = cache_folder(), {}
    if folder is not None:
        found = zip(keys, pool.map(_content, keys), strict=True)
        ids = {key: content for key, content in found if content}
    if not ids:
        return set()
    files = list(ids)

    def make(places: list[int]) -> np.ndarray:
        faults = pool.map(_fault, [files[place] for place in places])
        return np.array([[fault is None] for fault in faults], dtype=np.float32)

    batches = kept_rows(folder / "checked.sqlite", list(ids.values()), make, CHECKED_AT_ONCE)
    good = np.concatenate(list(batches))[:, 0]
    return {key for key, is_good in zip(files, good, strict=True) if is_good}


def _content(key: str) -> bytes | None:
    """What the verdict on a file depends on, digested; None for a cell or an unusual file."""
    try:
        key.encode()
        if table_of(key) or regular(key) > MOST_DIGESTED:
            return None
        return blake2b(_rules() + content_digest(key), digest_size=16).digest()
    except (OSError, ValueError):
        return None  # check_image says what is wrong


@cache
def _rules() -> bytes:
    """What decides on files: Pillow and our own code."""
    code = Path(decoding.__file__).read_bytes()
    return blake2b(PIL.__version__.encode() + code, digest_size=16).digest()


def _fault(key: str) -> str | None:
    """Why load_image refuses a photo; None where it does not."""
    try:
        check_image(key)
    except ValueError as error:
        return str(error)
    return None


def _read_listing(
    path: Path,
) -> tuple[Path, list[Photo], dict[tuple[str, str], Partition], dict[str, Split]] | None:
    """Root, photos, partitions and splits of a manifest.json; None where it gives no split."""
    listing = load_json(path) if path.is_file() else None
    if not isinstance(listing, dict):
        return None
    given = [name for name in ("classes", "images") if name in listing]
    if not given:
        return None
    if len(given) == 1 or not all(isinstance(listing[name], list) for name in given):
        raise ValueError(f"{path}: a split needs the two lists 'classes' and 'images'")
    root = path.parent
    if "root" in listing:
        root = Path(os.path.normpath(root / text_of(listing, "root", str(path))))
    partitions: dict[tuple[str, str], Partition] = {}
    for index, entry in enumerate(listing["classes"]):
        where = f"{path}: classes[{index}]"
        labels = _labels(entry, where)
        partitions[labels] = partition_of(entry, where)
    photos, splits = [], {}
    for index, entry in enumerate(listing["images"]):
        where = f"{path}: images[{index}]"
        labels = _labels(entry, where)
        if labels not in partitions:
            continue
        if has_partition(entry) and partition_of(entry, where) != partitions[labels]:
            raise ValueError(
                f"{where}: partition {partition_of(entry, where)!r} is not that of its class"
            )
        split = choice_of(entry, "split", ("train", "test"), where)
        image = os.path.normpath(root / text_of(entry, "path", where))
        _refuse_duplicate(image, splits, where)
        splits[image] = "stage1" if entry.get("in_stage1") else split
        photos.append(Photo(image, *labels, _question(entry, where)))
    return root, photos, partitions, splits


def _read_photo_lines(path: Path) -> Iterator[Photo]:
    read: dict[str, str] = {}
    for where, record in json_lines(path):
        image = os.path.normpath(path.parent / text_of(record, "image", where))
        _refuse_duplicate(image, read, where)
        read[image] = where
        yield Photo(image, *_labels(record, where), _question(record, where))


def _refuse_duplicate(image: str, read: dict, where: str) -> None:
    if image in read:
        raise ValueError(f"{where}: {image} is listed before; a photo has one label and one split")


def _labels(record: dict, where: str) -> tuple[str, str]:
    return (
        as_words(text_of(record, "super_category", where)),
        as_words(text_of(record, "sub_category", where)),
    )


def _question(record: dict, where: str) -> str:
    return text_of(record, "question", where) if "question" in record else ""
