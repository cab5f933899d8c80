"""Readers: photos, stage-1 records and evaluation questions, each to one type.

No reader keeps pixels: a photo is carried by its key and decoded where it is needed. Every photo
is checked while reading, though, so that a bad file is named before the first step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from PIL import Image

from tercet.core.data.vision import MAX_ASPECT, load_image
from tercet.core.types import EvalQuestion, Partition, Photo

Split = Literal["train", "test", "stage1"]
OnBadImage = Literal["error", "skip"]

PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff"})


@dataclass(frozen=True)
class PhotoSet:
    """Labelled photos of one folder or JSON Lines file."""

    root: str
    """Folder that the photos' names are relative to."""
    photos: list[Photo]
    """Sorted by super-category, sub-category and key."""
    skipped: list[str]
    """Bad photos that were left out, with the reason."""
    partitions: dict[tuple[str, str], Partition] | None = None
    """Seen or unseen, for each (super-category, sub-category); None: still to be drawn."""
    splits: dict[str, Split] | None = None
    """Split by image key, "stage1" where stage 1 uses the photo already; None: to be drawn."""


@dataclass(frozen=True)
class SftSample:
    """One stage-1 conversation; its user turns hold one `<image>` per photo."""

    id: str
    messages: tuple[tuple[str, str], ...]
    """(role, content) in order; the last one is the only assistant turn."""
    images: tuple[str, ...]


def read_photos(path: str | Path, on_bad_image: OnBadImage = "error") -> PhotoSet:
    """Read labelled photos from a folder or a JSON Lines file.

    A folder is `<super_category>/<sub_category>/<photo>`. If it has a manifest.json with the lists
    `classes` (super_category, sub_category, partition) and `images` (path, super_category,
    sub_category, split), exactly the images of those classes are read. A line of JSON Lines is
    {"image", "super_category", "sub_category", "question"?}; paths are relative to the file.

    Args:
        path: the folder, or a file ending in .jsonl.
        on_bad_image: "error" raises for a bad photo, "skip" leaves it out and lists it.

    Returns:
        The photos in an order that does not depend on the file system, `_` in names as a space.

    Raises:
        ValueError: naming the folder, file and line, or photo at fault.
    """
    path = Path(os.path.abspath(path))
    if path.is_dir():
        root, listing = path, _read_listing(path / "manifest.json")
        photos, partitions, splits = listing or (list(_walk(path)), None, None)
    elif path.suffix == ".jsonl":
        root, photos, partitions, splits = path.parent, list(_read_photo_lines(path)), None, None
    else:
        raise ValueError(f"{path}: no such folder, nor a .jsonl file of photos")
    if not photos:
        raise ValueError(f"{path} holds no photos")
    photos.sort(key=lambda photo: (photo.super_category, photo.sub_category, photo.image))
    bad = check_images([photo.image for photo in photos], on_bad_image)
    photos = [photo for photo in photos if photo.image not in bad]
    return PhotoSet(str(root), photos, list(bad.values()), partitions, splits)


def read_sft(
    path: str | Path, on_bad_image: OnBadImage = "error"
) -> tuple[list[SftSample], list[str]]:
    """Read stage-1 records, a JSON list of {"messages": [...], "images": [...]}.

    Args:
        path: the JSON file; image paths are relative to its folder.
        on_bad_image: "error" raises for a bad photo, "skip" leaves its record out and lists it.

    Returns:
        The samples, and why each record that was left out was.

    Raises:
        ValueError: naming file and record at fault.
    """
    path = Path(os.path.abspath(path))
    records = _load_json(path)
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path} must hold a JSON list of at least one record")
    samples = [_sft_sample(record, path, index) for index, record in enumerate(records)]
    bad = check_images([image for sample in samples for image in sample.images], on_bad_image)
    kept, skipped = [], []
    for sample in samples:
        reasons = [bad[image] for image in sample.images if image in bad]
        if reasons:
            skipped.append(f"record {sample.id}: {reasons[0]}")
        else:
            kept.append(sample)
    return kept, skipped


