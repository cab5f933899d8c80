"""Two evaluations of the same questions: how far they differ, and whether chance explains it."""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest

from tercet.core.data.fields import json_lines
from tercet.core.data.files import shown
from tercet.train.evaluation.answer_file import Place
from tercet.train.evaluation.intervals import bootstrap_means, percentiles
from tercet.train.evaluation.scoring import SCORES

LINES = "lines.jsonl"
AVERAGE = "average"

Stratum = tuple[str, str]
"""Partition and data set."""


@dataclass(frozen=True)
class Question:
    """What one evaluation says about a question in one mode."""

    stratum: Stratum
    about: tuple[str, str]
    """Path of its photo and the true name."""
    value: float
    """Mean of a score over trials and orders."""


@dataclass(frozen=True)
class Difference:
    """A score of two evaluations on the same questions, in percent."""

    score: str
    partition: str
    dataset: str
    n: int
    first: float
    second: float
    low: float
    high: float
    """95 % interval of second - first: paired bootstrap over the questions."""
    only_first: int | None
    """Questions that the first alone has right; None where answers are not simply right or wrong:
    similarity, several trials or orders."""
    only_second: int | None
    p: float | None
    """Of McNemar's exact test (McNemar, 1947): the smaller, the less chance explains it."""


def read_lines(path: Path) -> dict[str, dict[Place, Question]]:
    """The scores in an evaluation's lines.jsonl, by score and question.

    Args:
        path: the file, or the folder that holds it.

    Raises:
        ValueError: naming file and line at fault.
    """
    path = path / LINES if path.is_dir() else path
    values: dict[str, dict[Place, list[float]]] = {score: defaultdict(list) for score in SCORES}
    about: dict[Place, tuple[Stratum, tuple[str, str]]] = {}
    for where, record in json_lines(path):
        texts = [record.get(name) for name in ("file", "partition", "dataset", "image", "truth")]
        if not all(isinstance(text, str) for text in texts) or type(record.get("line")) is not int:
            raise ValueError(f"{where}: no line that an evaluation writes")
        file, *labels, image, truth = texts
        place = file, record["line"]
        about[place] = tuple(labels), (image, truth)
        for score in SCORES.keys() & record.keys():
            value = record[score]
            if type(value) not in (int, float) or not -1e-6 <= value <= 1 + 1e-6:
                raise ValueError(f"{where}: {score!r} must lie in [0, 1], got {shown(value)}")
            values[score][place].append(float(value))
    return {
        score: {place: Question(*about[place], float(np.mean(v))) for place, v in of.items()}
        for score, of in values.items()
        if of
    }


def compare(first: Path, second: Path) -> tuple[list[Difference], list[str]]:
    """Compare two evaluations, the second with the first, on the questions that both have.

    Returns:
        Differences by score: a row for each partition and data set, and the average as in the
        papers' tables. Notes: how many questions are in one of them alone.

    Raises:
        ValueError: nothing is in both, or one question is about different photos or names.
    """
    one, other = read_lines(first), read_lines(second)
    rows, alone = [], Counter()
    for score in (score for score in SCORES if score in one and score in other):
        both = [place for place in one[score] if place in other[score]]
        alone[score] = len(one[score].keys() ^ other[score].keys())
        for place in both:
            if one[score][place].about != other[score][place].about:
                raise ValueError(
                    f"{first} and {second}: line {place[1]} of {place[0]!r} is about "
                    f"{one[score][place].about} in one and {other[score][place].about} in the other"
                )
        strata = defaultdict(list)
        for place in both:
            pair = one[score][place].value, other[score][place].value
            strata[one[score][place].stratum].append(pair)
        if strata:
            rows += _differences(score, {key: np.array(v) for key, v in strata.items()})
    if not rows:
        raise ValueError(f"{first} and {second} have no question and score in common")
    notes = [f"{score}: {n} questions are in one of them alone" for score, n in alone.items() if n]
    return rows, notes


def _differences(score: str, strata: Mapping[Stratum, np.ndarray]) -> list[Difference]:
    """Rows for one score; `strata` hold [n, 2] values of first and second."""
    rows, draws, means = [], {}, {}
    for seed, (key, pairs) in enumerate(sorted(strata.items())):
        draws[key] = bootstrap_means(pairs[:, 1] - pairs[:, 0], seed)
        means[key] = pairs.mean(axis=0)
        rows.append(_row(score, key, pairs, means[key], draws[key]))
    if len(strata) > 1:
        pooled = np.concatenate(list(strata.values()))
        both, drawn = (_average({k: of[k] for k in strata}) for of in (means, draws))
        rows.append(_row(score, (AVERAGE, AVERAGE), pooled, both, drawn))
    return rows


def _average(values: Mapping[Stratum, np.ndarray]) -> np.ndarray:
    """The mean of the data sets of each partition, then of the partitions."""
    partitions = defaultdict(list)
    for (partition, _), value in values.items():
        partitions[partition].append(value)
    return np.mean([np.mean(of, axis=0) for of in partitions.values()], axis=0)


def _row(
    score: str, key: Stratum, pairs: np.ndarray, means: np.ndarray, draws: np.ndarray
) -> Difference:
    low, high = percentiles(draws)
    only_first = only_second = p = None
    if np.isin(pairs, (0, 1)).all() and score != "similarity":
        only_first = int((pairs[:, 0] > pairs[:, 1]).sum())
        only_second = int((pairs[:, 0] < pairs[:, 1]).sum())
        p = mcnemar(only_first, only_second)
    figures = (100 * float(x) for x in (*means, low, high))
    return Difference(score, *key, len(pairs), *figures, only_first, only_second, p)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p of McNemar's exact test: are both equally often right where they disagree?"""
    n = only_first + only_second
    return float(binomtest(only_first, n, 0.5).pvalue) if n else 1.0


def write_differences(rows: Sequence[Difference], path: Path) -> None:
    """Write the rows as CSV, in percent."""
    names = [name for name in Difference.__dataclass_fields__ if name not in ("low", "high")]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "difference", "difference_low", "difference_high"])
        for row in rows:
            values = ["" if (v := getattr(row, name)) is None else v for name in names]
            writer.writerow([*values, row.second - row.first, row.low, row.high])


def print_differences(
    rows: Sequence[Difference], names: tuple[str, str], notes: Sequence[str], console: Console
) -> None:
    """The same in the terminal."""
    caption = [f"first: {names[0]}, second: {names[1]}; 95 % intervals; p: McNemar's exact test"]
    if any(row.dataset == AVERAGE and row.p is not None for row in rows):
        caption.append("p of an average: over all its questions, each counted once")
    table = Table(caption="\n".join([*caption, *notes]), box=SIMPLE_HEAD)
    for name in ("score", "setting", "data set"):
        table.add_column(name)
    for name in ("n", "first", "second", "second - first", "only first", "only second", "p"):
        table.add_column(name, justify="right")
    for row in rows:
        counts = ["" if c is None else str(c) for c in (row.only_first, row.only_second)]
        p = "" if row.p is None else f"{row.p:.2g}"
        change = f"{row.second - row.first:+.2f} [{row.low:+.2f}, {row.high:+.2f}]"
        setting = "" if row.dataset == AVERAGE else row.partition
        figures = (str(row.n), f"{row.first:.2f}", f"{row.second:.2f}", change)
        table.add_row(row.score, setting, row.dataset, *figures, *counts, p)
    console.print(table)
