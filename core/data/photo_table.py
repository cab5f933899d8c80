"""Labelled photos from a CSV table: image, sub_category, and where wanted more columns."""

from __future__ import annotations

import os
from pathlib import Path

from tercet.core.data.fields import as_words, csv_rows, text_of
from tercet.core.data.files import shown
from tercet.core.data.layouts import SPLITS, Split
from tercet.core.types import Photo

SUPER = "super_category"


def read_photo_table(
    path: Path, super_category: str | None = None
) -> tuple[list[Photo], dict[str, Split] | None]:
    """Read photos from the rows of a CSV file.

    Its columns are image (relative to the file), sub_category, and optionally super_category, split
    (the words of core.data.layouts.SPLITS) and question; others are ignored.

    Args:
        path: the file.
        super_category: what all photos show, where the table does not say.

    Returns:
        The photos, and the split by image key; None without that column.

    Raises:
        ValueError: naming file and line at fault, or a photo that is listed twice.
    """
    needed = ("image", "sub_category") if super_category else ("image", "sub_category", SUPER)
    photos, splits = [], {}
    is_split = False
    for where, row in csv_rows(path, needed):
        image = os.path.normpath(path.parent / text_of(row, "image", where))
        if image in splits:
            raise ValueError(f"{where}: {image} is listed before; a photo has one label")
        shows = super_category or text_of(row, SUPER, where)
        if super_category and row.get(SUPER):
            raise ValueError(f"{where}: data.super_category is for tables without that column")
        is_split = "split" in row
        split = (row["split"] or "").strip().lower() if is_split else "train"
        if split not in SPLITS:
            raise ValueError(f"{where}: 'split' must be train, valid or test, got {shown(split)}")
        splits[image] = SPLITS[split]
        question = text_of(row, "question", where) if row.get("question") else ""
        name = as_words(text_of(row, "sub_category", where))
        photos.append(Photo(image, as_words(shows), name, question))
    return photos, splits if is_split else None
