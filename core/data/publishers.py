"""Lists of the six data sets as their publishers ship them: photos, labels, splits.

Names are spelled as in the released Fine-R1 question files, not as in the lists:
`001.Black_footed_Albatross` is `Black Footed Albatross`, `737-200` by Boeing is `Boeing 737-200`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from tercet.core.data.files import check_text, read_bytes, shown
from tercet.core.data.matlab import column, read_mat

MAX_LIST_BYTES = 2**24
INDEX = re.compile(r"(?:\d{3}\.|n\d{8}-)")
"""Before the name of a folder: `001.` of a bird, `n02085620-` of a dog."""
NAMED_MAKERS = ("Boeing", "Airbus")
"""Manufacturers that the question files name before a variant."""

FLOWERS = tuple(
    name.strip()
    for name in """
    pink primrose, hard-leaved pocket orchid, canterbury bells, sweet pea, english marigold, tiger
    lily, moon orchid, bird of paradise, monkshood, globe thistle, snapdragon, colt's foot, king
    protea, spear thistle, yellow iris, globe flower, purple coneflower, peruvian lily, balloon
    flower, giant white arum lily, fire lily, pincushion flower, fritillary, red ginger, grape
    hyacinth, corn poppy, prince of wales feathers, stemless gentian, artichoke, sweet william,
    carnation, garden phlox, love in the mist, mexican aster, alpine sea holly, ruby-lipped
    cattleya, cape flower, great masterwort, siam tulip, lenten rose, barbeton daisy, daffodil,
    sword lily, poinsettia, bolero deep blue, wallflower, marigold, buttercup, oxeye daisy, common
    dandelion, petunia, wild pansy, primula, sunflower, pelargonium, bishop of llandaff, gaura,
    geranium, orange dahlia, pink and yellow dahlia, cautleya spicata, japanese anemone, black-eyed
    susan, silverbush, californian poppy, osteospermum, spring crocus, bearded iris, windflower,
    tree poppy, gazania, azalea, water lily, rose, thorn apple, morning glory, passion flower,
    lotus, toad lily, anthurium, frangipani, clematis, hibiscus, columbine, desert-rose, tree
    mallow, magnolia, cyclamen, watercress, canna lily, hippeastrum, bee balm, air plant, foxglove,
    bougainvillea, camellia, mallow, mexican petunia, bromelia, blanket flower, trumpet creeper,
    blackberry lily
    """.replace("\n    ", " ").split(",")
)
"""Names of the labels 1 to 102 of imagelabels.mat, which holds numbers alone."""


@dataclass(frozen=True)
class Listed:
    """A photo of a publisher's lists."""

    path: str
    """Below the data set's folder, with `/`."""
    sub_category: str
    split: Literal["train", "test"]


def aircraft(folder: Path) -> Iterator[Listed]:
    """FGVC-Aircraft: variants, in lists of `0056978 707-320`; folder is its `data`."""
    for split, part in (("train", "trainval"), ("test", "test")):
        makers = dict(_pairs(folder / f"images_manufacturer_{part}.txt"))
        path = folder / f"images_variant_{part}.txt"
        for photo, variant in _pairs(path):
            if photo not in makers:
                raise ValueError(f"{path}: {photo} is not in images_manufacturer_{part}.txt")
            maker = makers[photo]
            named = maker in NAMED_MAKERS and not variant.startswith(maker)
            name = f"{maker} {variant}" if named else variant
            yield Listed(f"images/{photo}.jpg", name, split)


def birds(folder: Path) -> Iterator[Listed]:
    """CUB-200-2011: `images.txt` and `train_test_split.txt`, both by a photo's number."""
    path = folder / "train_test_split.txt"
    flags = dict(_pairs(path))
    for number, photo in _pairs(folder / "images.txt"):
        if flags.get(number) not in ("0", "1"):
            raise ValueError(
                f"{path}: photo {number} must be 0 or 1, got {shown(flags.get(number))}"
            )
        split = "train" if flags[number] == "1" else "test"
        yield Listed(f"images/{photo}", words(photo.partition("/")[0]), split)


def birds_2010(folder: Path) -> Iterator[Listed]:
    """CUB-200 of 2010: `lists/train.txt` and `lists/test.txt` of paths below `images`."""
    for split in ("train", "test"):
        for photo in _lines(folder / "lists" / f"{split}.txt"):
            yield Listed(f"images/{photo}", words(photo.partition("/")[0]), split)


def cars(folder: Path) -> Iterator[Listed]:
    """Stanford Cars: annotations of `cars_train` and `cars_test`, names in cars_meta.mat.

    cars_test_annos.mat has no labels; cars_test_annos_withlabels.mat has.
    """
    meta = first_of(folder, CAR_META)
    names = _texts(column(read_mat(meta), "class_names", meta), meta)
    for split, paths in (("train", CAR_TRAIN), ("test", CAR_TEST)):
        path = first_of(folder, paths)
        found = read_mat(path)
        photos = _texts(column(found, "annotations", path, "fname"), path)
        labels = _numbers(column(found, "annotations", path, "class"), path)
        for photo, label in zip(photos, labels, strict=True):
            yield Listed(f"cars_{split}/{photo}", _name(names, label, path), split)


