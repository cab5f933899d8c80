"""The six data sets of Fine-R1: found below one folder, checked, and listed as one photo set.

What lies there is as its publisher ships it; core.data.publishers reads the lists.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tercet.core.data import publishers
from tercet.core.data.files import shown
from tercet.core.data.publishers import CAR_META, CAR_TEST, CAR_TRAIN, DOG_TEST, DOG_TRAIN, Listed

DEPTH = 3
"""Levels of folders below the root in which data sets are looked for."""
OnMissing = Literal["error", "skip"]
Needs = tuple[tuple[str, ...], ...]
"""Paths below a set's folder; of each inner tuple one must be there."""


@dataclass(frozen=True)
class Edition:
    """One edition of a data set."""

    super_category: str
    title: str
    address: str
    lists: Needs
    """Its lists: a folder that holds any of them is looked at."""
    photos: tuple[str, ...]
    """Folders of its photos."""
    counts: tuple[int, int, int]
    """Sub-categories, photos to learn from, photos held out."""
    read: Callable[[Path], Iterable[Listed]]


EDITIONS = (
    Edition(
        "aircraft",
        "FGVC-Aircraft",
        "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
        (
            ("images_variant_trainval.txt",),
            ("images_variant_test.txt",),
            ("images_manufacturer_trainval.txt",),
            ("images_manufacturer_test.txt",),
        ),
        ("images",),
        (100, 6667, 3333),
        publishers.aircraft,
    ),
    Edition(
        "bird",
        "CUB-200-2011",
        "https://www.vision.caltech.edu/datasets/cub_200_2011/",
        (("train_test_split.txt",), ("images.txt",)),
        ("images",),
        (200, 5994, 5794),
        publishers.birds,
    ),
    Edition(
        "bird",
        "CUB-200 of 2010",
        "https://www.vision.caltech.edu/datasets/",
        (("lists/train.txt",), ("lists/test.txt",)),
        ("images",),
        (200, 3000, 3033),
        publishers.birds_2010,
    ),
    Edition(
        "car",
        "Stanford Cars",
        "https://www.kaggle.com/datasets/jessicali9530/stanford-cars-dataset (Stanford's own page "
        "is gone), with cars_test_annos_withlabels.mat",
        (CAR_META, CAR_TRAIN, CAR_TEST),
        ("cars_train", "cars_test"),
        (196, 8144, 8041),
        publishers.cars,
    ),
    Edition(
        "car",
        "Stanford Cars in one folder",
        "https://www.kaggle.com/datasets/jessicali9530/stanford-cars-dataset",
        (("cars_annos.mat",),),
        ("car_ims",),
        (196, 8144, 8041),
        publishers.cars_in_one,
    ),
    Edition(
        "dog",
        "Stanford Dogs",
        "http://vision.stanford.edu/aditya86/ImageNetDogs/ (images.tar and lists.tar)",
        (DOG_TRAIN, DOG_TEST),
        ("Images",),
        (120, 12000, 8580),
        publishers.dogs,
    ),
    Edition(
        "flower",
        "Oxford Flowers-102",
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/ (with imagelabels.mat and setid.mat)",
        (("imagelabels.mat",), ("setid.mat",)),
        ("jpg",),
        (102, 2040, 6149),
        publishers.flowers,
    ),
    Edition(
        "pet",
        "Oxford-IIIT Pets",
        "https://www.robots.ox.ac.uk/~vgg/data/pets/ (images.tar.gz and annotations.tar.gz)",
        (("annotations/trainval.txt",), ("annotations/test.txt",)),
        ("images",),
        (37, 3680, 3669),
        publishers.pets,
    ),
)


@dataclass
class FoundSet:
    """A data set that lies there whole."""

    edition: Edition
    folder: Path
    listed: list[Listed]
    """The photos that are there."""
    lost: list[str] = field(default_factory=list)
    """Listed photos that are not."""

    def __str__(self) -> str:
        count = Counter(photo.split for photo in self.listed)
        names = len({photo.sub_category for photo in self.listed})
        lost = f"; {len(self.lost):,} listed photos are missing" if self.lost else ""
        return (
            f"{self.edition.super_category}: {self.edition.title} in {self.folder}: {names} "
            f"sub-categories, {count['train']:,} + {count['test']:,} photos (train + test){lost}"
        )


