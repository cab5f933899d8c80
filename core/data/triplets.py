"""Photos to triplets: which sub-categories are seen, what each photo is for, what looks alike.

Every choice ranks its candidates by blake2b(seed, purpose, candidate). It depends on the seed and
on names alone, not on the order of the files or the folder that they are in.
"""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor

from tercet.core.config import DataConfig
from tercet.core.data.copies import spoilt_tests
from tercet.core.data.labelled_tables import table_files
from tercet.core.data.manifest import MANIFEST_NAME, Manifest
from tercet.core.data.negatives import (
    Embed,
    Similar,
    SubCategory,
    choose_negatives,
    find_similar,
    neighbours_note,
    read_genera,
)
from tercet.core.data.parquet import parquet_files, read_parquet
from tercet.core.data.photos import PhotoSet, read_photos
from tercet.core.data.questions import questions_for, read_questions
from tercet.core.draws import seeded_int, seeded_order
from tercet.core.types import Anchor, EvalQuestion, Partition, Photo, Triplet

MAX_OPTIONS = 4
MOST_LINES = 20
"""Of copies that are listed one by one."""


def prepare_manifest(config: DataConfig, embed: Embed) -> Manifest:
    """Read or make the triplets that `config.path` stands for.

    A triplets.json (or its folder) is read back; its choices hold, whatever the other options say.
    A Parquet file of triplets (or a folder of them) gives its rows as they are. For labelled photos
    (see `read_photos`) everything is chosen here, with a warning where there are too few.

    Args:
        config: path, split, shots, question templates, seed.
        embed: image keys to [N, D] embeddings; called once, and only where choices are made.

    Raises:
        ValueError: naming the file, photo, sub-category or option at fault.
    """
    if not config.path:
        raise ValueError("data.path is empty: give a manifest, folder, .jsonl or .parquet file")
    path = Path(config.path)
    if path.name == MANIFEST_NAME or (path / MANIFEST_NAME).is_file():
        return Manifest.read(path).without_bad(config.on_bad_image)
    files, others = parquet_files(path)
    if files and not table_files(path):
        return _from_rows(path, [file.name for file in others], config)
    if not 0 < config.seen_fraction <= 1:
        raise ValueError(f"data.seen_fraction must lie in (0, 1], got {config.seen_fraction}")
    least = 1 if config.on_missing == "anchor" else 2
    if config.shots < least or config.sft_shots < 0:
        raise ValueError(
            f"data.shots must be at least {least} (a photo and its positive) and data.sft_shots at "
            f"least 0, got {config.shots} and {config.sft_shots}"
        )
    if config.negatives == "genus" and config.genus is None:
        raise ValueError("data.negatives=genus needs data.genus, a CSV of sub_category,genus")
    photos = read_photos(path, config.on_bad_image, config.names, config.super_category)
    return _choose(photos, config, embed)


def draw_triplet(
    anchor: Anchor, epoch: int, seed: int, positive: Literal["redraw", "fixed"] = "redraw"
) -> Triplet:
    """The triplet of an anchor in an epoch.

    Args:
        anchor: with at least one positive and one negative.
        epoch: from 0.
        seed: together with epoch and anchor.id it decides what is drawn.
        positive: "redraw" draws positive and negative in every epoch, "fixed" takes the first ones.

    Raises:
        ValueError: `positive` is something else, or there is nothing to draw from.
    """
    if positive not in ("redraw", "fixed"):
        raise ValueError(f"data.positive must be 'redraw' or 'fixed', got {positive!r}")
    if not anchor.positives or not anchor.negatives:
        raise ValueError(f"anchor {anchor.id!r} needs at least one positive and one negative")

    def draw(name: str, keys: tuple[str, ...]) -> str:
        fixed = positive == "fixed"
        return keys[0 if fixed else seeded_int(seed, epoch, anchor.id, name) % len(keys)]

    return Triplet(
        id=anchor.id,
        anchor=anchor.image,
        positive=draw("positive", anchor.positives),
        negative=draw("negative", anchor.negatives),
        question=anchor.question,
        super_category=anchor.super_category,
        sub_category=anchor.sub_category,
    )


def eval_questions(
    manifest: Manifest, partition: Partition, per_class: int | None = None, seed: int = 0
) -> list[EvalQuestion]:
    """Questions about held-out photos, each with the true name and up to three others as options.

    The others come from the same super-category, seen and unseen alike: first the most similar
    ones, where these are known, then drawn ones.

    Args:
        manifest: the questions are about its `test` photos.
        partition: seen or unseen.
        per_class: photos of each sub-category, drawn; None: all.
        seed: of the drawn photos and names, and of the order of the options.

    Raises:
        ValueError: an unknown partition, or one without test photos.
    """
    if partition not in get_args(Partition):
        raise ValueError(f"partition must be 'seen' or 'unseen', got {partition!r}")
    if not manifest.test[partition]:
        raise ValueError(f"the manifest holds no test photos of {partition} sub-categories")
    root = manifest.common_folder()
    questions = []
    for (super_category, truth), photos in sorted(_by_class(manifest.test[partition]).items()):
        ids = {os.path.relpath(photo.image, root): photo for photo in photos}
        others = [name for name in manifest.names[super_category] if name != truth]
        known = manifest.look_alikes or manifest.nearest
        near = known.get(super_category, {}).get(truth, [])
        for photo_id in seeded_order(ids, seed, "test")[:per_class]:
            drawn = seeded_order(others, seed, "others", photo_id)
            wrong = list(dict.fromkeys([*near, *drawn]))[: MAX_OPTIONS - 1]
            options = tuple(seeded_order([truth, *wrong], seed, "options", photo_id))
            image, question = ids[photo_id].image, ids[photo_id].question
            questions.append(
                EvalQuestion(image, question, options, truth, super_category, partition)
            )
    return questions