def read_eval(path: str | Path) -> list[EvalQuestion]:
    """Read questions from JSON Lines of {"image_path", "question", "options", "ground_truth"}.

    `_` in names reads as a space. The super-category is the record's `super_category`, else the
    first folder of `image_path`; the partition is the record's `partition`, else the end of the
    file's name (`..._seen.jsonl`, `..._unseen.jsonl`). The photos are not looked at (see
    check_images).

    Args:
        path: the file; image paths are relative to its folder.

    Raises:
        ValueError: naming file, line and field at fault.
    """
    path = Path(os.path.abspath(path))
    questions = [_eval_question(record, path, where) for where, record in _json_lines(path)]
    if not questions:
        raise ValueError(f"{path} holds no questions")
    return questions


def check_images(keys: Iterable[str], on_bad_image: OnBadImage = "error") -> dict[str, str]:
    """Find the keys that load_image would refuse, for much less than decoding them all.

    A JPEG is decoded at an eighth of its size (the whole stream is read, so a cut-off file shows)
    and a PNG's checksums are compared; only other formats and suspects are decoded in full.

    Args:
        keys: image keys, repeated ones are looked at once.
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
        faults = zip(unique, pool.map(_fault, unique), strict=True)
        bad = {key: fault for key, fault in faults if fault}
    if bad and on_bad_image == "error":
        more = f" ({len(bad)} of {len(unique)} photos are bad)" if len(bad) > 1 else ""
        raise ValueError(
            f"{next(iter(bad.values()))}{more}; data.on_bad_image=skip leaves bad photos out"
        )
    return bad


def _fault(key: str) -> str | None:
    if _surely_good(key):
        return None
    try:
        load_image(key)
    except ValueError as error:
        return str(error)
    return None


def _surely_good(key: str) -> bool:
    try:
        with Image.open(key) as image:
            width, height = image.size
            if max(width, height) > MAX_ASPECT * min(width, height):
                return False
            if image.format == "JPEG":
                image.draft(image.mode, (max(1, width // 8), max(1, height // 8)))
                image.load()
            elif image.format == "PNG":
                image.verify()
            return image.format in ("JPEG", "PNG")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def _name(text: str) -> str:
    return " ".join(text.replace("_", " ").split())


def _walk(folder: Path) -> Iterator[Photo]:
    for super_folder in _folders(folder):
        if any(_is_photo(entry) for entry in super_folder.iterdir()):
            raise ValueError(
                f"{super_folder} holds photos; they must lie one folder deeper: "
                "<super_category>/<sub_category>/<photo>"
            )
        for sub_folder in _folders(super_folder):
            photos = [entry for entry in sub_folder.iterdir() if _is_photo(entry)]
            if not photos:
                allowed = " ".join(sorted(suffix[1:] for suffix in PHOTO_SUFFIXES))
                raise ValueError(f"{sub_folder} holds no photo ({allowed})")
            for photo in photos:
                yield Photo(str(photo), _name(super_folder.name), _name(sub_folder.name))


def _folders(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))


def _is_photo(path: Path) -> bool:
    return path.suffix.lower() in PHOTO_SUFFIXES and not path.name.startswith(".")


def _read_listing(path: Path):
    """Photos, partitions and splits of a folder's manifest.json; None where it gives no split."""
    listing = _load_json(path) if path.is_file() else None
    if not isinstance(listing, dict):
        return None
    given = [name for name in ("classes", "images") if name in listing]
    if not given:
        return None
    if len(given) == 1 or not all(isinstance(listing[name], list) for name in given):
        raise ValueError(f"{path}: a split needs the two lists 'classes' and 'images'")
    partitions: dict[tuple[str, str], Partition] = {}
    for index, entry in enumerate(listing["classes"]):
        where = f"{path}: classes[{index}]"
        partitions[_labels(entry, where)] = _partition(entry, where)
    photos, splits = [], {}
    for index, entry in enumerate(listing["images"]):
        where = f"{path}: images[{index}]"
        labels = _labels(entry, where)
        if labels not in partitions:
            continue
        if _says_partition(entry) and _partition(entry, where) != partitions[labels]:
            raise ValueError(
                f"{where}: partition {_partition(entry, where)!r} is not that of its class"
            )
        split = _one_of(entry, "split", ("train", "test"), where)
        image = os.path.normpath(path.parent / _text(entry, "path", where))
        _refuse_duplicate(image, splits, where)
        splits[image] = "stage1" if entry.get("in_stage1") else split
        photos.append(Photo(image, *labels, _question(entry, where)))
    return photos, partitions, splits


