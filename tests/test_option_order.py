"""The order of the options: how it is drawn, what it changes, and the baselines beside a table."""

from __future__ import annotations

import csv
import json
from collections import Counter

import pytest
from support import tiny
from test_eval_fgvr import answers_in, evaluate, write_questions
from test_rescore import line, rescore, write_lines

from tercet.core.types import EvalQuestion
from tercet.train.evaluation.answer_file import Answer
from tercet.train.evaluation.option_bias import baseline_rows, by_place, meaning
from tercet.train.evaluation.questions import Questions, orders_of, shown_in
from tercet.train.evaluation.scoring import cell, score_all
from tercet.train.evaluation.tables import AVERAGE

OPTIONS = ("wren", "puffin", "gull", "tern")
NO_ENCODER = ("--text_encoder", "null")


def question(n: int = 1, options=OPTIONS, truth="wren", file="bird_seen") -> EvalQuestion:
    return EvalQuestion(
        "", "Which?", options, truth, "bird", "seen", "bird", f"birds/{n}.jpg", file, n
    )


def test_orders():
    assert orders_of(question(), "released", 0) == [()]
    swapped = question(options=("puffin", "wren", "gull"))
    rotated = [shown_in(swapped, o).options for o in orders_of(swapped, "rotated", 0)]
    assert rotated == [
        ("wren", "gull", "puffin"),
        ("puffin", "wren", "gull"),
        ("gull", "puffin", "wren"),
    ]
    drawn = [orders_of(question(n), "shuffled", 3) for n in range(2400)]
    assert all(len(of) == 1 and sorted(of[0]) == [0, 1, 2, 3] for of in drawn)
    counts = Counter(of[0] for of in drawn)
    # 24 orders at 100 each: chi-squared with 23 degrees of freedom is below 49.7 (p = 0.001).
    assert sum((counts[o] - 100) ** 2 / 100 for o in counts) < 49.7 and len(counts) == 24
    assert drawn == [orders_of(question(n), "shuffled", 3) for n in range(2400)]
    assert drawn != [orders_of(question(n), "shuffled", 4) for n in range(2400)]


def scored_with(kind: str, choose, n: int = 60):
    """Answers of a model that picks `choose(shown options, question)`."""
    asked = [question(i) for i in range(1, n + 1)]
    answers = [
        Answer(
            *(q.file, q.line, "closed", 0),
            f"<answer>{choose(shown_in(q, order).options, q)}</answer>",
            order=order,
        )
        for q in asked
        for order in orders_of(q, kind, 0)
    ]
    return score_all(answers, Questions(asked, {"bird": OPTIONS}))


def baselines(scored) -> dict[str, float]:
    rows = [r for r in baseline_rows(scored) if r.score == "closed" and r.setting == "seen"]
    assert all(r.cells[AVERAGE].n == 0 and r.source == "baseline" for r in rows)
    return {r.model: r.cells[AVERAGE].value for r in rows}


def test_a_model_that_takes_the_first_option_scores_100_only_where_the_truth_is_first():
    for kind, expected in (("released", 100), ("rotated", 25)):
        scored = scored_with(kind, lambda shown, q: shown[0])
        assert cell(scored, "closed").value == expected
        assert baselines(scored) == {"always the first option": expected, "chance": 25}
    scored = scored_with("shuffled", lambda shown, q: shown[0])
    first = 100 * sum(s.shown[0] == "wren" for s in scored) / 60
    assert cell(scored, "closed").value == pytest.approx(first) != 100
    assert baselines(scored)["always the first option"] == pytest.approx(first)


