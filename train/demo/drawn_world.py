"""Writes the drawn world to disk: its pictures, manifest, stage-1 records and questions."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import yaml

from tercet.core.prompts import IMAGE_MARKER, stage2_text
from tercet.train.demo.drawing import draw
from tercet.train.demo.species import (
    ATTRIBUTES,
    QUESTIONS,
    SPECIES,
    chain_of_thought,
    question,
    seen_species,
)


def sft_record(image: str, asked: str, said: str) -> dict:
    """A record for train/sft.py: a picture's path, the question about it and the answer."""
    turns = {"user": IMAGE_MARKER + asked, "assistant": said}
    messages = [{"role": role, "content": text} for role, text in turns.items()]
    return {"messages": messages, "images": [image]}


def write_world(
    folder: str | Path, seed: int, *, train: int, sft: int, test: int, size: int = 112
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

    Raises:
        ValueError: `folder` is not empty, or a number of pictures is negative.
    """
    folder = Path(folder).resolve()
    counts = {"train": train, "sft": sft, "test": test}
    if min(counts.values()) < 0:
        raise ValueError(f"train, sft and test must be at least 0, got {counts}")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{folder} is in use: remove it or write to another folder")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        _write_files(partial, seed, counts, size)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_files(folder: Path, seed: int, counts: dict[str, int], size: int) -> None:
    seen = seen_species(seed)
    classes, images, stage1 = [], [], []
    for index, species in enumerate(SPECIES):
        partition = "seen" if species.name in seen else "unseen"
        own = {s: n if partition == "seen" or s == "test" else 0 for s, n in counts.items()}
        label = {"super_category": species.super_category, "sub_category": species.name}
        classes.append(label | {"partition": partition} | own)
        subfolder = f"{species.super_category}/{species.name.replace(' ', '_')}"
        (folder / subfolder).mkdir(parents=True)
        keys = [(split, (index, s, i)) for s, split in enumerate(own) for i in range(own[split])]
        for number, (split, key) in enumerate(keys):
            rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
            path = f"{subfolder}/{number:03d}.png"
            draw(species, rng, size).save(folder / path)
            entry = {"path": path} | label | {"partition": partition, "split": split}
            if split == "sft":
                entry |= {"split": "train", "in_stage1": True}
                asked = stage2_text(question(species.super_category, rng))
                stage1.append(sft_record(path, asked, chain_of_thought(species, rng)))
            images.append(entry)
    manifest = {"seed": seed, "classes": classes, "images": images}
    templates = {name: [t.format(super_category=name) for t in QUESTIONS] for name in ATTRIBUTES}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    (folder / "stage1.json").write_text(json.dumps(stage1, indent=1))
    (folder / "questions.yaml").write_text(yaml.safe_dump(templates, sort_keys=False))
