"""Which photos stage 1 learns from: those set aside in triplets.json, or drawn from a photo set."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from tercet.core.data.manifest import MANIFEST_NAME, Manifest
from tercet.core.data.photos import OnBadImage, check_images, read_photos
from tercet.core.data.questions import QUESTIONS, questions_for
from tercet.core.draws import seeded_int, seeded_order
from tercet.core.types import Photo


def stage1_photos(
    path: Path, per_class: int, on_bad_image: OnBadImage = "error", seed: int = 0
) -> tuple[list[Photo], list[str]]:
    """Photos for stage 1, each with a question.

    Args:
        path: a triplets.json or its folder: exactly its stage-1 photos. Else a photo set as
            core.data.photos reads it: at most `per_class` photos of each seen sub-category, those
            marked for stage 1 first, none that is held out.
        per_class: photos of a sub-category of a photo set.
        on_bad_image: "error" raises for a bad photo, "skip" leaves it out.
        seed: of the drawn photos and questions.

    Returns:
        The photos, and remarks.

    Raises:
        ValueError: naming the file or photo at fault, or a path without photos for stage 1.
    """
    if path.name == MANIFEST_NAME or (path / MANIFEST_NAME).is_file():
        photos = Manifest.read(path).sft
        bad = check_images([photo.image for photo in photos], on_bad_image)
        photos = [photo for photo in photos if photo.image not in bad]
        if not photos:
            raise ValueError(f"{path} sets no photo aside for stage 1: data.sft_shots was 0")
        return photos, [f"left out: {reason}" for reason in bad.values()]
    found = read_photos(path, on_bad_image)
    by_class: dict[tuple[str, str], dict[str, Photo]] = defaultdict(dict)
    for photo in found.photos:
        labels = (photo.super_category, photo.sub_category)
        seen = found.partitions is None or found.partitions[labels] == "seen"
        if seen and (found.splits is None or found.splits[photo.image] != "test"):
            by_class[labels][photo.image] = photo
    chosen = []
    for photos in by_class.values():
        keys = {os.path.relpath(key, found.root): key for key in photos}
        order = [keys[name] for name in seeded_order(keys, seed, "stage1")]
        if found.splits is not None:
            order.sort(key=lambda key: found.splits[key] != "stage1")
        chosen += [_asked(photos[key], found.root, seed) for key in order[:per_class]]
    if not chosen:
        raise ValueError(f"{path} has no photo of a seen sub-category that is not held out")
    remarks = [*found.notes, *(f"left out: {reason}" for reason in found.skipped)]
    if found.splits is None:
        remarks.append(
            "nothing says which photos are held out: make triplets first where TAPO is to follow"
        )
    return chosen, remarks


def _asked(photo: Photo, root: str, seed: int) -> Photo:
    if photo.question:
        return photo
    asked = questions_for(photo.super_category, QUESTIONS)
    name = os.path.relpath(photo.image, root)
    return replace(photo, question=asked[seeded_int(seed, "question", name) % len(asked)])
