"""The manifest, triplets.json: every choice made between the photos and the first step."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import get_args

from tercet.core.data.cells import table_of
from tercet.core.data.fields import load_json, text_of, texts_of
from tercet.core.data.files import check_text
from tercet.core.data.photos import OnBadImage, check_images
from tercet.core.names import refuse_alike
from tercet.core.types import Anchor, Partition, Photo

MANIFEST_NAME = "triplets.json"


@dataclass
class Manifest:
    """Anchors with the photos their triplets are made of, stage-1 and test photos, and names."""

    anchors: list[Anchor]
    sft: list[Photo]
    """Photos of seen sub-categories set aside for stage 1."""
    test: dict[Partition, list[Photo]]
    """Held-out photos; both partitions are present."""
    names: dict[str, list[str]]
    """All sub-categories, seen and unseen, of each super-category."""
    nearest: dict[str, dict[str, list[str]]]
    """By super-category and seen sub-category: the most similar seen others, nearest first."""
    settings: dict[str, object]
    """The data options that these choices were made with."""
    skipped: list[str] = field(default_factory=list)
    """Bad photos that were left out, with the reason."""
    notes: list[str] = field(default_factory=list)
    """What was made of the photos' folders, and which files are no photos, a line each."""
    look_alikes: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    """As `nearest`, of every sub-category among all, for the options of questions. Earlier versions
    do not have it."""
    cosines: dict[str, dict[str, float]] = field(default_factory=dict)
    """By super-category and seen sub-category: of its mean embedding with the nearest one's."""

    def remarks(self) -> list[str]:
        """Lines for the user: what was made of the data, and what was left out."""
        return [*self.notes, *(f"left out: {reason}" for reason in self.skipped)]

    def write(self, folder: str | Path) -> Path:
        """Write `folder`/triplets.json, whole or not at all.

        Image keys are stored relative to `root`, the photos' common folder, and `root` relative to
        `folder`. When the photos move, only `root` has to be edited.

        Returns:
            The path of the file.
        """
        folder = Path(os.path.abspath(folder))
        folder.mkdir(parents=True, exist_ok=True)
        root = self.common_folder()
        stored = asdict(self.with_keys(lambda key: os.path.relpath(key, root)))
        stored = {"root": os.path.relpath(root, folder)} | stored
        rare = ("notes", "look_alikes", "cosines")
        stored = {name: value for name, value in stored.items() if value or name not in rare}
        unfinished = folder / f".{MANIFEST_NAME}.unfinished"
        unfinished.write_text(json.dumps(stored, indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(unfinished, folder / MANIFEST_NAME)
        return folder / MANIFEST_NAME

    @classmethod
    def read(cls, path: str | Path) -> Manifest:
        """Read triplets.json back, from its path or its folder; image keys become absolute.

        Raises:
            ValueError: naming the file, and the line or field, at fault.
        """
        path = Path(os.path.abspath(path))
        path = path / MANIFEST_NAME if path.is_dir() else path
        stored = load_json(path)
        try:
            root = path.parent / check_text(stored.pop("root"), f"{path}: 'root'")
            stored["anchors"] = _anchors(stored["anchors"], f"{path}: anchors")
            stored["sft"] = _photos(stored["sft"], f"{path}: sft")
            stored["test"] = {
                partition: _photos(stored["test"][partition], f"{path}: test[{partition!r}]")
                for partition in get_args(Partition)
            }
            manifest = cls(**stored).with_keys(lambda key: os.path.normpath(root / key))
            known = _known_names(stored, path)
            refuse_alike(manifest.classes(), path)
            _check_names(stored, known, path)
            return manifest
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a manifest of triplets: {error!r}") from error

    def with_keys(self, convert: Callable[[str], str]) -> Manifest:
        """Copy in which every image key is converted, once wherever it stands."""
        convert = cache(convert)

        def photos(old: list[Photo]) -> list[Photo]:
            return [replace(photo, image=convert(photo.image)) for photo in old]

        anchors = [
            replace(
                anchor,
                image=convert(anchor.image),
                positives=tuple(map(convert, anchor.positives)),
                negatives=tuple(map(convert, anchor.negatives)),
            )
            for anchor in self.anchors
        ]
        test = {partition: photos(self.test[partition]) for partition in self.test}
        return replace(self, anchors=anchors, sft=photos(self.sft), test=test)

    def image_keys(self) -> list[str]:
        """Every image key once, in the order of use."""
        keys = [key for a in self.anchors for key in (a.image, *a.positives, *a.negatives)]
        photos = [*self.sft, *self.test["seen"], *self.test["unseen"]]
        return list(dict.fromkeys(keys + [photo.image for photo in photos]))

    def classes(self) -> set[tuple[str, str]]:
        """The (super-category, sub-category) pairs that its lists name."""
        photos = [*self.anchors, *self.sft, *self.test["seen"], *self.test["unseen"]]
        listed = {(super_, name) for super_, names in self.names.items() for name in names}
        return listed | {(photo.super_category, photo.sub_category) for photo in photos}

    def common_folder(self) -> str:
        """The deepest folder that holds every photo, or the table that the photo is in."""
        keys = self.image_keys()
        folders = {os.path.dirname(os.path.abspath(table_of(key) or key)) for key in keys}
        return os.path.commonpath(folders) if folders else os.sep

    def without_bad(self, on_bad_image: OnBadImage) -> Manifest:
        """Copy without the bad photos, nor the anchors that have no good photo of each kind left.

        Args:
            on_bad_image: "error" raises for a bad photo, "skip" leaves it out.

        Raises:
            ValueError: naming a bad photo, with "error"; or when no anchor is left.
        """
        bad = check_images(self.image_keys(), on_bad_image)
        if not bad:
            return self
        anchors, skipped = [], [*self.skipped, *bad.values()]
        for anchor in self.anchors:
            positives = tuple(key for key in anchor.positives if key not in bad)
            negatives = tuple(key for key in anchor.negatives if key not in bad)
            if anchor.image not in bad and positives and negatives:
                anchors.append(replace(anchor, positives=positives, negatives=negatives))
            elif anchor.image not in bad:
                skipped.append(f"anchor {anchor.id}: no good positive or no good negative is left")
        if not anchors:
            raise ValueError(
                f"no anchor has its photos; {len(bad)} are bad: {next(iter(bad.values()))}"
            )
        sft = [photo for photo in self.sft if photo.image not in bad]
        test = {
            partition: [photo for photo in photos if photo.image not in bad]
            for partition, photos in self.test.items()
        }
        return replace(self, anchors=anchors, sft=sft, test=test, skipped=skipped)


def _anchors(records: list, where: str) -> list[Anchor]:
    anchors, ids = [], set()
    for index, record in enumerate(records):
        here = f"{where}[{index}]"
        texts = {name: text_of(record, name, here) for name in ("id", "image", "question")}
        photos = {n: texts_of(record, n, here, "photos") for n in ("positives", "negatives")}
        if texts["id"] in ids:
            raise ValueError(f"{here}: the id {texts['id']!r} is an earlier anchor's")
        ids.add(texts["id"])
        anchors.append(Anchor(**(record | texts | photos | _labels(record, here))))
    return anchors


def _photos(records: list, where: str) -> list[Photo]:
    photos = []
    for index, record in enumerate(records):
        here = f"{where}[{index}]"
        texts = {name: text_of(record, name, here) for name in ("image", "question")}
        photos.append(Photo(**(record | texts | _labels(record, here))))
    return photos


def _labels(record: dict, where: str) -> dict[str, str]:
    """The two names; rows of Parquet files have no super-category."""
    labels = {"sub_category": text_of(record, "sub_category", where)}
    if record["super_category"] != "":
        labels["super_category"] = text_of(record, "super_category", where)
    return labels


def _known_names(stored: dict, path: Path) -> dict[str, set[str]]:
    """The names of each super-category; ValueError where they are not lists of texts."""
    names = stored["names"]
    return {name: set(texts_of(names, name, f"{path}: names")) for name in names}


def _check_names(stored: dict, known: dict[str, set[str]], path: Path) -> None:
    """ValueError where the names lack an anchor's, or other lists of names are none of texts."""
    for index, anchor in enumerate(stored["anchors"]):
        if anchor.sub_category not in known.get(anchor.super_category, ()):
            raise ValueError(
                f"{path}: anchors[{index}]: {anchor.sub_category!r} is not among the names of "
                f"{anchor.super_category!r}"
            )
    for field_name in ("nearest", "look_alikes"):
        for name, of_sub in stored.get(field_name, {}).items():
            for sub_category in of_sub:
                texts_of(of_sub, sub_category, f"{path}: {field_name}[{name!r}]")
    for name, of_sub in stored.get("cosines", {}).items():
        if not all(isinstance(cosine, float) for cosine in of_sub.values()):
            raise ValueError(f"{path}: cosines[{name!r}] must be numbers by sub-category")
    for field_name in ("skipped", "notes"):
        if not all(isinstance(line, str) for line in stored.get(field_name, [])):
            raise ValueError(f"{path}: {field_name!r} must be a list of texts")
