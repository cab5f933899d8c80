"""A contact sheet of triplets: a person judges them in a minute, before anything is trained."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tercet.core.data.manifest import Manifest
from tercet.core.data.vision import load_image
from tercet.core.draws import seeded_order
from tercet.core.types import Anchor

SHEET_NAME = "triplets.png"
CELL = 224
"""Pixels of a photo's side."""
TEXT = 56
"""Pixels for the names below it."""
GAP = 8
MOST_CHARS = 34
"""Of a line of a name, which may have two."""


def draw_sheet(manifest: Manifest, path: Path, most: int) -> int:
    """Draw anchors with their first positive and negative, names and cosine, two in a row.

    Each sub-category has at most one anchor on the sheet.

    Args:
        manifest: with at least one anchor.
        path: the PNG; it appears only when it is complete.
        most: anchors on the sheet.

    Returns:
        How many there are.
    """
    by_class: dict[tuple[str, str], Anchor] = {}
    for anchor in manifest.anchors:
        by_class.setdefault((anchor.super_category, anchor.sub_category), anchor)
    ids = {anchor.id: anchor for anchor in by_class.values()}
    chosen = [ids[name] for name in sorted(seeded_order(ids, "sheet")[:most])]
    labels = {anchor.image: anchor.sub_category for anchor in manifest.anchors}
    rows = (len(chosen) + 1) // 2
    width, height = 6 * (CELL + GAP) + 3 * GAP, rows * (CELL + TEXT + GAP) + GAP
    sheet = Image.new("RGB", (width, height), "white")
    for index, anchor in enumerate(chosen):
        left = GAP + index % 2 * (3 * (CELL + GAP) + GAP)
        top = GAP + index // 2 * (CELL + TEXT + GAP)
        _draw(sheet, left, top, anchor, labels, manifest.cosines)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    sheet.save(unfinished, "PNG")
    os.replace(unfinished, path)
    return len(chosen)


def _draw(
    sheet: Image.Image,
    left: int,
    top: int,
    anchor: Anchor,
    labels: dict[str, str],
    cosines: dict[str, dict[str, float]],
) -> None:
    """An anchor, its positive and its negative from left to right."""
    draw = ImageDraw.Draw(sheet)
    cosine = cosines.get(anchor.super_category, {}).get(anchor.sub_category)
    negative = f"negative, nearest {cosine:.3f}" if cosine is not None else "negative"
    kinds = ("anchor", "positive", negative)
    keys = (anchor.image, anchor.positives[0], anchor.negatives[0])
    for place, (kind, key) in enumerate(zip(kinds, keys, strict=True)):
        x = left + place * (CELL + GAP)
        photo = load_image(key)
        photo.thumbnail((CELL, CELL), Image.Resampling.BICUBIC)
        sheet.paste(photo, (x + (CELL - photo.width) // 2, top + (CELL - photo.height) // 2))
        name = "\n".join(textwrap.wrap(labels.get(key, ""), MOST_CHARS, max_lines=2))
        draw.text((x, top + CELL + 2), f"{kind}\n{name}", fill="black", font=_font())


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(14)
