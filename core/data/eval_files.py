"""Question files of the evaluation as published: JSON Lines, the data set in the file's name."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import get_args

from tercet.core.data.fields import (
    as_words,
    has_partition,
    json_lines,
    partition_of,
    text_of,
    texts_of,
)
from tercet.core.names import normal_form, refuse_alike
from tercet.core.types import EvalQuestion, Partition

DATASETS = ("aircraft", "bird", "car", "dog", "flower", "pet")
"""The six data sets of the papers, in the order of their tables; each is a super-category."""
_WORD = re.compile(r"[a-z]+")


def read_eval(path: str | Path) -> list[EvalQuestion]:
    """Read questions from JSON Lines of {"image_path", "question", "options", "ground_truth"}.

    Names stay as written. The data set is the one of DATASETS that the file's name holds, else the
    first that a folder of `image_path` holds, else the file's name. The super-category is the
    record's `super_category`, else a data set found so, else the first folder of `image_path`. The
    partition is the record's `partition`, else the end of the file's name (`..._seen.jsonl`,
    `..._unseen.jsonl`). The photos are not checked (see `check_images`).

    Args:
        path: the file; the key of a photo is its path relative to the file's folder.

    Raises:
        ValueError: naming file, line and field at fault.
    """
    path = Path(os.path.abspath(path))
    questions = [_eval_question(record, path, where) for where, record in json_lines(path)]
    if not questions:
        raise ValueError(f"{path} holds no questions")
    named = {(q.super_category, as_words(name)) for q in questions for name in q.options}
    refuse_alike(named, path)
    return questions


def dataset_in(text: str) -> str:
    """The data set that a file's or folder's name holds as a word; empty where it holds none."""
    words = [word.removesuffix("s") for word in _WORD.findall(text.lower())]
    return next((word for word in words if word in DATASETS), "")


def _eval_question(record: dict, path: Path, where: str) -> EvalQuestion:
    image = text_of(record, "image_path", where)
    names = texts_of(record, "options", where)
    truth = text_of(record, "ground_truth", where)
    if truth not in names:
        raise ValueError(f"{where}: ground_truth {truth!r} is not among the options {names}")
    if blank := [name for name in names if not normal_form(name)]:
        raise ValueError(f"{where}: the option {blank[0]!r} holds no name")
    stem, _, last = path.stem.rpartition("_")
    partition = last if last in get_args(Partition) else ""
    folders = image.split("/")[:-1]
    known = dataset_in(path.stem) or next(filter(None, map(dataset_in, folders)), "")
    if has_partition(record):
        partition = partition_of(record, where)
    super_category = known or (folders[0] if folders else "")
    if "super_category" in record:
        super_category = text_of(record, "super_category", where)
    return EvalQuestion(
        image=os.path.normpath(path.parent / image),
        question=text_of(record, "question", where),
        options=names,
        truth=truth,
        super_category=as_words(super_category),
        partition=partition,
        dataset=known or (stem if last in get_args(Partition) else path.stem),
        path=image,
        file=path.stem,
        line=int(where.rpartition(":")[2]),
    )