def draw_partitions(
    classes: Iterable[SubCategory], seen_fraction: float, seed: int
) -> dict[SubCategory, Partition]:
    """Draw which sub-categories are seen.

    Args:
        classes: (super-category, sub-category) pairs.
        seen_fraction: share of each super-category's sub-categories that is seen, rounded; at least
            2 are seen where there are 2.
        seed: of the draw.
    """
    subs = defaultdict(list)
    for super_category, sub_category in classes:
        subs[super_category].append(sub_category)
    partitions: dict[SubCategory, Partition] = {}
    for super_category, names in subs.items():
        num_seen = max(2, round(seen_fraction * len(names)))
        for rank, name in enumerate(seeded_order(names, seed, "seen", super_category)):
            partitions[super_category, name] = "seen" if rank < num_seen else "unseen"
    return partitions


@dataclass(frozen=True)
class _Shots:
    """The photos chosen for TAPO, for stage 1 and for the tests."""

    tapo: dict[SubCategory, list[Photo]]
    sft: list[Photo]
    test: dict[Partition, list[Photo]]


def _from_rows(path: Path, left_out: list[str], config: DataConfig) -> Manifest:
    if config.names is not None:
        raise ValueError(f"data.names is for folders of photos by sub-category, not for {path}")
    anchors = read_parquet(path, config.on_missing)
    names = {"": sorted({anchor.sub_category for anchor in anchors})}
    notes = [f"Parquet files of other splits left out: {', '.join(left_out)}"] if left_out else []
    test = {"seen": [], "unseen": []}
    manifest = Manifest(anchors, [], test, names, {}, asdict(config), notes=notes)
    return manifest.without_bad(config.on_bad_image)


def _choose(photo_set: PhotoSet, config: DataConfig, embed: Embed) -> Manifest:
    # In here a photo's key is its path below the root, so that no draw depends on the root.
    root = photo_set.root
    templates = read_questions(config.questions)
    photos = [_local(photo, root, templates, config.seed) for photo in photo_set.photos]
    splits = photo_set.splits and {os.path.relpath(k, root): s for k, s in photo_set.splits.items()}
    classes = _by_class(photos)
    partitions = photo_set.partitions or _draw(classes, splits, config)
    shots = _choose_shots(classes, partitions, splits, config)
    _check_shots(shots, config)
    shots, notes = _without_copies(shots, root, config)
    similar, genera = Similar(), {}
    if config.negatives != "random":

        def embed_below(keys: list[str]) -> Tensor:
            return embed([os.path.join(root, key) for key in keys])

        unseen = {n: of[: config.shots] for n, of in _by_class(shots.test["unseen"]).items()}
        similar = find_similar(shots.tapo, unseen, embed_below, config.similarity)
    if config.genus is not None:
        genera = read_genera(config.genus)
        if similar.nearest:
            layer = "" if config.embedder_layer is None else f", layer {config.embedder_layer}"
            notes.append(neighbours_note(similar, genera, config.embedder + layer))
    names = defaultdict(list)
    for super_category, sub_category in sorted(partitions):
        names[super_category].append(sub_category)
    manifest = Manifest(
        anchors=_anchors(shots.tapo, similar, genera, config),
        sft=shots.sft,
        test=shots.test,
        names=dict(names),
        nearest=_most_similar(similar.nearest),
        look_alikes=_most_similar(similar.look_alikes),
        settings=asdict(config),
        skipped=photo_set.skipped,
        notes=[*photo_set.notes, *notes],
        cosines=similar.cosines,
    )
    return manifest.with_keys(lambda key: os.path.normpath(os.path.join(root, key)))


def _local(photo: Photo, root: str, templates: dict[str, tuple[str, ...]], seed: int) -> Photo:
    name, question = os.path.relpath(photo.image, root), photo.question
    if not question:
        asked = questions_for(photo.super_category, templates)
        question = asked[seeded_int(seed, "question", name) % len(asked)]
    return replace(photo, image=name, question=question)


def _draw(
    classes: dict[SubCategory, list[Photo]], splits: Mapping[str, str] | None, config: DataConfig
) -> dict[SubCategory, Partition]:
    """Draw what is seen among the sub-categories that can be trained on; the others are unseen."""
    usable = [
        labels
        for labels, photos in classes.items()
        if splits is None or any(splits[photo.image] == "train" for photo in photos)
    ]
    drawn = draw_partitions(usable, config.seen_fraction, config.seed)
    return {labels: drawn.get(labels, "unseen") for labels in classes}