def _read_photo_lines(path: Path) -> Iterator[Photo]:
    read: dict[str, str] = {}
    for where, record in _json_lines(path):
        image = os.path.normpath(path.parent / _text(record, "image", where))
        _refuse_duplicate(image, read, where)
        read[image] = where
        yield Photo(image, *_labels(record, where), _question(record, where))


def _refuse_duplicate(image: str, read: dict, where: str) -> None:
    if image in read:
        raise ValueError(f"{where}: {image} is listed before; a photo has one label and one split")


def _labels(record: dict, where: str) -> tuple[str, str]:
    return (
        _name(_text(record, "super_category", where)),
        _name(_text(record, "sub_category", where)),
    )


def _says_partition(record: dict) -> bool:
    return "partition" in record or "world" in record


def _partition(record: dict, where: str) -> Partition:
    """`partition` of a record, or `world`, as older files call it."""
    field = "world" if "world" in record and "partition" not in record else "partition"
    return _one_of(record, field, get_args(Partition), where)


def _question(record: dict, where: str) -> str:
    return _text(record, "question", where) if "question" in record else ""


def _text(record: object, field: str, where: str) -> str:
    value = record.get(field) if isinstance(record, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {field!r} must be a text, got {value!r}")
    return value


def _one_of(record: dict, field: str, allowed: tuple[str, ...], where: str) -> str:
    value = record.get(field)
    if value not in allowed:
        raise ValueError(f"{where}: {field!r} must be {' or '.join(allowed)}, got {value!r}")
    return value


def _load_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: malformed JSON: {error.msg}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: malformed JSON line: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: a line must be a JSON object, got {record!r}")
        yield where, record


def _sft_sample(record: object, path: Path, index: int) -> SftSample:
    where = f"{path}: record {index}"
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        raise ValueError(f"{where}: needs a list 'messages'")
    images = record.get("images")
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ValueError(f"{where}: 'images' must be a list of paths, got {images!r}")
    messages = tuple(
        (
            _one_of(message, "role", ("system", "user", "assistant"), where),
            _text(message, "content", where),
        )
        for message in record["messages"]
    )
    roles = [role for role, _ in messages]
    if roles.count("assistant") != 1 or roles[-1] != "assistant":
        raise ValueError(
            f"{where}: needs exactly one assistant message, the last one; its roles are {roles}"
        )
    pads = sum(content.count("<image>") for role, content in messages if role == "user")
    if pads != len(images):
        raise ValueError(f"{where}: {pads} <image> in its user turns, but {len(images)} images")
    keys = tuple(os.path.normpath(path.parent / image) for image in images)
    return SftSample(f"{path.stem}/{index}", messages, keys)


def _eval_question(record: dict, path: Path, where: str) -> EvalQuestion:
    image = _text(record, "image_path", where)
    options = record.get("options")
    if not isinstance(options, list) or not all(isinstance(name, str) for name in options):
        raise ValueError(f"{where}: 'options' must be a list of names, got {options!r}")
    names = tuple(_name(option) for option in options)
    truth = _name(_text(record, "ground_truth", where))
    if truth not in names:
        raise ValueError(f"{where}: ground_truth {truth!r} is not among the options {names}")
    super_category = image.split("/")[0] if "/" in image else ""
    if "super_category" in record:
        super_category = _text(record, "super_category", where)
    partition = path.stem.rpartition("_")[2]
    partition = partition if partition in get_args(Partition) else ""
    if _says_partition(record):
        partition = _partition(record, where)
    return EvalQuestion(
        image=os.path.normpath(path.parent / image),
        question=_text(record, "question", where),
        options=names,
        truth=truth,
        super_category=_name(super_category),
        partition=partition,
    )
