"""The questions of an evaluation: read, given their photos, and their options put in order."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tercet.core.data.eval_files import read_eval
from tercet.core.data.manifest import Manifest
from tercet.core.data.photos import check_images
from tercet.core.data.triplets import eval_questions
from tercet.core.draws import seeded_int, seeded_order
from tercet.core.names import normal_form
from tercet.core.types import EvalQuestion

OptionOrder = Literal["released", "shuffled", "rotated"]
Order = tuple[int, ...]
"""Which of a question's options stands at each place of the prompt; empty: as in the file."""
AT_ONCE = 64
"""Photos that are checked between two signs of life."""


@dataclass(frozen=True)
class Questions:
    """Questions in the order of their files, and the names that are known."""

    all: list[EvalQuestion]
    names: dict[str, tuple[str, ...]]
    """By data set: the names of its sub-categories, none in two spellings."""

    @property
    def by_place(self) -> dict[tuple[str, int], EvalQuestion]:
        return {(q.file, q.line): q for q in self.all}


def read_all(paths: Sequence[str], per_class: int | None = None) -> Questions:
    """Read question files (JSON Lines, see `read_eval`) and manifests (triplets.json).

    The held-out photos of a manifest are one file for each partition, `NAME_seen` and
    `NAME_unseen`, where NAME is that of the manifest; their data sets are its super-categories.

    Args:
        paths: the files.
        per_class: questions a sub-category of each file, drawn; None: all.

    Raises:
        ValueError: naming file and line at fault, or two files with one name.
    """
    found: dict[str, str] = {}
    questions: list[EvalQuestion] = []
    names: dict[str, dict[str, str]] = defaultdict(dict)
    for path in paths:
        of_path, manifest = _read(path, per_class)
        for stem in dict.fromkeys(q.file for q in of_path):
            if stem in found:
                raise ValueError(f"--questions: {found[stem]} and {path} have one name, {stem!r}")
            found[stem] = path
        questions += of_path
        for q in of_path:
            more = manifest.names.get(q.super_category, ()) if manifest else q.options
            for name in (q.truth, *more):
                names[q.dataset].setdefault(normal_form(name), name)
    return Questions(questions, {key: tuple(of.values()) for key, of in names.items()})


def _read(path: str, per_class: int | None) -> tuple[list[EvalQuestion], Manifest | None]:
    if path.endswith(".jsonl"):
        return _draw(read_eval(path), per_class), None
    manifest = Manifest.read(path)
    stem = Path(os.path.abspath(path)).stem
    questions = [
        replace(q, dataset=q.super_category, path=q.image, file=f"{stem}_{partition}", line=line)
        for partition in ("seen", "unseen")
        if manifest.test[partition]
        for line, q in enumerate(eval_questions(manifest, partition, per_class), start=1)
    ]
    if not questions:
        raise ValueError(f"{path} holds no held-out photos")
    return questions, manifest


def _draw(questions: list[EvalQuestion], per_class: int | None) -> list[EvalQuestion]:
    """So many questions of each sub-category, always the same ones, in the order of the file."""
    if per_class is None:
        return questions
    lines = defaultdict(list)
    for q in questions:
        lines[q.truth].append(str(q.line))
    kept = {line for of in lines.values() for line in seeded_order(of, 0, "eval")[:per_class]}
    return [q for q in questions if str(q.line) in kept]


def find_photo(path: str, roots: Sequence[str]) -> str | None:
    """The file under one of the roots whose path ends as this one does, for the longest such end.

    At least the name of the folder and of the file must agree: names repeat between the training
    and test photos of one data set.

    Args:
        path: as a question file gives it, perhaps an absolute path on another machine.
        roots: folders; of two with equally long ends, the first counts.

    Returns:
        Path of the file, or None.
    """
    parts = [part for part in os.path.normpath(path.replace("\\", "/")).split("/") if part]
    parts = parts[parts.count("..") :]
    for start in range(len(parts) - 1):
        for root in roots:
            if os.path.isfile(found := os.path.join(root, *parts[start:])):
                return os.path.abspath(found)
    return None


def place_photos(questions: Sequence[EvalQuestion], roots: Sequence[str]) -> list[EvalQuestion]:
    """The questions with the key of their photo under the roots; empty where it is not found."""
    return [replace(q, image=find_photo(q.path, roots) or "") for q in questions]


def unusable(
    questions: Sequence[EvalQuestion], on_checked: Callable[[int], None] = lambda n: None
) -> dict[str, str]:
    """The photos that cannot be asked about: by path as the question gives it, the reason.

    Args:
        questions: with their keys.
        on_checked: called with the number of questions that were checked since the last call.
    """
    bad = {}
    for start in range(0, len(questions), AT_ONCE):
        part = questions[start : start + AT_ONCE]
        faults = check_images((q.image for q in part if q.image), "skip")
        for q in part:
            if not q.image:
                bad[q.path] = f"photo {q.path!r} is under none of the roots"
            elif q.image in faults:
                bad[q.path] = faults[q.image]
        on_checked(len(part))
    return bad


def orders_of(question: EvalQuestion, kind: OptionOrder, seed: int) -> list[Order]:
    """The orders in which a question is asked.

    Args:
        question: with its options in the order of the file.
        kind: released: as in the file. shuffled: one order, drawn from the seed and the question's
            place. rotated: one order for every place of the true option, the others moved along.
        seed: of the shuffle.
    """
    places = range(len(question.options))
    if kind == "released":
        return [()]
    if kind == "shuffled":
        about = ("order", question.file, question.line)
        return [tuple(sorted(places, key=lambda option: seeded_int(seed, *about, option)))]
    truth, n = question.options.index(question.truth), len(places)
    return [tuple((truth - place + p) % n for p in places) for place in places]


def shown_in(question: EvalQuestion, order: Order) -> EvalQuestion:
    """The question with its options in this order."""
    if not order:
        return question
    return replace(question, options=tuple(question.options[place] for place in order))