def _by_class(photos: Iterable[Photo]) -> dict[SubCategory, list[Photo]]:
    classes = defaultdict(list)
    for photo in photos:
        classes[photo.super_category, photo.sub_category].append(photo)
    return dict(classes)


def _choose_shots(
    classes: dict[SubCategory, list[Photo]],
    partitions: dict[SubCategory, Partition],
    splits: Mapping[str, str] | None,
    config: DataConfig,
) -> _Shots:
    shots = _Shots({}, [], {"seen": [], "unseen": []})
    for labels in sorted(partitions):
        photos = {photo.image: photo for photo in classes.get(labels, [])}
        order = [photos[key] for key in seeded_order(photos, config.seed, "shots")]
        if splits is not None:
            train, stage1, test = (
                [photo for photo in order if splits[photo.image] == split]
                for split in ("train", "stage1", "test")
            )
        elif partitions[labels] == "seen":
            train, stage1, test = order, [], order[config.shots + config.sft_shots :]
        else:
            train, stage1, test = [], [], order
        shots.test[partitions[labels]].extend(test)
        if partitions[labels] == "seen":
            # TAPO gets its photos first: stage 1 can do without some sub-categories.
            shots.tapo[labels] = train[: config.shots]
            shots.sft.extend([*stage1, *train[config.shots :]][: config.sft_shots])
    return shots


def _without_copies(shots: _Shots, root: str, config: DataConfig) -> tuple[_Shots, list[str]]:
    """The shots without test photos that training spoils, and lines about them."""
    learnt = [photo for photos in shots.tapo.values() for photo in photos] + shots.sft
    tests = [*shots.test["seen"], *shots.test["unseen"]]
    paths = {photo.image: os.path.join(root, photo.image) for photo in learnt + tests}
    spoilt, lines = spoilt_tests(learnt, tests, paths)
    if lines and config.duplicates == "error":
        raise ValueError(f"{root}: {lines[0]} ({len(lines)} such groups); data.duplicates=report")
    test = {p: [photo for photo in of if photo.image not in spoilt] for p, of in shots.test.items()}
    more = [f"{len(lines) - MOST_LINES} more such photos"] if len(lines) > MOST_LINES else []
    return replace(shots, test=test), lines[:MOST_LINES] + more


def _check_shots(shots: _Shots, config: DataConfig) -> None:
    may_lack = config.on_missing == "anchor"
    seen = defaultdict(list)
    for (super_category, name), photos in shots.tapo.items():
        seen[super_category].append(name)
        if len(photos) < (1 if may_lack else 2):
            raise ValueError(
                f"sub-category {name!r} of {super_category!r} has {len(photos)} training photo(s), "
                "so no positive can be drawn: add photos or leave it out"
            )
    for super_category, names in seen.items():
        if len(names) < 2 and not may_lack:
            raise ValueError(
                f"super-category {super_category!r} has one seen sub-category, {names[0]!r}, so no "
                "negative can be drawn: add sub-categories (or mark more as seen) or leave it out"
            )
    if not seen:
        raise ValueError("no sub-category is marked as seen: nothing can be trained on")
    few = [f"{k[1]} ({len(v)})" for k, v in shots.tapo.items() if len(v) < config.shots]
    if few:
        warnings.warn(
            f"{len(few)} of {len(shots.tapo)} seen sub-categories have fewer training photos than "
            f"data.shots = {config.shots}: {', '.join(few[:5])}{', ...' if few[5:] else ''}",
            stacklevel=4,
        )
    if len(shots.sft) < config.sft_shots * len(shots.tapo):
        warnings.warn(
            f"{len(shots.sft)} photos are left for stage 1, fewer than data.sft_shots = "
            f"{config.sft_shots} for each of {len(shots.tapo)} seen sub-categories",
            stacklevel=4,
        )


def _most_similar(ranked: Mapping[str, dict[str, list[str]]]) -> dict[str, dict[str, list[str]]]:
    """The most similar others of each name, as many as a question has wrong options."""
    return {
        super_category: {name: near[: MAX_OPTIONS - 1] for name, near in of_super.items()}
        for super_category, of_super in ranked.items()
    }


def _anchors(
    tapo: dict[SubCategory, list[Photo]],
    similar: Similar,
    genera: Mapping[str, str],
    config: DataConfig,
) -> list[Anchor]:
    anchors, negatives = [], choose_negatives(tapo, similar, config, genera)
    for (super_category, name), photos in tapo.items():
        for photo in photos:
            same = [other.image for other in photos if other is not photo]
            same = seeded_order(same, config.seed, "positive", photo.image)
            anchors.append(
                Anchor(
                    id=photo.image,
                    image=photo.image,
                    positives=tuple(same) or (photo.image,),
                    negatives=tuple(negatives[photo.image]) or (photo.image,),
                    question=photo.question,
                    super_category=super_category,
                    sub_category=name,
                )
            )
    return anchors
