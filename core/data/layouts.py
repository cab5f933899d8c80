"""Folders of photos to labels: splits, index prefixes, and names given in a file.

Wanted is `<super_category>/<sub_category>/<photo>`. A level of train, valid and test folders is
read as splits wherever it lies. What cannot be read as names is refused with what to do about it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tercet.core.data.decoding import photo_suffixes
from tercet.core.data.fields import as_words
from tercet.core.data.files import check_text, shown
from tercet.core.data.folder_names import Parts, names_of
from tercet.core.types import Photo

Split = Literal["train", "test", "stage1"]

SPLITS: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "test", "testing"), "test"),
}
"""What folders of these names are; validation photos are held out together with test photos."""
SIDE_FILES = frozenset(
    ".txt .json .jsonl .csv .tsv .xml .md .html .yaml .yml .mat .db .ini .py .log .url".split()
)
"""Suffixes of what often lies beside photos and is no photo that was left out."""
MAX_DEPTH = 6
WANTED = "<super_category>/<sub_category>/<photo>"


@dataclass
class Layout:
    """What a folder of photos says about them."""

    photos: list[Photo]
    splits: dict[str, Split] | None
    """By image key; None where there are no split folders."""
    notes: list[str]
    """What was read into the folders' names, and what was left out, a line each."""


@dataclass
class _Folder:
    photos: list[str] = field(default_factory=list)
    others: Counter = field(default_factory=Counter)
    """Suffixes of files that are neither photos nor usual beside them."""


def read_layout(
    root: Path, names: Mapping[str, str] | None = None, super_category: str | None = None
) -> Layout:
    """Read the photos of a folder of folders.

    Args:
        root: the folder.
        names: as `read_names` gives them; folders without an entry keep their own.
        super_category: what all photos show, where the folders are those of sub-categories.

    Raises:
        ValueError: naming the folder at fault and what to do about it.
    """
    names = dict(names or {})
    if super_category is not None:
        names["."] = as_words(check_text(super_category, "data.super_category"))
    folders = _scan(root)
    full = {parts: folder for parts, folder in folders.items() if folder.photos and parts}
    level = _split_level(root, full)
    labels = {parts: _without(parts, level) for parts in folders}
    notes = _left_out(root, folders, labels)
    if "." in names and all(len(labels[parts]) == 1 for parts in full):
        labels = {parts: (".", *label) for parts, label in labels.items()}
    elif super_category is not None:
        raise ValueError(
            f"data.super_category is for folders of sub-categories alone; {root} holds folders of "
            "super-categories"
        )
    full = _right_depth(root, full, labels, notes)
    _refuse_empty(root, folders, labels, {labels[parts] for parts in full})
    words, renamed = names_of(root, sorted({labels[parts] for parts in full}), names)
    photos, splits = [], {}
    for parts, folder in full.items():
        super_category, sub_category = words[labels[parts][:1]], words[labels[parts]]
        for name in folder.photos:
            key = os.path.join(root, *parts, name)
            photos.append(Photo(key, super_category, sub_category))
            splits[key] = SPLITS[parts[level].lower()] if level is not None else "train"
    notes += renamed
    if level is not None:
        notes.append(about_splits(sorted({parts[level] for parts in full}), splits))
    is_split = "test" in splits.values()
    return Layout(photos, splits if is_split else None, notes)


def _scan(root: Path) -> dict[Parts, _Folder]:
    """Every folder down to MAX_DEPTH that is not hidden."""

    def refuse(error: OSError):
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from error

    folders: dict[Parts, _Folder] = {}
    for folder, inside, files in os.walk(root, followlinks=True, onerror=refuse):
        parts = Path(folder).relative_to(root).parts
        deeper = len(parts) < MAX_DEPTH
        inside[:] = sorted(name for name in inside if deeper and not name.startswith("."))
        found = folders[parts] = _Folder()
        for name in sorted(files):
            suffix = os.path.splitext(name)[1].lower()
            if suffix in photo_suffixes() and not name.startswith("."):
                found.photos.append(name)
            elif suffix not in SIDE_FILES and not name.startswith("."):
                found.others[suffix] += 1
    return folders


