"""Triplets in the released Parquet columns: problem, images, answer, image_noisy, image_aug.

`image_noisy` is the positive and `image_aug` the negative. The released trainer reuses the
anchor's expanded image tokens for the other two photos, so the three photos of a written row have
one size. It adds the stage-2 instruction itself, so `problem` is written without it. The reader
asks for neither.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tercet.core.data.fields import as_words
from tercet.core.data.files import check_text, regular
from tercet.core.data.vision import load_image
from tercet.core.names import refuse_alike
from tercet.core.prompts import IMAGE_MARKER, STAGE2_INSTRUCTION
from tercet.core.types import Anchor

IMAGE_COLUMNS = ("images", "image_noisy", "image_aug")
TEXT_COLUMNS = ("problem", "answer")
ROWS_AT_ONCE = 64
Resized = Callable[[int, int], tuple[int, int]]

_PHOTOS = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
_SCHEMA = pa.schema(
    [
        ("problem", pa.string()),
        ("images", _PHOTOS),
        ("answer", pa.string()),
        ("image_noisy", _PHOTOS),
        ("image_aug", _PHOTOS),
    ]
)


def read_parquet(
    path: str | Path, on_missing: Literal["error", "anchor"] = "error"
) -> list[Anchor]:
    """Read triplets from Parquet, one anchor a row; the photos themselves are not checked.

    A photo cell holds one photo or a list of them; a photo is its bytes, its path, or a struct of
    both. `<image>` and the stage-2 instruction are removed from `problem`. The super-category is
    not known and stays empty. `_` in an answer is read as a space.

    Args:
        path: a Parquet file, a folder of them, or the clone of a data set (see `parquet_files`).
        on_missing: without a positive or a negative, "error" raises, with "anchor" the anchor
            stands for it.

    Returns:
        Anchors with image keys `file.parquet#row/column/index`, in the order of the rows.

    Raises:
        ValueError: naming file and column, or file, row and column, at fault.
    """
    path = Path(os.path.abspath(path))
    anchors = [anchor for file in parquet_files(path)[0] for anchor in _read_file(file, on_missing)]
    if not anchors:
        raise ValueError(f"{path} holds no Parquet rows")
    refuse_alike(((a.super_category, a.sub_category) for a in anchors), path)
    return anchors


def parquet_files(path: Path) -> tuple[list[Path], list[Path]]:
    """The Parquet files that `path` stands for, itself or those in it, and those left out.

    The clone of a data set holds them in its folder `data`. Names begin with the split: where some
    begin with `train`, the others are left out.
    """
    if not path.is_dir():
        return ([path] if path.suffix == ".parquet" else []), []
    found = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
    chosen = [file for file in found if re.match(r"train\b", file.name)] or found
    return chosen, [file for file in found if file not in chosen]


def write_parquet(anchors: Iterable[Anchor], path: str | Path, resized: Resized) -> None:
    """Write each anchor with its first positive and negative, the three photos in one size.

    It is the size that the image processor would give the anchor, so a policy with the same pixel
    limits does not resize the photos again. They are stored as JPEG, quality 95, full chroma.

    Args:
        anchors: at least one, each with a positive and a negative.
        path: the file; it appears only when it is complete.
        resized: from a photo's height and width, in pixels, to those that the policy's image
            processor gives it.

    Raises:
        ValueError: naming the photo that cannot be read.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with pq.ParquetWriter(unfinished, _SCHEMA) as writer:
            rows: list[dict] = []
            for anchor in anchors:
                rows.append(_row(anchor, resized))
                if len(rows) == ROWS_AT_ONCE:
                    writer.write_table(pa.Table.from_pylist(rows, _SCHEMA))
                    rows = []
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, _SCHEMA))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _row(anchor: Anchor, resized: Resized) -> dict:
    photo = load_image(anchor.image)
    height, width = resized(photo.height, photo.width)
    keys = (anchor.image, anchor.positives[0], anchor.negatives[0])
    cells = {
        column: [{"bytes": _jpeg(load_image(key), (width, height)), "path": Path(key).name}]
        for column, key in zip(IMAGE_COLUMNS, keys, strict=True)
    }
    return {"problem": IMAGE_MARKER + anchor.question, "answer": anchor.sub_category, **cells}


def _jpeg(photo: Image.Image, size: tuple[int, int]) -> bytes:
    stored = BytesIO()
    photo.resize(size, Image.Resampling.BICUBIC).save(stored, "JPEG", quality=95, subsampling=0)
    return stored.getvalue()


def _read_file(path: Path, on_missing: str) -> Iterator[Anchor]:
    try:
        regular(path)
        with pq.ParquetFile(path) as file:
            yield from _read_rows(file, path, on_missing)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read as Parquet: {reason}{_hint(path)}") from error


def _hint(path: Path) -> str:
    if path.is_file() and path.stat().st_size < 1000 and b"git-lfs" in path.read_bytes():
        return " (it stands for a file that `git lfs pull` downloads)"
    return ""


def _read_rows(file: pq.ParquetFile, path: Path, on_missing: str) -> Iterator[Anchor]:
    needed = [*TEXT_COLUMNS, *IMAGE_COLUMNS]
    if on_missing == "anchor":
        has = file.schema_arrow.names
        needed = [name for name in needed if name in has or name not in IMAGE_COLUMNS[1:]]
    for column in needed:
        if file.schema_arrow.names.count(column) != 1:
            has = "several columns" if column in file.schema_arrow.names else "no column"
            raise ValueError(f"{path} has {has} {column!r}; needed: {', '.join(needed)}")
    row = 0
    for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=needed):
        for index in range(batch.num_rows):
            cells = {name: batch.column(name)[index] for name in needed}
            yield _anchor(cells, path, row, on_missing)
            row += 1


def _anchor(cells: dict[str, pa.Scalar], path: Path, row: int, on_missing: str) -> Anchor:
    where = f"{path}#{row}"
    texts = {name: cells[name].as_py() for name in TEXT_COLUMNS}
    for name, text in texts.items():
        check_text(text, f"{where}: column {name!r}", markers=name == "problem")
    keys = {}
    for name in IMAGE_COLUMNS:
        count = _num_photos(cells[name]) if name in cells else 0
        keys[name] = tuple(f"{where}/{name}/{i}" for i in range(count))
        if not keys[name] and on_missing == "anchor" and name != "images":
            keys[name] = keys["images"][:1]
        if not keys[name]:
            raise ValueError(f"{where}: column {name!r} holds no photo")
    problem = texts["problem"]
    if len(keys["images"]) > 1 or problem.count(IMAGE_MARKER) > 1:
        raise ValueError(
            f"{where}: a row has one photo and one {IMAGE_MARKER}, got {len(keys['images'])} "
            f"photos and {problem.count(IMAGE_MARKER)} {IMAGE_MARKER}"
        )
    question = problem.replace(IMAGE_MARKER, "").strip().removesuffix(STAGE2_INSTRUCTION).strip()
    return Anchor(
        id=f"{path.name}#{row}",
        image=keys["images"][0],
        positives=keys["image_noisy"],
        negatives=keys["image_aug"],
        question=question,
        super_category="",
        sub_category=as_words(texts["answer"]),
    )


def _num_photos(cell: pa.Scalar) -> int:
    if not cell.is_valid:
        return 0
    return len(cell) if isinstance(cell, pa.ListScalar | pa.LargeListScalar) else 1
