"""What bench/learning.py trains and asks: photos, questions and records, written as files."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tercet.bench.learning_tower import SIDE, square, view
from tercet.core.data.manifest import Manifest
from tercet.core.data.questions import questions_for, read_questions
from tercet.core.draws import seeded_order
from tercet.core.prompts import closed_world_text, open_world_text, stage2_text
from tercet.core.types import EvalQuestion
from tercet.train.demo.drawn_world import sft_record

SHOTS = 4
"""Photos of a class that neither tower nor base stage sees: the arms', where it is seen."""
STAGE1_SHOTS = 4
"""Photos of a seen class in stage 1, of those that the base stage has seen."""
SEEN_SHARE = 0.6
SUPER_CATEGORY = "flower"
CAPTION = "What is this?"
OPTIONS = 4


@dataclass(frozen=True)
class Flowers:
    """All photos, and those that no question names by what they are for."""

    files: dict[str, str]
    """By file name without suffix, of every photo: its path."""
    known: list[tuple[str, str]]
    """(path, name) of photos for tower, base stage and stage 1."""
    shots: list[tuple[str, str]]
    """(path, name) of SHOTS photos of each class, for the arms."""


def read_flowers(images: str, questions: Sequence[EvalQuestion]) -> Flowers:
    """Photos in folders by class, named by the questions about them.

    Raises:
        ValueError: two photos have one name, a question's photo is missing, or a class has two
            names or fewer than SHOTS + 1 photos that no question names.
    """
    files: dict[str, str] = {}
    for folder, _, found in sorted(os.walk(images)):
        for name in sorted(found):
            if name.lower().endswith((".jpg", ".png")):
                if stem(name) in files:
                    raise ValueError(f"--images: {name} is in {folder} and is {files[stem(name)]}")
                files[stem(name)] = os.path.join(folder, name)
    truths = {stem(q.path): q.truth for q in questions}
    if missing := sorted(truths.keys() - files.keys()):
        raise ValueError(f"--images {images}: {len(missing)} photos are missing, {missing[0]}")
    names: dict[str, str] = {}
    for file, truth in truths.items():
        label = _class_of(files[file])
        if names.setdefault(label, truth) != truth:
            raise ValueError(f"class {label} is {names[label]!r} and, in {file}, {truth!r}")
    left = defaultdict(list)
    for file in files.keys() - truths.keys():
        left[_class_of(files[file])].append(file)
    known, shots = [], []
    for label, name in sorted(names.items(), key=lambda item: item[1]):
        order = seeded_order(left[label], 0, "shots")
        if len(order) <= SHOTS:
            raise ValueError(f"class {label}, {name!r}: {len(order)} photos that no question names")
        shots += [(files[file], name) for file in order[:SHOTS]]
        known += [(files[file], name) for file in order[SHOTS:]]
    return Flowers(files, known, shots)


def stem(path: str) -> str:
    """Name of a file without folder and suffix."""
    return os.path.splitext(os.path.basename(path))[0]


def _class_of(path: str) -> str:
    return os.path.basename(os.path.dirname(path))


def choose_classes(questions: Sequence[EvalQuestion], count: int, seed: int) -> dict[str, str]:
    """Drawn classes by name: seen or unseen as the questions are, SEEN_SHARE of them seen.

    Raises:
        ValueError: there are not so many.
    """
    of: dict[str, set[str]] = defaultdict(set)
    for question in questions:
        of[question.partition].add(question.truth)
    seen, chosen = round(SEEN_SHARE * count), {}
    for partition, some in (("seen", seen), ("unseen", count - seen)):
        there = len(of[partition])
        if not 0 < some <= there:
            raise ValueError(f"--classes {count} takes {some} {partition} ones, of {there}")
        drawn = seeded_order(of[partition], seed, "classes")[:some]
        chosen |= dict.fromkeys(sorted(drawn), partition)
    return chosen


def _write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "PNG")