def find_sets(
    root: Path, on_missing: OnMissing = "error", editions: Iterable[Edition] = EDITIONS
) -> tuple[list[FoundSet], list[str]]:
    """Find the data sets below a folder.

    Args:
        root: the folder.
        on_missing: a photo that is listed but not there ends it ("error") or is left out ("skip").
        editions: where one super-category has several, the first that is there is read.

    Returns:
        The sets, and a line for each super-category without one and for what is left out.

    Raises:
        ValueError: naming the file at fault, a set that is not the edition it looks like, or
            missing photos.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    found: dict[str, FoundSet] = {}
    missing: dict[str, list[str]] = {}
    folders = list(_folders(root, DEPTH))
    for edition in editions:
        name = edition.super_category
        missing.setdefault(name, [])
        for folder in _candidates(folders, edition):
            if lacks := _lacks(folder, edition):
                missing[name].append(f"{folder} lacks {lacks} of {edition.title}")
            elif name in found:
                missing[name].append(f"{folder} left out: {found[name].folder} is read for {name}")
            else:
                found[name] = _read(edition, folder, on_missing)
    first = {edition.super_category: edition for edition in reversed(list(editions))}
    lines = []
    for name, faults in missing.items():
        place = "" if name in found else f"; {first[name].title} is at {first[name].address}"
        if faults or name not in found:
            lines.append(f"{name}: {'; '.join(faults) or 'not found'}{place}")
    return [found[name] for name in sorted(found)], lines


def _folders(root: Path, depth: int) -> Iterator[Path]:
    """The folder and those in it, in order of their names, without hidden ones."""
    yield root
    if depth:
        inside = sorted(entry.path for entry in os.scandir(root) if entry.is_dir())
        for path in inside:
            if not os.path.basename(path).startswith("."):
                yield from _folders(Path(path), depth - 1)


def _candidates(folders: list[Path], edition: Edition) -> list[Path]:
    """Folders with any of an edition's lists; not the folder of lists within such a one."""
    marks = [path for any_of in edition.lists for path in any_of]
    marked = {folder: None for folder in folders if _has_any(folder, marks)}
    return [folder for folder in marked if not any(above in marked for above in folder.parents)]


def _has_any(folder: Path, paths: Iterable[str]) -> bool:
    return any((folder / path).is_file() for path in paths)


def _lacks(folder: Path, edition: Edition) -> str:
    """Lists and folders of photos that are not there; empty where all are."""
    lists = [any_of[-1] for any_of in edition.lists if not _has_any(folder, any_of)]
    return ", ".join(lists + [name for name in edition.photos if not (folder / name).is_dir()])


def _read(edition: Edition, folder: Path, on_missing: OnMissing) -> FoundSet:
    listed = list(edition.read(folder))
    split = Counter(photo.split for photo in listed)
    counts = (len({photo.sub_category for photo in listed}), split["train"], split["test"])
    if counts != edition.counts:
        raise ValueError(
            f"{folder} lists {counts[0]} sub-categories and {counts[1]:,} + {counts[2]:,} photos "
            f"(train + test), but {edition.title} has {edition.counts[0]} and "
            f"{edition.counts[1]:,} + {edition.counts[2]:,}: is it another release?"
        )
    twice = [path for path, times in Counter(photo.path for photo in listed).items() if times > 1]
    if twice:
        raise ValueError(f"{folder} lists {shown(twice[0])} twice: is it another release?")
    there = [photo for photo in listed if (folder / photo.path).is_file()]
    lost = sorted({photo.path for photo in listed} - {photo.path for photo in there})
    if lost and (on_missing == "error" or not there):
        raise ValueError(
            f"{folder}: {len(lost):,} of the {len(listed):,} photos that {edition.title} lists "
            f"are missing, {lost[0]} for instance: is the download whole? It is at "
            f"{edition.address}; on_missing=skip leaves such photos out"
        )
    return FoundSet(edition, folder, there, lost)
