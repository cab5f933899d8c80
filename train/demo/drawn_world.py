"""Writes the drawn world: pictures, manifest, questions, and records for both SFT stages."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import yaml
from numpy.random import Generator

from tercet.core.prompts import IMAGE_MARKER, closed_world_text, stage2_text
from tercet.train.demo.drawing import PLATE, draw
from tercet.train.demo.species import (
    QUESTIONS,
    SUPER_CATEGORY,
    Names,
    Species,
    caption,
    chain_of_thought,
    fact,
    is_seen,
    question,
    species_of,
)

BASE_MIX = {
    "spelled": {"caption": 0.5, "thought": 0.35, "closed": 0.15},
    "opaque": {"nameless caption": 0.1, "nameless thought": 0.35, "fact": 0.55},
}
"""Share of each kind of base record, by kind of names."""


def sft_record(images: list[str], asked: str, said: str) -> dict:
    """A record for train/sft.py: paths of pictures, the question about them and the answer."""
    turns = {"user": IMAGE_MARKER * len(images) + asked, "assistant": said}
    messages = [{"role": role, "content": text} for role, text in turns.items()]
    return {"messages": messages, "images": images}


@contextmanager
def _new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into that takes its name only when it is complete."""
    folder = Path(folder).resolve()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{folder} is in use: remove it or write to another folder")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_world(
    folder: str | Path,
    seed: int,
    *,
    train: int,
    sft: int,
    test: int,
    size: int = 84,
    names: Names = "spelled",
) -> None:
    """Write pictures, manifest.json, stage1.json and questions.yaml: all of them or none.

    The pictures of a split do not depend on the size of the other splits. The same arguments give
    the same bytes.

    Args:
        folder: must be new or empty.
        seed: of the pictures, the texts and the choice of the seen sub-categories.
        train: pictures of each seen sub-category for stage 2.
        sft: pictures of each seen sub-category for stage 1.
        test: held-out pictures of each sub-category, seen or unseen.
        size: pixels a side.
        names: spelled or opaque.

    Raises:
        ValueError: `folder` is not empty, or a number of pictures is negative.
    """
    counts = {"train": train, "sft": sft, "test": test}
    if min(counts.values()) < 0:
        raise ValueError(f"train, sft and test must be at least 0, got {counts}")
    with _new_folder(folder) as partial:
        _write_files(partial, seed, counts, size, names)


def _write_files(folder: Path, seed: int, counts: dict[str, int], size: int, names: Names) -> None:
    classes, images, stage1 = [], [], []
    of_both = zip(species_of(names), is_seen(seed), strict=True)
    for index, (species, seen) in enumerate(of_both):
        partition = "seen" if seen else "unseen"
        own = {s: n if seen or s == "test" else 0 for s, n in counts.items()}
        label = {"super_category": species.super_category, "sub_category": species.name}
        classes.append(label | {"partition": partition} | own)
        subfolder = f"{species.super_category}/{species.name.replace(' ', '_')}"
        (folder / subfolder).mkdir(parents=True)
        keys = [(split, (index, s, i)) for s, split in enumerate(own) for i in range(own[split])]
        for number, (split, key) in enumerate(keys):
            rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
            path = f"{subfolder}/{number:03d}.png"
            draw(species, rng, size=size).save(folder / path)
            entry = {"path": path} | label | {"partition": partition, "split": split}
            if split == "sft":
                entry |= {"split": "train", "in_stage1": True}
                asked = stage2_text(question(rng))
                stage1.append(sft_record([path], asked, chain_of_thought(species)))
            images.append(entry)
    manifest = {"seed": seed, "classes": classes, "images": images}
    asked = {SUPER_CATEGORY: [t.format(super_category=SUPER_CATEGORY) for t in QUESTIONS]}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    (folder / "stage1.json").write_text(json.dumps(stage1, indent=1))
    (folder / "questions.yaml").write_text(yaml.safe_dump(asked, sort_keys=False))


def write_base(
    folder: str | Path, seed: int, count: int, size: int = 84, names: Names = "spelled"
) -> None:
    """Write the base stage's records.json and its pictures, plates of every sub-category.

    Args:
        folder: must be new or empty.
        seed: of pictures and texts.
        count: number of records.
        size: pixels a side.
        names: where spelled, records name what they show; where opaque, no picture comes with a
            name, and records without a picture tie the names to the attributes.
    """
    rng, every = np.random.default_rng([seed, 1]), species_of(names)
    with _new_folder(folder) as partial:
        records = []
        for n in range(count):
            species = every[rng.integers(len(every))]
            kind = rng.choice(list(BASE_MIX[names]), p=list(BASE_MIX[names].values()))
            asked, said = _base_turns(kind, species, every, rng)
            images = [] if kind == "fact" else [f"{n:05}.png"]
            for image in images:
                draw(species, rng, PLATE, size).save(partial / image)
            records.append(sft_record(images, asked, said))
        (partial / "records.json").write_text(json.dumps(records), encoding="utf-8")


def _base_turns(
    kind: str, species: Species, every: tuple[Species, ...], rng: Generator
) -> tuple[str, str]:
    """Question and answer of a base record."""
    if kind == "fact":
        return fact(species, rng)
    named = not kind.startswith("nameless")
    if kind.endswith("caption"):
        return "Describe the picture.", caption(species, rng, named)
    asked, said = question(rng), chain_of_thought(species, named)
    if kind.endswith("thought"):
        return stage2_text(asked), said
    wrong = [every[i].name for i in rng.permutation(len(every)) if every[i] != species][:3]
    options = rng.permutation([species.name, *wrong]).tolist()
    return closed_world_text(asked, options), said
