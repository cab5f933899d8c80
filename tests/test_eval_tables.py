"""Intervals and tables against figures by hand and against the published averages."""

from __future__ import annotations

import csv
import random
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from tercet.core.data.eval_files import DATASETS
from tercet.core.types import EvalQuestion
from tercet.train.evaluation.answer_file import Answer
from tercet.train.evaluation.confusion import NONE, OTHER, SEVERAL, confusion
from tercet.train.evaluation.intervals import Z, bootstrap, of_average, standard_error, wilson
from tercet.train.evaluation.scoring import Scored
from tercet.train.evaluation.tables import (
    markdown,
    measured_rows,
    print_tables,
    published_rows,
    write_csv,
)

pytestmark = pytest.mark.core


def test_wilson_against_published_values():
    """Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for right, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(right / n, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (300, 600), (400, 400)])
def test_wilson_bounds_lie_as_many_standard_errors_from_the_share(hits, n):
    share = hits / n
    low, high = wilson(share, n)
    for bound in (low, high):
        assert abs(share - bound) == pytest.approx(Z * np.sqrt(bound * (1 - bound) / n), abs=1e-9)
    assert low <= share + 1e-9 and share <= high + 1e-9


def test_bootstrap_is_near_the_normal_interval_and_repeatable():
    values = np.random.default_rng(1).beta(2, 5, 400)
    half = 1.96 * values.std() / 20
    low, high = bootstrap(values)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=half / 8)
    assert bootstrap(values) == (low, high) != bootstrap(values, seed=1)
    assert bootstrap([0.25]) == (0.25, 0.25)


def test_the_interval_of_an_average_shrinks_with_independent_figures():
    assert of_average([50, 70], [(46, 54), (67, 73)]) == pytest.approx((57.5, 62.5))
    assert of_average([50], [(40, 55)]) == (40, 55)


def test_standard_error():
    assert standard_error([1.0]) is None
    assert standard_error([1.0, 2.0, 6.0]) == pytest.approx(np.sqrt(7 / 3))


def test_published_averages_are_those_of_the_tables():
    """Of six data sets, then of seen and unseen; 85.19, 67.32 and 54.90 for Fine-R1-3B."""
    rows = {(r.score, r.model, r.setting): r.cells for r in published_rows()}
    assert len(rows) == 138
    headline = {"closed": 85.19, "similarity": 67.32, "inclusion": 54.90}
    for score, value in headline.items():
        assert rows[score, "Fine-R1-3B", "all"]["average"].value == value
    for (score, model, setting), cells in rows.items():
        if setting == "all":
            parts = [rows[score, model, s]["average"].value for s in ("seen", "unseen")]
        else:
            parts = [cells[name].value for name in DATASETS]
        assert cells["average"].value == pytest.approx(np.mean(parts), abs=0.011), model


def scored(dataset: str, partition: str, right: int, n: int) -> list[Scored]:
    questions = [
        EvalQuestion("", "", (), "wren", dataset, partition, dataset, "", f"{dataset}_{partition}")
        for _ in range(n)
    ]
    return [
        Scored(q, Answer(q.file, i, "closed", 0, ""), scores={"closed": float(i < right)})
        for i, q in enumerate(questions)
    ]


def test_averages_are_of_data_sets_and_never_of_lines(tmp_path):
    lines = [
        *scored("bird", "seen", 1, 2),
        *scored("car", "seen", 9, 10),
        *scored("car", "unseen", 1, 4),
        *scored("moss", "unseen", 3, 4),
    ]
    random.Random(0).shuffle(lines)
    rows = {row.setting: row.cells for row in measured_rows(lines, "mine|[red]")}
    values = {s: {name: c.value for name, c in cells.items()} for s, cells in rows.items()}
    assert values == {
        "seen": {"bird": 50, "car": 90, "average": 70},
        "unseen": {"car": 25, "moss": 75, "average": 50},
        "all": {"average": 60},
    }
    seen = rows["seen"]
    bounds = [(100 * low, 100 * high) for low, high in (wilson(0.5, 2), wilson(0.9, 10))]
    low, high = of_average([50, 90], bounds)
    assert (seen["average"].low, seen["average"].high) == pytest.approx((low, high))

    own = measured_rows(lines, "mine|[red]")
    text = markdown(own, dict.fromkeys(("closed", "open"), ["2 photos missing: left out"]))
    bird = f"50.00 [{bounds[0][0]:.1f}, {bounds[0][1]:.1f}]"
    car = f"90.00 [{bounds[1][0]:.1f}, {bounds[1][1]:.1f}]"
    average = f"70.00 [{low:.1f}, {high:.1f}]"
    assert f"| mine\\|[red] | measured | seen | {bird} | {car} |  | {average} |" in text
    # Its average is of six data sets, of which these tables have two.
    assert "| Fine-R1-3B | Fine-R1, Table 1 | seen | 86.79 | 92.14 |  |  |" in text
    assert text.count("- 2 photos missing: left out") == 1
    console = Console(file=StringIO(), markup=False, width=130)
    notes = dict.fromkeys(("closed", "open"), ["2 photos missing: left out"])
    print_tables(own, notes, console)
    printed = console.file.getvalue()
    assert "mine|[red]" in printed and "2 photos missing" in printed and "(published)" in printed
    write_csv(own, tmp_path / "tables.csv")
    with open(tmp_path / "tables.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(own) + 138
    assert (written[0]["car"], written[0]["moss"]) == ("90.000000", "")
    assert float(written[0]["average_low"]) == pytest.approx(low, abs=1e-6)
    assert written[-1]["average"] == "60.610000" and written[-1]["average_low"] == ""


def test_the_confusion_matrix_is_hand_counted():
    def said(truth: str, *names: str) -> Scored:
        question = EvalQuestion("", "", (), truth, "bird", "seen", "bird")
        return Scored(question, Answer("f", 1, "open", 0, ""), named=list(names))

    answers = [
        said("Wren", "wren"),
        said("Wren", "gull"),
        said("Wren", "gull", "wren"),
        said("Wren"),
        said("gull", "tern"),
        said("tern", "tern"),
    ]
    rows, columns, shares = confusion(answers)
    assert (rows, columns[-3:]) == (["gull", "tern", "Wren"], [OTHER, SEVERAL, NONE])
    assert shares.tolist() == [
        [0, 1, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0.25, 0, 0.25, 0, 0.25, 0.25],
    ]