def cars_in_one(folder: Path) -> Iterator[Listed]:
    """Stanford Cars with all photos in `car_ims`, numbered anew: cars_annos.mat alone."""
    path = folder / "cars_annos.mat"
    found = read_mat(path)
    names = _texts(column(found, "class_names", path), path)
    photos = _texts(column(found, "annotations", path, "relative_im_path"), path)
    labels = _numbers(column(found, "annotations", path, "class"), path)
    tests = _numbers(column(found, "annotations", path, "test"), path)
    for photo, label, test in zip(photos, labels, tests, strict=True):
        yield Listed(photo, _name(names, label, path), "test" if test else "train")


def dogs(folder: Path) -> Iterator[Listed]:
    """Stanford Dogs: `train_list.mat` and `test_list.mat` of paths below `Images`."""
    for split, paths in (("train", DOG_TRAIN), ("test", DOG_TEST)):
        path = first_of(folder, paths)
        for photo in _texts(column(read_mat(path), "file_list", path), path):
            yield Listed(f"Images/{photo}", words(photo.partition("/")[0]), split)


def flowers(folder: Path) -> Iterator[Listed]:
    """Oxford Flowers-102: `imagelabels.mat` by a photo's number, splits in `setid.mat`."""
    path = folder / "imagelabels.mat"
    labels = _numbers(column(read_mat(path), "labels", path), path)
    path = folder / "setid.mat"
    found = read_mat(path)
    for name, split in (("trnid", "train"), ("valid", "train"), ("tstid", "test")):
        for number in _numbers(column(found, name, path), path):
            if not 1 <= number <= len(labels):
                raise ValueError(f"{path}: photo {number} has no label in imagelabels.mat")
            label = _name(FLOWERS, labels[number - 1], folder / "imagelabels.mat")
            yield Listed(f"jpg/image_{number:05d}.jpg", label, split)


def pets(folder: Path) -> Iterator[Listed]:
    """Oxford-IIIT Pets: lists of `Abyssinian_100 1 1 1`; the name is the file's."""
    for split, part in (("train", "trainval"), ("test", "test")):
        for line in _lines(folder / "annotations" / f"{part}.txt"):
            photo = line.split()[0]
            yield Listed(f"images/{photo}.jpg", words(photo.rpartition("_")[0]), split)


DEVKIT = ("", "devkit/")
CAR_META = tuple(f"{place}cars_meta.mat" for place in DEVKIT)
CAR_TRAIN = tuple(f"{place}cars_train_annos.mat" for place in DEVKIT)
CAR_TEST = tuple(f"{place}cars_test_annos_withlabels.mat" for place in DEVKIT)
DOG_TRAIN = tuple(f"{place}train_list.mat" for place in ("", "lists/", "splits/"))
DOG_TEST = tuple(f"{place}test_list.mat" for place in ("", "lists/", "splits/"))


def first_of(folder: Path, paths: tuple[str, ...]) -> Path:
    """The first of the paths below a folder that exists; else the first one."""
    found = [folder / path for path in paths if (folder / path).exists()]
    return found[0] if found else folder / paths[0]


def words(folder: str) -> str:
    """The name of a folder or file without its index, each word with one capital."""
    name = INDEX.sub("", folder, count=1) if INDEX.match(folder) else folder
    return " ".join(word.capitalize() for word in re.split(r"[_\s-]", name) if word)


def _lines(path: Path) -> Iterator[str]:
    """Lines that are not empty, nor comments; ValueError for what no path or name can be."""
    try:
        text = read_bytes(path, MAX_LIST_BYTES).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.startswith("#"):
            yield check_text(line.strip(), f"{path}:{number}: a line")


def _pairs(path: Path) -> Iterator[tuple[str, str]]:
    for line in _lines(path):
        first, _, rest = line.partition(" ")
        if not rest.strip():
            raise ValueError(f"{path}: a line must be 'PHOTO VALUE', got {shown(line)}")
        yield first, rest.strip()


def _name(names: tuple[str, ...] | list[str], label: int, path: Path) -> str:
    if not 1 <= label <= len(names):
        raise ValueError(f"{path}: a label must be 1 to {len(names)}, got {label}")
    return names[label - 1]


def _texts(values: np.ndarray, path: Path) -> list[str]:
    return [check_text(str(value), f"{path}: an entry") for value in values.tolist()]


def _numbers(values: np.ndarray, path: Path) -> list[int]:
    try:
        return [int(value) for value in values.tolist()]
    except (TypeError, ValueError):
        raise ValueError(f"{path} must hold whole numbers, got {shown(values.tolist())}") from None