def _split_level(root: Path, full: Iterable[Parts]) -> int | None:
    """The level at which every folder is a split; None where there is none.

    Raises:
        ValueError: only some folders of a level are splits, or none is for training.
    """
    for level in range(MAX_DEPTH):
        at_level = sorted({parts[level] for parts in full if len(parts) > level})
        splits = [name for name in at_level if name.lower() in SPLITS]
        kinds = {SPLITS[name.lower()] for name in splits}
        if splits and splits == at_level and all(len(parts) > level for parts in full):
            if "train" not in kinds:
                raise ValueError(
                    f"{root} has the splits {', '.join(splits)}, but no folder train to learn from"
                )
            return level
        if kinds == {"train", "test"}:
            other = next((name for name in at_level if name not in splits), None)
            beside = f"{other!r} beside them is none" if other else "some photos are in none"
            raise ValueError(
                f"{root}: the folders {', '.join(splits)} look like splits, but {beside}: move it "
                "out of data.path, or rename them"
            )
    return None


def _without(parts: Parts, level: int | None) -> Parts:
    return parts if level is None else parts[:level] + parts[level + 1 :]


def _left_out(root: Path, folders: Mapping[Parts, _Folder], labels: Mapping) -> list[str]:
    """Notes on files and folders that are not read."""
    notes = []
    suffixes: Counter = Counter()
    for folder in folders.values():
        if folder.photos:
            suffixes += folder.others
    if suffixes:
        read = " ".join(sorted(photo_suffixes()))
        notes.append(f"{_by_suffix(suffixes)} left out: no photos by their suffix ({read})")
    if folders[()].photos:
        notes.append(f"{len(folders[()].photos)} photo(s) directly in {root} left out")
    holding = {parts[:1] for parts, folder in folders.items() if folder.photos}
    without = [parts[0] for parts in folders if len(parts) == 1 and parts not in holding]
    if without and holding - {()}:
        notes.append(f"folder(s) without photos left out: {', '.join(map(shown, without))}")
    return notes


def _by_suffix(suffixes: Counter) -> str:
    return "file(s) " + ", ".join(f"{n} {s or 'without suffix'}" for s, n in suffixes.most_common())


def _right_depth(
    root: Path, full: dict[Parts, _Folder], labels: Mapping[Parts, Parts], notes: list[str]
) -> dict[Parts, _Folder]:
    """The folders two levels deep; ones in them are left out with a note, others refused."""
    for parts in full:
        if len(labels[parts]) < 2:
            raise ValueError(
                f"{root.joinpath(*parts)} holds photos; they must lie one folder deeper: {WANTED}; "
                "or say what all of them show, by --data.super_category bird or in a file like "
                '{".": "bird"}: --data.names FILE'
            )
    kept = {parts: folder for parts, folder in full.items() if len(labels[parts]) == 2}
    classes = {labels[parts] for parts in kept}
    below = 0
    for parts, folder in full.items():
        if parts in kept:
            continue
        if labels[parts][:2] not in classes:
            common = os.path.commonpath([os.path.join(*some) for some in full])
            step = common.split(os.sep)[0]
            advice = f": give --data.path {root / step}" if step and not kept else ""
            raise ValueError(
                f"{root.joinpath(*parts)} holds photos; they must lie as {WANTED} in {root}{advice}"
            )
        below += len(folder.photos)
    if below:
        notes.append(f"{below} photo(s) in folders of sub-categories' folders left out")
    return kept


def _refuse_empty(
    root: Path, folders: Mapping[Parts, _Folder], labels: Mapping, classes: set[Parts]
) -> None:
    supers = {label[0] for label in classes}
    for parts, folder in folders.items():
        label = labels[parts]
        if parts and len(label) == 2 and label[0] in supers and label not in classes:
            allowed = " ".join(sorted(suffix[1:] for suffix in photo_suffixes()))
            instead = f", but {_by_suffix(folder.others)}" if folder.others else ""
            raise ValueError(f"{root.joinpath(*parts)} holds no photo ({allowed}){instead}")


def about_splits(folders: list[str], splits: Mapping[str, Split]) -> str:
    """A line on folders that are splits, and on how many photos each of the two parts has."""
    count = Counter(splits.values())
    if "test" not in count:
        return f"folder {', '.join(folders)} is read as a split; held-out photos are drawn from it"
    held = [name for name in folders if SPLITS[name.lower()] == "test"]
    return (
        f"folders {', '.join(folders)} are read as splits: {count['train']} photos to learn from, "
        f"{count['test']} held out ({', '.join(held)})"
    )