def write_photos(
    flowers: Flowers,
    questions: Sequence[EvalQuestion],
    chosen: Mapping[str, str],
    folder: Path,
    per_class: int,
) -> list[str]:
    """Write what is asked and the photos of the arms, as squares of SIDE pixels.

    Args:
        flowers: all photos.
        questions: the official ones.
        chosen: seen or unseen by name of a class.
        folder: gets `asked` (photos of questions), `photos` (with a manifest.json that says which
            classes are seen) and a file of questions for each partition.
        per_class: questions about a class, at most, drawn.

    Returns:
        Paths of the two files of questions.
    """
    paths = [folder / f"{SUPER_CATEGORY}_{partition}.jsonl" for partition in ("seen", "unseen")]
    if all(path.exists() for path in paths):
        return list(map(str, paths))
    images = []
    for path, name in flowers.shots:
        if chosen.get(name) == "seen":
            _write(folder / "photos" / (file := f"{stem(path)}.png"), _whole(path))
            images.append({"path": file, "split": "train"} | _labels(name))
    asked = defaultdict(list)
    by_place = {f"{q.file}/{q.line}": q for q in questions if q.truth in chosen}
    drawn: dict[str, list[str]] = defaultdict(list)
    for place in seeded_order(by_place, 0, "asked"):
        if len(drawn[by_place[place].truth]) < per_class:
            drawn[by_place[place].truth].append(place)
    for place in sorted(place for of in drawn.values() for place in of):
        q = by_place[place]
        file = f"{stem(q.path)}.png"
        _write(folder / "asked" / "jpg" / file, _whole(flowers.files[stem(q.path)]))
        line = {"image_path": f"flower102/jpg/{file}", "question": q.question}
        line |= {"options": list(q.options), "ground_truth": q.truth}
        asked[chosen[q.truth]].append(json.dumps(line))
    classes = [_labels(name) | {"partition": of} for name, of in chosen.items()]
    listing = json.dumps({"classes": classes, "images": images})
    (folder / "photos" / "manifest.json").write_text(listing, encoding="utf-8")
    for path in paths:
        lines = asked[path.stem.rpartition("_")[2]]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return list(map(str, paths))


def _labels(name: str) -> dict[str, str]:
    return {"super_category": SUPER_CATEGORY, "sub_category": name}


def _whole(path: str) -> np.ndarray:
    return view(square(path), 0, 0, SIDE)


def response(name: str, other: str, rng: np.random.Generator) -> str:
    """A chain of thought of two candidates, in any order, and the answer."""
    first, second = rng.permutation([name, other])
    return f"<think>A {first} or a {second}.</think><answer>{name}</answer>"


def look_alikes(means: np.ndarray, labels: Sequence[str]) -> dict[str, list[str]]:
    """For each name the other names, the nearest class mean first, by cosine after centring."""
    names = sorted(set(labels))
    own = np.stack([means[[of == name for of in labels]].mean(0) for name in names])
    own = own - own.mean(0)
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    order = np.argsort(-own @ own.T, axis=1, kind="stable")
    return {
        name: [names[j] for j in row if names[j] != name]
        for name, row in zip(names, order, strict=True)
    }


def write_base(
    flowers: Flowers,
    chosen: Mapping[str, str],
    folder: Path,
    views: int,
    near: Mapping[str, Sequence[str]],
    seed: int,
) -> Path:
    """Records of the base stage about all chosen classes: half of them name the photo and no more,
    the others answer open questions, in two wordings, and closed ones.

    Args:
        flowers: all photos.
        chosen: the classes.
        folder: gets `base.json` and its photos.
        views: of each photo (see `view`).
        near: look-alikes of each class among all: candidates and options.
        seed: of what is drawn.
    """
    path = folder / "base.json"
    if path.exists():
        return path
    rng, records = np.random.default_rng(seed), []
    templates = questions_for(SUPER_CATEGORY, read_questions(None))
    for i, (file, name) in enumerate(flowers.known):
        if name not in chosen:
            continue
        kept = square(file)
        for number in range(views):
            picture = folder / "base_photos" / f"{stem(file)}.{number}.png"
            _write(picture, view(kept, number, i, SIDE))
            own = [other for other in near[name] if other in chosen]
            said = response(name, rng.choice(own[:3]), rng)
            asked, kind = str(rng.choice(templates)), (i + number) % 8
            options = list(rng.permutation([name, *rng.choice(near[name][:8], 3, replace=False)]))
            texts = [CAPTION] * 4 + [stage2_text(asked)] * 2 + [open_world_text(asked)]
            text = [*texts, closed_world_text(asked, list(map(str, options)))][kind]
            said = f"A {name}." if kind < 4 else said
            records.append(sft_record([str(picture.relative_to(folder))], text, said))
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def write_stage1(
    flowers: Flowers, chosen: Mapping[str, str], folder: Path, near: Mapping, seed: int
) -> Path:
    """Records of stage 1: STAGE1_SHOTS photos of each seen class, with chains of thought."""
    rng, records, counts = np.random.default_rng(seed), [], defaultdict(int)
    templates = questions_for(SUPER_CATEGORY, read_questions(None))
    for file, name in flowers.known:
        counts[name] += 1
        if chosen.get(name) != "seen" or counts[name] > STAGE1_SHOTS:
            continue
        seen = [other for other in near[name] if chosen.get(other) == "seen"]
        said = response(name, rng.choice(seen[:3]), rng)
        picture = f"base_photos/{stem(file)}.0.png"
        records.append(sft_record([picture], stage2_text(str(rng.choice(templates))), said))
    path = folder / "stage1.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def write_labels(folder: Path, triplets: Path) -> Path:
    """Records about the arms' anchors that answer with the name alone."""
    records = [
        sft_record(
            [os.path.relpath(anchor.image, folder)],
            stage2_text(anchor.question),
            f"<answer>{anchor.sub_category}</answer>",
        )
        for anchor in Manifest.read(triplets).anchors
    ]
    path = folder / "labels.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path
