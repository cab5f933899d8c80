"""What the options' order says about closed-world figures: baselines, and accuracy by place."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tercet.core.names import normal_form
from tercet.train.evaluation.metrics import closed_world_correct
from tercet.train.evaluation.scoring import Scored
from tercet.train.evaluation.tables import Row, measured_rows

CLOSED = ("closed", "closed_strict")


def place_of_truth(s: Scored) -> int:
    """Place of the true option in the prompt, from 0."""
    return s.shown.index(s.question.truth)


def baseline_rows(scored: Sequence[Scored]) -> list[Row]:
    """Rows of a model that always takes the first option, and of one that draws an option.

    Args:
        scored: answers; the closed-world ones count, with the orders in which they were asked.

    Returns:
        Rows for both closed-world scores; their figures are exact and have no interval.
    """
    closed = [s for s in scored if s.answer.mode == "closed"]
    rows = []
    for model, of in (("always the first option", _first), ("chance", _chance)):
        found = [replace(s, scores=dict(zip(CLOSED, of(s), strict=True))) for s in closed]
        for row in measured_rows(found, model):
            cells = {name: replace(c, n=0, error=None) for name, c in row.cells.items()}
            rows.append(replace(row, source="baseline", cells=cells))
    return rows


def _first(s: Scored) -> tuple[float, float]:
    return _scores_of(s.shown[0], s.question.truth)


def _chance(s: Scored) -> tuple[float, float]:
    values = [_scores_of(option, s.question.truth) for option in s.shown]
    return tuple(np.mean(values, axis=0).tolist())


def _scores_of(option: str, truth: str) -> tuple[float, float]:
    """Of an answer that is this option: by the released rule and strictly."""
    right = closed_world_correct(f"<answer>{option}</answer>", truth)
    return float(right), float(normal_form(option) == normal_form(truth))


def meaning(scored: Sequence[Scored]) -> list[str]:
    """What the order of the options says about closed-world figures: lines below their tables."""
    closed = [s for s in scored if s.answer.mode == "closed"]
    if not closed:
        return []
    share = 100 * float(np.mean([place_of_truth(s) == 0 for s in closed]))
    orders = defaultdict(set)
    for s in closed:
        orders[s.answer.file, s.answer.line].add(s.answer.order)
    if max(map(len, orders.values())) > 1:
        places = by_place(closed)
        each = ", ".join(f"{100 * right:.1f}" for _, right, _, _ in places)
        rights = [100 * right for _, right, _, _ in places]
        return [
            f"options rotated: mean of the true option at every place; with it at place 1 to "
            f"{len(places)}: {each} (spread {max(rights) - min(rights):.1f})"
        ]
    kind = "shuffled" if closed[0].answer.order else "as in the files"
    says = f"options {kind}: the true one stands first in {share:.1f} % of the prompts"
    if share > 99:
        says += ", so a model that always takes the first option is right; see --options rotated"
    return [says]


def by_place(scored: Sequence[Scored]) -> list[tuple[int, float, float, float]]:
    """For each place of the true option in the prompt, over closed-world answers.

    Returns:
        (answers, share right by the released rule, share right strictly, share of all answers that
        name the option at this place and no other) for place 1, 2, ...
    """
    asked = [s for s in scored if s.answer.mode == "closed" and not s.missing]
    places = range(max((len(s.question.options) for s in asked), default=0))
    here = [[s for s in asked if place_of_truth(s) == place] for place in places]
    return [
        (
            len(group),
            *(_mean(group, lambda s, name=name: s.scores[name]) for name in CLOSED),
            _mean(asked, lambda s, place=place: s.named == [*s.shown][place : place + 1]),
        )
        for place, group in zip(places, here, strict=True)
    ]


def _mean(scored: Sequence[Scored], value: Callable[[Scored], float]) -> float:
    return float(np.mean([value(s) for s in scored])) if scored else float("nan")


def write_places(scored: Sequence[Scored], path: Path) -> None:
    """Write `by_place` as CSV, in percent."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["place_of_truth", "answers", *CLOSED, "this_place_chosen"])
        for place, (n, *shares) in enumerate(by_place(scored), start=1):
            writer.writerow([place, n, *(f"{100 * share:.4f}" for share in shares)])
