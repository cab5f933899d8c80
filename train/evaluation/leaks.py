"""Photos that stand both in training and in the questions: the same pixels, or nearly the same."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import imagehash
import numpy as np

from tercet.core.data.fields import load_json
from tercet.core.data.manifest import Manifest
from tercet.core.data.records import read_sft
from tercet.core.data.vision import load_image
from tercet.core.types import EvalQuestion
from tercet.train.evaluation.answer_file import Place

BITS = 64
"""Of a perceptual hash: the signs of the 8 x 8 lowest frequencies against their median."""
ROWS_AT_ONCE = 256
_ONES = np.array([bin(n).count("1") for n in range(1 << 16)], np.uint8)
"""Bits that are set in each 16-bit number."""


@dataclass(frozen=True)
class Leak:
    """A question whose photo was trained on."""

    question: EvalQuestion
    training_photo: str
    same_pixels: bool
    distance: int
    """Bits in which the perceptual hashes differ; 0 for the same pixels."""


@dataclass(frozen=True)
class Leaks:
    """What a search found."""

    found: list[Leak]
    distance: int
    """Up to which photos count as nearly the same."""
    unreadable: int
    """Photos of questions that could not be read: nothing is known of them."""
    pairs: int
    """Of different photos of one sub-category among the questions."""
    near_pairs: int
    """Of these, within the distance: so often the perceptual hash errs (or they are copies)."""

    @property
    def places(self) -> set[Place]:
        return {(leak.question.file, leak.question.line) for leak in self.found}

    def remark(self, dropped: bool) -> str:
        """A line below the tables."""
        same = sum(leak.same_pixels for leak in self.found)
        unread = f"; {self.unreadable} photos could not be read" if self.unreadable else ""
        return (
            f"{len(self.found)} questions show a training photo ({same} the same pixels, "
            f"{len(self.found) - same} within {self.distance} of {BITS} bits of the perceptual "
            f"hash){': left out' if dropped and self.found else ''}{unread}; of {self.pairs:,} "
            f"pairs of different photos of one sub-category, {self.near_pairs:,} are as near"
        )


def training_photos(path: str) -> list[str]:
    """Keys of the photos that a triplets.json or a file of stage-1 records names.

    Raises:
        ValueError: naming the file at fault.
    """
    if not Path(path).is_dir() and isinstance(load_json(Path(path)), list):
        samples, _ = read_sft(path, "skip")
        return list(dict.fromkeys(image for sample in samples for image in sample.images))
    manifest = Manifest.read(path)
    keys = [key for a in manifest.anchors for key in (a.image, *a.positives, *a.negatives)]
    return list(dict.fromkeys([*keys, *(photo.image for photo in manifest.sft)]))


def find_leaks(
    questions: Sequence[EvalQuestion],
    training: Iterable[str],
    distance: int,
    on_photo: Callable[[], None] = lambda: None,
) -> Leaks:
    """Search the questions' photos for those of training.

    Args:
        questions: with the keys of their photos; without one nothing is known.
        training: keys of photos.
        distance: most bits in which perceptual hashes may differ.
        on_photo: called for each distinct photo that was read or could not be.

    Returns:
        One leak for each question, to the nearest training photo.
    """
    keys = list(training)
    asked = list(dict.fromkeys(q.image for q in questions if q.image))
    hashes = {}
    for key in dict.fromkeys([*keys, *asked]):
        hashes[key] = _hashes(key)
        on_photo()
    trained = [key for key in keys if hashes[key]]
    readable = [key for key in asked if hashes[key]]
    nearest = _nearest([hashes[k][1] for k in readable], [hashes[k][1] for k in trained])
    by_pixels = {hashes[key][0]: key for key in reversed(trained)}
    leaks = {}
    for key, (place, bits) in zip(readable, nearest, strict=True):
        same = by_pixels.get(hashes[key][0])
        if same is not None:
            leaks[key] = same, True, 0
        elif bits <= distance:
            leaks[key] = trained[place], False, bits
    found = [Leak(q, *leaks[q.image]) for q in questions if q.image in leaks]
    pairs, near = _pairs(questions, hashes, distance)
    unreadable = sum(not (q.image and hashes[q.image]) for q in questions)
    return Leaks(found, distance, unreadable, pairs, near)


def _hashes(key: str) -> tuple[bytes, np.ndarray] | None:
    """Digest of a photo's pixels and its perceptual hash as [4] uint16; None: it is unreadable."""
    try:
        image = load_image(key)
    except (OSError, ValueError):
        return None
    pixels = blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16).digest()
    bits = imagehash.phash(image).hash.ravel()
    return pixels, np.packbits(bits).view(np.uint16)


def _distances(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[N, M] bits in which [N, 4] and [M, 4] uint16 differ."""
    return _ONES[one[:, None] ^ others[None]].sum(axis=2, dtype=np.uint8)


def _nearest(asked: list[np.ndarray], trained: list[np.ndarray]) -> list[tuple[int, int]]:
    """For each photo of the questions the place of the nearest training photo, and its distance."""
    if not trained:
        return [(0, BITS + 1)] * len(asked)
    found, others = [], np.stack(trained)
    for start in range(0, len(asked), ROWS_AT_ONCE):
        distances = _distances(np.stack(asked[start : start + ROWS_AT_ONCE]), others)
        places = distances.argmin(axis=1)
        found += zip(places.tolist(), distances.min(axis=1).tolist(), strict=True)
    return found


def _pairs(questions, hashes: dict, distance: int) -> tuple[int, int]:
    """Pairs of photos with different pixels of one sub-category; those within the distance."""
    by_class = defaultdict(dict)
    for q in questions:
        if q.image and hashes[q.image]:
            pixels, bits = hashes[q.image]
            by_class[q.dataset, q.truth][pixels] = bits
    pairs = near = 0
    for of in by_class.values():
        bits = np.stack(list(of.values()))
        pairs += len(bits) * (len(bits) - 1) // 2
        for n in range(len(bits) - 1):
            near += int((_distances(bits[n : n + 1], bits[n + 1 :]) <= distance).sum())
    return pairs, near


def write_leaks(leaks: Leaks, path: Path) -> None:
    """Write the leaks as CSV."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["questions", "line", "image", "training_photo", "same_pixels", "distance"])
        for leak in leaks.found:
            q = leak.question
            same = int(leak.same_pixels)
            writer.writerow([q.file, q.line, q.path, leak.training_photo, same, leak.distance])
