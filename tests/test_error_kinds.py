"""Kinds of error: each rule on its own, on a real chain of thought, and in the files."""

from __future__ import annotations

import json
import time

import pytest
from test_rescore import NO_ENCODER, line, rescore, write_lines, write_questions

from tercet.train.evaluation.error_kinds import error_kind

pytestmark = pytest.mark.core

NAMES = ("least auklet", "crested auklet", "auklet", "Acura RL Sedan 2012")


def kind(output: str, truth: str = "auklet", finish: str = "stop", cars: bool = False):
    return error_kind(output, finish, truth, NAMES, cars)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("<think>auklet</think><answer>Auklet</answer>", None),
        ("<think>auklet or puffin</think><answer>puffin</answer>", "not_chosen"),
        ("<think>crested auklet?</think><answer>crested auklet</answer>", None),  # released rule
        ("<think>a crested auklet</think><answer>puffin</answer>", "never_candidate"),
        ("<think>small</think><answer>puffin</answer>", "never_candidate"),
        ("<answer>auklet or least auklet</answer>", "several_names"),
        ("auklet", "no_answer"),
        ("<think>auklet</think><answer> </answer>", "no_answer"),
        ("<think>这是一只鸟,它很小</think><answer>海鸟</answer>", "other_language"),
        ("<think>это маленькая птица auklet</think><answer>люрик</answer>", "other_language"),
        ("<think>très petit, auklet, œil</think><answer>macareux</answer>", "not_chosen"),
        ("<think>long, α-shaped bill</think><answer>puffin</answer>", "never_candidate"),
        ("<answer>puffin</answer> It was an auklet.", "never_candidate"),  # said afterwards
    ],
)
def test_each_kind(output, expected):
    assert kind(output) == expected


def test_cut_off_is_an_output_at_the_limit_without_an_answer():
    assert kind("<think>auklet, auklet", finish="length") == "cut_off"
    assert kind("<answer>puffin</answer> and", finish="length") == "never_candidate"


def test_names_in_other_scripts_are_no_other_language():
    assert error_kind("<answer>海雀</answer>", "", "角嘴海雀", ("角嘴海雀",)) == "never_candidate"


def test_a_car_need_not_be_said_with_body_and_year():
    truth = "Acura RL Sedan 2012"
    assert kind("<think>x</think><answer>Acura RL</answer>", truth, cars=True) is None
    said = "<think>Acura RL or TL</think><answer>Acura TL</answer>"
    assert kind(said, truth, cars=True) == "not_chosen"
    assert kind(said, truth) == "never_candidate"


def test_it_is_linear_in_the_output():
    def seconds(n: int) -> float:
        start = time.process_time()
        for text in ("<answer>" * n, "鸟" * n + "<answer>x</answer>", "auklet " * n + "<answer>p"):
            kind(text + "</answer>")
        return time.process_time() - start

    assert seconds(100_000) < 60 * max(seconds(10_000), 1e-3)


def test_columns_and_examples(tmp_path, monkeypatch, capsys):
    """In the files of an evaluation; all kinds and the right answers make up the whole."""
    said = [
        "<think>Laysan albatross?</think><answer>gull</answer>",
        "<think>?</think><answer>gull</answer>",
        "<answer>Laysan Albatross</answer>",
        "<answer>Laysan Albatross, Sooty Albatross</answer>",
        "none <b>of</b> it",
    ]
    lines = [line("bird_seen", 2, "closed", text, trial) for trial, text in enumerate(said)]
    answers = write_lines(tmp_path / "a.jsonl", lines)
    paths = write_questions(tmp_path)
    (row,) = rescore(monkeypatch, tmp_path / "o", answers, paths, *NO_ENCODER)
    shares = {name: float(v) for name, v in row.items() if name.startswith("error_")}
    assert shares == {
        "error_not_chosen": 20,
        "error_never_candidate": 20,
        "error_several_names": 20,
        "error_no_answer": 20,
        "error_cut_off": 0,
        "error_other_language": 0,
    }
    found = [json.loads(x)["error"] for x in (tmp_path / "o" / "lines.jsonl").open()]
    assert found == ["not_chosen", "never_candidate", None, "several_names", "no_answer"]
    examples = (tmp_path / "o" / "errors.md").read_text()
    assert "| not_chosen | 20.00 |" in examples and "> none \\<b>of\\</b> it" in examples
    assert "### several_names (closed): 1" in examples
    assert "Errors (% of answers)" in capsys.readouterr().out
