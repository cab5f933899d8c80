"""Every question of an evaluation: files as published, and manifests of our own."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tercet.core.data.eval_files import read_eval
from tercet.core.data.manifest import Manifest
from tercet.core.data.triplets import eval_questions
from tercet.core.draws import seeded_order
from tercet.core.names import normal_form
from tercet.core.types import EvalQuestion


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
