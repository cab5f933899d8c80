"""What Fine-R1 released about the six data sets: question files and stage-1 records.

Both name photos by folders of their own, some with absolute paths. A photo is found by the end of
its path, with at least one folder: a bare file name is not enough, as cars_train and cars_test hold
photos of the same names.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import get_args

from tercet.core.data.fields import as_words, json_lines, load_json, text_of
from tercet.core.data.publishers import Listed
from tercet.core.data.six_sets import FoundSet
from tercet.core.types import Partition

STAGE1_FOLDERS = {
    "bird_200/images_train": ("bird", "images"),
    "stanford_cars_train/images": ("car", "cars_train"),
    "fgvc-aircraft-2013b-train/images": ("aircraft", "images"),
    "flower102_train/image/train": ("flower", "jpg"),
    "dogs_120/image_train/train": ("dog", "Images"),
    "oxford-pet-train/train": ("pet", "images"),
}
"""Folders of the stage-1 records: super-category, and the publisher's folder."""


@dataclass
class Asked:
    """What the question files say about one data set."""

    partitions: dict[str, Partition]
    """Seen or unseen, by sub-category."""
    questions: dict[str, str] = field(default_factory=dict)
    """By path below the set's folder."""
    elsewhere: int = 0
    """Questions about photos that are not there."""


def read_asked(folder: Path, found: FoundSet) -> Asked:
    """Read `<super_category>_seen.jsonl` and `..._unseen.jsonl` of a folder.

    Raises:
        ValueError: naming a file, line or sub-category at fault: one that is in both or in none of
            the files, or another name than the publisher's for a photo.
    """
    asked = Asked({})
    listed = {photo.path: photo for photo in found.listed}
    for partition in get_args(Partition):
        path = folder / f"{found.edition.super_category}_{partition}.jsonl"
        for where, record in json_lines(path):
            name = as_words(text_of(record, "ground_truth", where))
            if asked.partitions.setdefault(name, partition) != partition:
                raise ValueError(f"{where}: {name!r} is seen and unseen")
            photo = _photo(text_of(record, "image_path", where), listed)
            if photo is None:
                asked.elsewhere += 1
                continue
            if photo.sub_category != name:
                raise ValueError(
                    f"{where}: {photo.path} is {name!r} here, but {photo.sub_category!r} in "
                    f"{found.folder}"
                )
            asked.questions[photo.path] = text_of(record, "question", where)
    names = {photo.sub_category for photo in found.listed}
    if names != set(asked.partitions):
        odd = min(names ^ set(asked.partitions))
        place = "only among the photos" if odd in names else "only in the question files"
        raise ValueError(f"{folder}: the {found.edition.super_category} {odd!r} is {place}")
    return asked


def _photo(path: str, listed: dict[str, Listed]) -> Listed | None:
    parts = PurePosixPath(path).parts
    ends = ("/".join(parts[start:]) for start in range(len(parts) - 1))
    return next((listed[end] for end in ends if end in listed), None)


@dataclass
class Stage1:
    """The stage-1 records whose photos are there."""

    records: list[dict]
    """As published, `images` as paths below the set's folder."""
    photos: dict[str, set[str]]
    """Those paths, by super-category."""
    missing: list[str]
    """A line for each data set with records whose photos are not there."""


def read_stage1(path: Path, sets: list[FoundSet]) -> Stage1:
    """Read the published stage-1 records and find their photos.

    Raises:
        ValueError: naming the file and record at fault.
    """
    records = load_json(path)
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path} must hold a JSON list of records")
    paths = {
        found.edition.super_category: {p.path for p in found.listed if p.split == "train"}
        for found in sets
    }
    kept, used, lost = [], defaultdict(set), defaultdict(list)
    for index, record in enumerate(records):
        where = f"{path}: record {index}"
        images = record.get("images") if isinstance(record, dict) else None
        if not isinstance(images, list) or len(images) != 1:
            raise ValueError(f"{where}: needs one photo in 'images'")
        name, photo = _publishers_path(images[0], where)
        if photo in paths.get(name, ()):
            kept.append(record | {"images": [photo], "super_category": name})
            used[name].add(photo)
        else:
            lost[name].append(images[0])
    missing = [
        f"stage 1: {len(photos)} record(s) of {name} left out, without {photos[0]} for instance"
        for name, photos in sorted(lost.items())
    ]
    return Stage1(kept, dict(used), missing)


def _publishers_path(image: object, where: str) -> tuple[str, str]:
    text = text_of({"images": image}, "images", where)
    for folder, (name, publishers) in STAGE1_FOLDERS.items():
        before, found, rest = text.rpartition(f"{folder}/")
        if found and (not before or before.endswith("/")):
            return name, f"{publishers}/{rest}"
    raise ValueError(f"{where}: {text} is in none of the folders of the published records")
