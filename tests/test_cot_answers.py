"""What a teacher is asked, how its answers are read, and every reason to reject one."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from hashlib import blake2b

import pytest

from tercet.core.language import foreign_piece
from tercet.train.cot.answers import (
    Parts,
    direct_record,
    fault_of,
    read_bullets,
    read_parts,
    record,
)
from tercet.train.cot.prompts import PROMPT, SYSTEM, cot_prompt

pytestmark = pytest.mark.core

GOOD = Parts(
    "The bird has a red crown and a long bill.",
    "- Red-bellied Woodpecker\n- Red-headed Woodpecker\n- Downy Woodpecker",
    "Its whole head is red, which rules the other two out.",
    "Red-headed Woodpecker",
)
LABEL = "Red headed Woodpecker".replace("d h", "d-h")


def said(parts: Parts) -> str:
    names = ("analysis", "options", "comparison", "prediction")
    return "".join(f"<{name}>{getattr(parts, name)}</{name}>" for name in names)


def test_the_prompt_is_table_5():
    """Beginning, middle and end as printed, with its places filled as they stand."""
    text = cot_prompt("F/A-18 {concepts}", ["twin tails", "a 'hook'"], "What is this?")
    assert text.startswith(
        "This is a picture of a F/A-18 {concepts} with the following visual features: twin tails, "
        "a 'hook'. Based on the information provided, please answer the following question. "
        "Question: What is this?. Note that you MUST first analyze the visual features that help"
    )
    assert text.endswith(
        "i.e., `<analysis>visual analysis process here</analysis><options>candidate subcategories "
        "here</options><comparison>comparison process here</comparison><prediction>predicted "
        "subcategory here</prediction>`."
    )
    # of the table as it stands in the paper's appendix
    assert blake2b(PROMPT.encode(), digest_size=8).hexdigest() == "3babfa446f2c2ae7"


def test_the_system_message_is_that_of_all_published_records(released):
    records = json.loads((released / "Fine-R1-Stage1-data.json").read_text())
    assert {r["messages"][0]["content"] for r in records} == {SYSTEM}


def test_parts_are_read_and_kept():
    assert read_parts(f"Sure!\n{said(GOOD)}\n") == GOOD
    assert fault_of(GOOD, LABEL) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "garbage",
        said(GOOD)[:-5],
        said(GOOD).replace("</options>", ""),
        said(GOOD).replace("<options>", "<options><options>"),
        said(GOOD) + "<analysis>",
        said(GOOD) * 2,
        said(replace(GOOD, comparison=" \n")),
        "<options>a</options><analysis>a</analysis><comparison>a</comparison>"
        "<prediction>a</prediction>",
        "<analysis>a<options>a</analysis></options><comparison>a</comparison>"
        "<prediction>a</prediction>",
        "</analysis>a<analysis><options>a</options><comparison>a</comparison>"
        "<prediction>a</prediction>",
    ],
)
def test_tags_that_are_not_well_formed(text):
    assert read_parts(text) is None
    assert fault_of(read_parts(text), LABEL).startswith("tags: ")


@pytest.mark.parametrize(
    "options, label, fault",
    [
        ("Auklet", "Auklet", None),
        ("1. Least Auklet\n2. Auklet: small", "auklet", None),
        ("1) Least Auklet\n2) **Auklet** (Alcidae)", "Auklet", None),
        ("Here are three:\n- Least Auklet\n- Auklet - a small one", "Auklet", None),
        ("Least Auklet, Crested Auklet, and Auklet.", "Auklet", None),
        ("Least Auklet; Auklet; C", "Auklet", None),
        ("A, B, C, D", "A", None),
        ("A, B, C, D, E", "A", "options: 5, more than 4"),
        ("- A\n- B\n- C\n- D\n- E", "A", "options: 5, more than 4"),
        ("Least Auklet, Crested Auklet", "Auklet", "options: the prediction is not among them"),
        ("- Boeing 737-200\n- MD-80", "Boeing 737", "options: the prediction is not among them"),
        ("Chrysler Town, Country; B", "Chrysler Town, Country", None),
        ("F-16A/B, F/A-18, C, D", "F/A-18", None),
        ('"Prince of Wales", B', "Prince of Wales", None),
        ("Citro\u00ebn C4, B", "Citroe\u0308n C4", None),
        ("Brewer\u2019s Blackbird, B", "Brewer's Blackbird", None),
        ("Ram C/V Cargo Van Minivan 2012 (a van), B", "Ram C/V Cargo Van Minivan 2012", None),
    ],
)
def test_the_prediction_must_be_one_of_at_most_four_options(options, label, fault):
    assert fault_of(replace(GOOD, options=options, prediction=label), label) == fault


@pytest.mark.parametrize(
    "prediction", ["Red-headed", "a Red-headed Woodpecker", "Downy Woodpecker"]
)
def test_the_prediction_must_be_the_truth(prediction):
    parts = replace(GOOD, options=f"{prediction}, Red-headed Woodpecker", prediction=prediction)
    assert fault_of(parts, LABEL) == "prediction: another sub-category"


@pytest.mark.parametrize("bad", ["<image>", "<|im_end|>", "<|image_pad|>", "\ud800"])
@pytest.mark.parametrize("part", ["analysis", "options", "comparison"])
def test_text_that_no_record_may_hold(bad, part):
    fault = fault_of(replace(GOOD, **{part: f"{getattr(GOOD, part)} {bad}"}), LABEL)
    assert fault.startswith(f"text: {part} ")


FOREIGN = [
    "La cola es muy larga y de color gris con manchas blancas.",
    "Der Vogel hat einen langen roten Schnabel und schwarze Flügel.",
    "L'oiseau a un bec court et des ailes noires avec des taches blanches.",
    "La coda è lunga e di colore grigio con macchie bianche.",
    "O pássaro tem um bico longo e asas pretas.",
    "翅膀是黑色的",
    "красные",
    "くちばし",
    "부리",
]


@pytest.mark.parametrize("foreign", FOREIGN)
def test_another_language_is_found(foreign):
    text = f"The wings are dark and the bill is short. {foreign} It has a white ring."
    assert foreign_piece(text) in foreign
    fault = fault_of(replace(GOOD, analysis=text), LABEL)
    assert fault.startswith("language: ") and fault.endswith(" is not English")
    assert fault_of(replace(GOOD, analysis=text), LABEL, english=False) is None


@pytest.mark.parametrize(
    "text",
    [
        "Pelargonium peltatum (Ivy-leaf Geranium): glossy leaves.",
        "A 5 µm layer, 30° angle, Citroën, naïve façade, ½ of it — “quoted” № 5 ™",
        "Lamborghini Gallardo LP 570-4 Superleggera",
        "",
    ],
)
def test_names_and_signs_are_english(text):
    assert foreign_piece(text) is None


def test_names_of_any_language_do_not_count():
    assert foreign_piece("This is 小海雀, a small bird.", ("小海雀",)) is None
    assert foreign_piece("This is 小海雀, a small bird.") == "小"


def test_the_published_chains_are_all_english(released):
    records = json.loads((released / "Fine-R1-Stage1-data.json").read_text())
    found = [foreign_piece(r["messages"][-1]["content"]) for r in records]
    assert [piece for piece in found if piece] == []


@pytest.mark.parametrize("part", ["<analysis>", "- ", "a, ", "<", "1. ", "a\n", "é", "."])
def test_answers_are_read_in_linear_time(part):
    text = part * (400_000 // len(part))
    started = time.process_time()
    read_parts(text)
    read_bullets(text)
    fault_of(replace(GOOD, options=text), LABEL, english=False)
    foreign_piece(text)
    assert time.process_time() - started < 20  # quadratic: hours


def test_bullets_are_read_once_each():
    text = (
        "Features:\n- A red crown.\n* **a red crown**\n1. Long bill\n2) Long tail\n\u2022 "
        + "x" * 300
    )
    assert read_bullets(text) == ["A red crown", "Long bill", "Long tail"]
    assert read_bullets("red crown\n\nlong bill") == ["red crown", "long bill"]
    assert read_bullets("") == []
    assert len(read_bullets("\n".join(f"- item {n}" for n in range(99)))) == 40


def test_records_have_the_published_layout(released):
    """Same roles, tags and headings as those of a published record."""
    found = record("photos/1.jpg", "What bird is this?", GOOD, LABEL)
    published = json.loads((released / "Fine-R1-Stage1-data.json").read_text())[0]
    assert set(found) == set(published)
    turns = [message["role"] for message in found["messages"]]
    assert turns == [message["role"] for message in published["messages"]]
    assert found["messages"][1]["content"] == "<image>What bird is this?"
    answer, theirs = (r["messages"][-1]["content"] for r in (found, published))
    for mark in (
        "<think> Analysis of Visual Features:\n",
        "\n\n Candidate Subcategories:\n",
        "\n\n Comparison Process:\n ",
        "The prediction is: ",
        "</think>\n\n<answer>",
    ):
        assert answer.count(mark) == theirs.count(mark) == 1, mark
    assert answer.endswith(f"<answer>{LABEL}</answer>")


def test_direct_records_hold_the_answer_alone():
    assert direct_record("1.jpg", "Which?", "F/A-18") == {
        "messages": [
            {"role": "user", "content": "<image>Which?"},
            {"role": "assistant", "content": "<answer>F/A-18</answer>"},
        ],
        "images": ["1.jpg"],
    }
