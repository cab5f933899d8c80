"""Labelled photos from tables, a photo and its label a row: `datasets` on disk, Parquet from a hub.

`datasets.save_to_disk` writes Arrow streams beside JSON files; a data set of a hub is Parquet files
named after their splits. That package is not needed to read them. A label is a text, or a number
whose name stands in the table's features.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tercet.core.data.cells import arrow_table
from tercet.core.data.fields import as_words, load_json, text_of, texts_of
from tercet.core.data.files import check_text, regular, shown
from tercet.core.data.folder_names import names_of
from tercet.core.data.layouts import SPLITS, Layout, Split, about_splits
from tercet.core.types import Photo

SPLITS_FILE, FILES_FILE, FEATURES_FILE = "dataset_dict.json", "state.json", "dataset_info.json"
"""Of a folder of `datasets`: its splits; in the folder of a split its files and its features."""
LABEL, SUPER = "label", "super_category"
OF_TRIPLETS = "problem"
"""A column that Parquet files of triplets have."""


def table_files(path: Path) -> dict[Path, str]:
    """The tables of labelled photos that a path stands for, each with the name of its split.

    Args:
        path: a folder that `datasets` has saved; a Parquet file, a folder of them, or the clone of
            a data set with them in its folder `data`.

    Returns:
        Empty where it is something else; names of splits are empty where there are none.

    Raises:
        ValueError: naming a file of `datasets` at fault.
    """
    if (path / SPLITS_FILE).is_file():
        splits = texts_of(load_json(path / SPLITS_FILE), "splits", str(path / SPLITS_FILE))
        return {file: name for name in splits for file in _saved(path / Path(name).name)}
    if (path / FILES_FILE).is_file():
        return dict.fromkeys(_saved(path), "")
    found = [path] if path.suffix == ".parquet" else sorted(path.glob("*.parquet"))
    found = found or sorted(path.glob("data/*.parquet"))
    if not found or not _is_labelled(found[0]):
        return {}
    words = {file: re.split(r"[-.]", file.name)[0].lower() for file in found}
    return {file: word if word in SPLITS else "" for file, word in words.items()}


def read_tables(
    root: Path, names: Mapping[str, str] | None = None, super_category: str | None = None
) -> Layout:
    """Read labelled photos from the tables of `table_files`.

    The photo's column is the one of the type Image in the features, else `image`; the label's is
    `label`, else the one of the type ClassLabel. A column `super_category` says what a photo shows.

    Args:
        root: the folder or file.
        names: names by label, as `read_names` gives them; other labels keep their own.
        super_category: what all photos show, where no column says it.

    Raises:
        ValueError: naming the file, and the column or row, at fault.
    """
    files, given = table_files(root), dict(names or {})
    if super_category is not None:
        given["."] = as_words(check_text(super_category, "data.super_category"))
    splits = _splits(root, files)
    labels: dict[str, tuple[str, str]] = {}
    of_key: dict[str, Split] = {}
    for file in files:
        for key, label in _Table.open(file).rows("." in given).items():
            labels[key], of_key[key] = label, splits[file]
    words, notes = names_of(root, sorted(set(labels.values())), given)
    photos = [Photo(key, words[label[:1]], words[label]) for key, label in labels.items()]
    if any(files.values()):
        notes.append(about_splits(sorted(set(files.values())), of_key))
    return Layout(photos, of_key if "test" in of_key.values() else None, notes)


def _saved(folder: Path) -> list[Path]:
    """The Arrow streams of a split that `datasets` has saved."""
    listing = folder / FILES_FILE
    state = load_json(listing)
    files = state.get("_data_files") if isinstance(state, dict) else None
    if not isinstance(files, list) or not files:
        raise ValueError(f"{listing}: '_data_files' must list the data set's files")
    return [folder / Path(text_of(file, "filename", str(listing))).name for file in files]


def _is_labelled(file: Path) -> bool:
    """Whether a Parquet file has columns of photos and labels, and no triplets."""
    try:
        table = _Table.open(file)
    except ValueError:
        return False  # who reads triplets says what is wrong
    return OF_TRIPLETS not in table.types and {table.photo, table.label} <= table.types.keys()


def _splits(root: Path, files: Mapping[Path, str]) -> dict[Path, Split]:
    found = {file: SPLITS.get(name.lower()) for file, name in files.items()}
    if not any(found.values()):
        return dict.fromkeys(files, "train")
    for file, split in found.items():
        if split is None:
            raise ValueError(f"{file} is of no split (train, valid or test), others beside it are")
    if "train" not in found.values():
        raise ValueError(f"{root} has the splits {', '.join(files.values())}, but no train")
    return found


@dataclass(frozen=True)
class _Table:
    file: Path
    types: dict[str, pa.DataType]
    """By column."""
    features: dict
    """What `datasets` knows of the columns, by name; empty where it wrote nothing."""

    @classmethod
    def open(cls, file: Path) -> _Table:
        """Raises ValueError, naming the file, where it cannot be read."""
        try:
            regular(file)
            is_parquet = file.suffix == ".parquet"
            schema = pq.read_schema(file) if is_parquet else arrow_table(str(file)).schema
            found = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info")
        except (OSError, ValueError, AttributeError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{file} cannot be read as a table: {reason}") from error
        beside = file.with_name(FEATURES_FILE)
        found = load_json(beside) if beside.is_file() else found
        features = found.get("features") if isinstance(found, dict) else None
        types = dict(zip(schema.names, schema.types, strict=True))
        return cls(file, types, features if isinstance(features, dict) else {})

    @property
    def photo(self) -> str:
        """The photos' column, which may be missing."""
        found = self._of("Image") or ["image"]
        if len(found) > 1:
            raise ValueError(f"{self.file} has several columns of photos: {', '.join(found)}")
        return found[0]

    @property
    def label(self) -> str:
        """The labels' column, which may be missing."""
        found = [name for name in self._of("ClassLabel") if name != SUPER] or [LABEL]
        if LABEL not in self.types and len(found) > 1:
            raise ValueError(f"{self.file} has several labels, none called {LABEL!r}: {found}")
        return LABEL if LABEL in self.types else found[0]

    def _of(self, kind: str) -> list[str]:
        """Columns whose feature is of a type."""
        features = {name: self.features.get(name) for name in self.types}
        return [n for n, f in features.items() if isinstance(f, dict) and f.get("_type") == kind]

    def texts(self, column: str) -> list[str]:
        """A column of labels, their names where they are numbers.

        Raises:
            ValueError: naming the column, or the row, at fault.
        """
        if column not in self.types:
            raise ValueError(f"{self.file} has no column {column!r}")
        names = None
        if column in self._of("ClassLabel"):
            names = texts_of(self.features[column], "names", f"{self.file}: feature {column!r}")
        elif pa.types.is_integer(self.types[column]):
            raise ValueError(f"{self.file}: nothing names the numbers of column {column!r}")
        texts = []
        for row, value in enumerate(self._values(column)):
            where = f"{self.file}#{row}: column {column!r}"
            if names is not None:
                if not isinstance(value, int) or not 0 <= value < len(names):
                    raise ValueError(f"{where} must be 0 to {len(names) - 1}, got {shown(value)}")
                value = names[value]
            texts.append(check_text(value, where))
        return texts

    def _values(self, column: str) -> list:
        if self.file.suffix == ".parquet":
            try:
                return pq.read_table(self.file, columns=[column]).column(column).to_pylist()
            except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
                raise ValueError(f"{self.file}: column {column!r} cannot be read") from error
        return arrow_table(str(self.file)).column(column).to_pylist()

    def rows(self, has_super: bool) -> dict[str, tuple[str, str]]:
        """Labels (super-category, sub-category) by image key; "." where all show the same."""
        if self.photo not in self.types:
            raise ValueError(f"{self.file} has no column {self.photo!r}")
        if SUPER in self.types and has_super:
            raise ValueError(f"{self.file}: data.super_category is for tables without that column")
        if SUPER not in self.types and not has_super:
            raise ValueError(
                f"{self.file} does not say what its photos show: --data.super_category bird"
            )
        subs = self.texts(self.label)
        supers = ["."] * len(subs) if has_super else self.texts(SUPER)
        keys = [f"{self.file}#{row}/{self.photo}/0" for row in range(len(subs))]
        return dict(zip(keys, zip(supers, subs, strict=True), strict=True))
