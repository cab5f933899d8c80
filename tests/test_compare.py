"""`--compare`: paired differences, their intervals, and McNemar's test against counting."""

from __future__ import annotations

import csv
import json
import sys
from math import comb
from pathlib import Path

import numpy as np
import pytest

from tercet.train import eval_fgvr
from tercet.train.evaluation.compare import compare, mcnemar

pytestmark = pytest.mark.core


def write(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir()
    (folder / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def row(line: int, closed=None, *, dataset="bird", partition="seen", trial=0, **scores) -> dict:
    about = {"file": f"{dataset}_{partition}", "line": line, "mode": "closed", "trial": trial}
    about |= {"dataset": dataset, "partition": partition, "image": f"{line}.jpg", "truth": "wren"}
    return about | ({"closed": closed} if closed is not None else {}) | scores


def test_mcnemar_is_the_binomial_test_of_the_disagreements():
    for b, c in ((0, 0), (0, 1), (3, 12), (12, 3), (40, 38)):
        n, k = b + c, min(b, c)
        tail = sum(comb(n, i) for i in range(k + 1)) / 2**n
        assert mcnemar(b, c) == pytest.approx(min(1, 2 * tail))
    assert mcnemar(3, 12) == pytest.approx(0.03515625)  # Fisher's classic tables


def test_differences_are_paired_and_hand_counted(tmp_path):
    first = [1.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    second = [1.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    a = write(tmp_path / "a", [row(n, v) for n, v in enumerate(first, 1)] + [row(99, 1.0)])
    b = write(tmp_path / "b", [row(n, v) for n, v in enumerate(second, 1)])
    (found,), notes = compare(a, b)
    assert (found.n, found.only_first, found.only_second) == (6, 1, 2)
    assert (found.first, found.second) == pytest.approx((50, 400 / 6))
    assert found.p == mcnemar(1, 2) == 1.0
    rng = np.random.default_rng(5)
    difference = np.subtract(second, first)
    draws = [100 * rng.choice(difference, 6).mean() for _ in range(20_000)]
    low, high = np.percentile(draws, [2.5, 97.5])
    assert found.low == pytest.approx(low, abs=100 / 6 / 2)
    assert found.high == pytest.approx(high, abs=100 / 6 / 2)
    assert notes == ["closed: 1 questions are in one of them alone"]


def test_pairing_narrows_the_interval(tmp_path):
    """Answers that agree on most questions differ by less than their own intervals suggest."""
    rng = np.random.default_rng(0)
    first = (rng.random(500) < 0.5).astype(float)
    second = np.where(np.arange(500) < 20, 1.0, first)
    a = write(tmp_path / "a", [row(n, v) for n, v in enumerate(first)])
    b = write(tmp_path / "b", [row(n, v) for n, v in enumerate(second)])
    (found,), _ = compare(a, b)
    expected = 196 * (second - first).std() / np.sqrt(500)
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.15)
    assert found.low > 0


def test_the_average_is_of_data_sets_then_of_partitions(tmp_path):
    cells = {("seen", "bird"): (0, 1), ("seen", "car"): (1, 1), ("unseen", "bird"): (0, 0)}
    cells |= {("unseen", "dog"): (1, 0), ("unseen", "pet"): (0, 1)}
    size = {key: n for n, key in enumerate(cells, start=1)}  # lines do not weigh

    def rows(which: int) -> list[dict]:
        return [
            row(line, float(pair[which]), dataset=dataset, partition=partition)
            for (partition, dataset), pair in cells.items()
            for line in range(size[partition, dataset])
        ]

    found, _ = compare(write(tmp_path / "a", rows(0)), write(tmp_path / "b", rows(1)))
    average = found[-1]
    assert len(found) == 6 and average.dataset == "average" and average.n == 15
    assert average.first == pytest.approx(100 * (0.5 + 1 / 3) / 2)
    assert average.second == pytest.approx(100 * (1 + 1 / 3) / 2)
    assert average.low == average.high == pytest.approx(25)  # nothing varies inside a data set
    assert (average.only_first, average.only_second) == (4, 6)


def test_trials_are_averaged_and_have_no_test(tmp_path):
    a = [row(1, v, trial=t, similarity=v / 2) for t, v in enumerate((1.0, 0.0))]
    b = [row(1, 1.0, trial=t, similarity=1.0) for t in (0, 1)]
    (closed, similar), _ = compare(write(tmp_path / "a", a), write(tmp_path / "b", b))
    assert (closed.first, closed.second, closed.p, closed.only_first) == (50, 100, None, None)
    assert (similar.score, similar.first, similar.second) == ("similarity", 25, 100)


def test_the_command_writes_and_prints_it(tmp_path, monkeypatch, capsys):
    a = write(tmp_path / "a", [row(n, 0.0) for n in range(9)])
    b = write(tmp_path / "b", [row(n, 1.0) for n in range(9)])
    argv = ["eval_fgvr", "--compare", str(a), str(b), "--out", str(tmp_path / "new" / "out")]
    monkeypatch.setattr(sys, "argv", argv)
    eval_fgvr.main()
    with open(tmp_path / "new" / "out" / "compare.csv", newline="") as file:
        (found,) = csv.DictReader(file)
    assert (found["n"], found["only_second"], float(found["difference"])) == ("9", "9", 100)
    assert float(found["p"]) == pytest.approx(2 / 2**9)
    assert "+100.00" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(1, 2.0)], r"b/lines.jsonl:1: 'closed' must lie in \[0, 1\], got 2.0"),
        ([{"line": 1}], "b/lines.jsonl:1: no line that an evaluation writes"),
        ([row(1, 1.0) | {"image": "x.jpg"}], r"line 1 of 'bird_seen' is about \('1.jpg', 'wren'"),
        ([row(2, 1.0)], "have no question and score in common"),
    ],
)
def test_what_cannot_be_compared_is_named(rows, message, tmp_path):
    a, b = write(tmp_path / "a", [row(1, 1.0)]), write(tmp_path / "b", rows)
    with pytest.raises(ValueError, match=message):
        compare(a, b)


def test_one_folder_is_too_few(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval_fgvr", "--compare", "a"])
    with pytest.raises(ValueError, match=r"--compare: give two folders of evaluations, got \['a'"):
        eval_fgvr.main()