def test_the_spread_by_place_is_hand_counted():
    def choose(shown, q):  # right at the first two places, and half the time at the third
        right = shown.index(q.truth) < 2 or shown.index(q.truth) == 2 and q.line % 2
        return q.truth if right else shown[3]

    scored = scored_with("rotated", choose)
    assert by_place(scored) == [
        (60, 1, 1, pytest.approx(0.25)),
        (60, 1, 1, pytest.approx(0.25)),
        (60, 0.5, 0.5, pytest.approx(0.125)),
        (60, 1, 1, pytest.approx(0.375)),
    ]
    assert cell(scored, "closed").value == pytest.approx(87.5)
    assert cell(scored, "closed").n == 60
    assert meaning(scored) == [
        "options rotated: mean of the true option at every place; with it at place 1 to 4: "
        "100.0, 100.0, 50.0, 100.0 (spread 50.0)"
    ]
    (text,) = meaning(scored_with("released", choose))
    assert "as in the files: the true one stands first in 100.0 %" in text and "rotated" in text
    assert meaning([]) == []


def test_chance_counts_names_that_hold_the_true_one():
    """By the released rule "herring gull" is right where "gull" is."""
    asked = question(options=("gull", "herring gull", "tern", "wren"), truth="gull")
    answers = [Answer("bird_seen", 1, "closed", 0, "", order=(1, 0, 2, 3))]
    scored = score_all(answers, Questions([asked], {"bird": OPTIONS}))
    rows = {(r.score, r.model): r.cells["bird"].value for r in baseline_rows(scored)}
    assert rows["closed", "chance"] == 50 and rows["closed_strict", "chance"] == 25
    assert rows["closed", "always the first option"] == 100
    assert rows["closed_strict", "always the first option"] == 0


def test_the_command_asks_in_every_order(tmp_path, monkeypatch, capsys):
    tiny().save(tmp_path / "policy")
    more = [f"--questions={write_questions(tmp_path)}", "--options=rotated"]
    rows = evaluate(monkeypatch, tmp_path, *more)
    said = answers_in(tmp_path)
    assert len(said) == 3 * 5 and [row["n"] for row in rows] == ["3", "3"]
    assert sorted(a["order"] for a in said if a["line"] == 1 and a["mode"] == "closed") == [
        [0, 1, 2, 3],
        [1, 2, 3, 0],
        [2, 3, 0, 1],
        [3, 0, 1, 2],
    ]
    assert all(a["order"] == [] for a in said if a["mode"] == "open")
    assert evaluate(monkeypatch, tmp_path, *more) == rows and answers_in(tmp_path) == said
    printed = capsys.readouterr().out
    assert "always the first option" in printed and "options rotated" in printed
    out = tmp_path / "new" / "out"
    with open(out / "by_place.csv", newline="") as file:
        assert [r["answers"] for r in csv.DictReader(file)] == ["3"] * 4
    with pytest.raises(ValueError, match="were given with options 'rotated', now it is 'shuffled'"):
        evaluate(monkeypatch, tmp_path, more[0], "--options=shuffled")


def test_rescored_answers_keep_their_order(tmp_path, monkeypatch):
    lines = [
        line("my_bird_seen", 1, "closed", f"<answer>{OPTIONS[order[0]]}</answer>")
        | {"order": order}
        for order in ([0, 1, 2, 3], [3, 0, 1, 2])
    ]
    answers = write_lines(tmp_path / "a.jsonl", lines)
    paths = [write_questions(tmp_path)]
    (row,) = rescore(monkeypatch, tmp_path / "o", answers, paths, *NO_ENCODER)
    assert (row["n"], float(row["closed"])) == ("1", 50)
    scored = [json.loads(x) for x in (tmp_path / "o" / "lines.jsonl").open()]
    assert [s["order"] for s in scored] == [[0, 1, 2, 3], [3, 0, 1, 2]]
    write_lines(answers, [lines[0] | {"order": [0, 0, 1, 2]}])
    with pytest.raises(ValueError, match=r"a.jsonl:1: 'order' must hold each of \[0, 1, 2, 3\]"):
        rescore(monkeypatch, tmp_path / "o", answers, paths, *NO_ENCODER)
