"""Prompt styles: their wording to the letter, and how answers to them are read."""

from __future__ import annotations

import json
import sys

import pytest
from support import tiny
from test_eval_fgvr import answers_in, evaluate, write_questions

from tercet.core.data.manifest import Manifest
from tercet.core.prompts import closed_world_text, open_world_text, stage2_text
from tercet.core.types import Anchor, EvalQuestion
from tercet.train import eval_fgvr
from tercet.train.evaluation.answer_file import Answer
from tercet.train.evaluation.questions import Questions
from tercet.train.evaluation.scoring import score_all
from tercet.train.evaluation.styles import STYLES, Wording, scored_text

OPTIONS = ("gull", "wren", "herring gull", "tern")
QUESTION = EvalQuestion(
    "q.jpg", "Which bird?", OPTIONS, "wren", "bird", "seen", "bird", "birds/q.jpg", "bird_seen", 1
)
PRINTED = {
    ("released", "closed"): closed_world_text("Which bird?", OPTIONS),
    ("released", "open"): open_world_text("Which bird?"),
    ("stage2", "open"): stage2_text("Which bird?"),
    ("appendix", "open"): "Given the question: Which bird?. This is a fine-grained question, so "
    "you need to output fine-grained categories, such as specific animal species or car, airplane "
    "model. Output the thinking process in <think></think> and final answer in <answer></answer> "
    "tags. The response format should be as follows: <think>...</think><answer>your "
    "answer</answer>. Please follow this format exactly.",
    ("appendix", "closed"): "Given the question: Which bird?, based on the options provided in "
    "['gull', 'wren', 'herring gull', 'tern'], output the thinking process in <think></think> and "
    "final choice in <answer></answer> tags. The response format should be as follows: "
    "<think>...</think><answer>choice</answer>. Please follow this format exactly.",
    ("choice", "closed"): "Which bird?\nA. gull\nB. wren\nC. herring gull\nD. tern\n"
    "Answer with the letter from the given choices directly",
    ("both", "closed"): "Which bird?\nA. gull\nB. wren\nC. herring gull\nD. tern\n"
    "Answer the correct choice and its category name",
    ("step_by_step", "open"): "Which bird? let's think step by step",
}


def test_wordings_are_to_the_letter():
    for (name, mode), text in PRINTED.items():
        turns, photos = Wording(name).turns(QUESTION, mode)
        assert turns == [{"role": "user", "content": "<image>" + text}] and photos == ("q.jpg",)
    texts = [STYLES["cot"].texts[m](QUESTION) for m in ("closed", "open")]
    assert all(f"<{tag}>...</{tag}>" in t for t in texts for tag in ("think", "attribute"))
    assert "'herring gull'" in texts[0] and "gull" not in texts[1]


@pytest.mark.parametrize(
    ("style", "output", "closed", "strict"),
    [
        ("choice", "B", 1, 1),
        ("choice", " (B). ", 1, 1),
        ("choice", "A", 0, 0),
        ("choice", "wren", 1, 1),
        ("choice", "<answer>B</answer>", 1, 1),
        ("choice", "A. gull or B. wren", 1, 0),
        ("choice", "E", 0, 0),
        ("choice", "", 0, 0),
        ("both", "B. wren", 1, 1),
        ("both", "A. wren", 1, 0),
        ("both", "B: gull", 1, 0),
        ("both", "The bird is B) wren.", 1, 1),
        ("step_by_step", "The bill is thin: a wren.", 1, 1),
        ("step_by_step", "No herring gull: a wren.", 1, 0),
        ("released", "B", 0, 0),
        ("released", "wren", 0, 0),
    ],
)
def test_letters_and_outputs_without_tags(style, output, closed, strict):
    (s,) = score_all(
        [Answer("bird_seen", 1, "closed", 0, output)],
        Questions([QUESTION], {"bird": OPTIONS}),
        style=STYLES[style],
    )
    assert (s.scores["closed"], s.scores["closed_strict"]) == (closed, strict)


def test_letters_follow_the_order_of_the_prompt():
    asked = Answer("bird_seen", 1, "closed", 0, "C", order=(3, 2, 1, 0))
    questions = Questions([QUESTION], {"bird": OPTIONS})
    (s,) = score_all([asked], questions, style=STYLES["choice"])
    assert s.named == ["wren"] and s.scores["closed_strict"] == 1


def test_reasoning_before_a_lettered_answer_is_kept():
    text = scored_text("<think>wren?</think><answer>A</answer>", OPTIONS, STYLES["both"])
    assert text == "<think>wren?</think><answer>gull</answer>"


def demonstrations(folder) -> str:
    anchors = [
        Anchor(name + str(n), f"{folder}/{name}{n}.png", ("p",), ("n",), f"A {n}?", "bird", name)
        for name in ("Wren", "tern")
        for n in (0, 1)
    ]
    names = {"bird": ["Wren", "tern", "gull"]}
    return str(Manifest(anchors, [], {"seen": [], "unseen": []}, names, {}, {}).write(folder))


def test_in_context_shows_each_option_that_is_seen(tmp_path):
    turns, photos = Wording("in_context", demonstrations(tmp_path)).turns(QUESTION, "open")
    assert turns == [
        {"role": "user", "content": "<image>A 0?"},
        {"role": "assistant", "content": "Wren"},
        {"role": "user", "content": "<image>A 0?"},
        {"role": "assistant", "content": "tern"},
        {"role": "user", "content": "<image>Which bird?"},
    ]
    assert photos == (str(tmp_path / "Wren0.png"), str(tmp_path / "tern0.png"), "q.jpg")


def test_the_command_asks_with_several_photos_and_with_letters(tmp_path, monkeypatch):
    tiny().save(tmp_path / "policy")
    questions = write_questions(tmp_path)
    for n in range(2):
        pixels = (tmp_path / "photos" / "wren" / f"{n}.png").read_bytes()
        for name in ("Wren", "tern"):
            (tmp_path / f"{name}{n}.png").write_bytes(pixels)
    shown = [f"--demonstrations={demonstrations(tmp_path)}", "--prompt=in_context"]
    rows = evaluate(monkeypatch, tmp_path, f"--questions={questions}", *shown)
    assert [row["n"] for row in rows] == ["3", "3"] and len(answers_in(tmp_path)) == 6
    scored = [json.loads(x) for x in (tmp_path / "new" / "out" / "lines.jsonl").open()]
    assert all(s["answer"] == s["output"].strip() for s in scored)
    more = ["--prompt=choice", "--modes=closed", f"--out={tmp_path / 'new' / 'choice'}"]
    evaluate(monkeypatch, tmp_path, f"--questions={questions}", *more)
    settings = json.loads((tmp_path / "new" / "choice" / "run.json").read_text())
    assert settings["prompt"] == "choice"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompt=choice"], "--prompt choice shows the options: it needs --modes closed"),
        (["--prompt=in_context"], "--prompt in_context and --demonstrations triplets.json go tog"),
        (["--demonstrations=t.json"], "go together: got 'released' and 't.json'"),
        (["--prompt=riddle"], "prompt must be 'released' or 'stage2' or"),
    ],
)
def test_styles_that_cannot_be_asked_are_named(more, message, tmp_path, monkeypatch):
    questions = write_questions(tmp_path)
    argv = ["eval_fgvr", f"--questions={questions}", "--model.path=nowhere", *more]
    monkeypatch.setattr(sys, "argv", [*argv, f"--out={tmp_path / 'out'}", "--text_encoder=null"])
    with pytest.raises(ValueError, match=message):
        eval_fgvr.main()
