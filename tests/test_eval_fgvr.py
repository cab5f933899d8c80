"""Evaluation with a scripted engine: answers belong to their questions; tables by hand."""

from __future__ import annotations

import json
import sys

import pytest
from PIL import Image
from support import tiny

from tercet.core.prompts import closed_world_text, open_world_text, stage2_text
from tercet.core.types import Completion, EvalQuestion, PolicyParts
from tercet.train import eval_fgvr
from tercet.train.evaluation.answers import ask, table

NAMES = {"bird": ("least auklet", "crested auklet", "parakeet auklet")}
OUTPUTS = [
    "<think>small</think><answer>Least Auklet</answer>",  # right
    "<think>?</think><answer>least auklet or crested auklet</answer>",  # lists two
    "least auklet",  # no tags
    "<think>x</think><answer>crested auklet</answer>",  # wrong
]
PARTITIONS = ["seen", "seen", "seen", "unseen"]


def questions() -> list[EvalQuestion]:
    options = NAMES["bird"]
    return [
        EvalQuestion(f"{n}.jpg", f"Which bird {n}?", options, "least auklet", "bird", partition)
        for n, partition in enumerate(PARTITIONS)
    ]


class Scripted:
    """Answers OUTPUTS[n] to question n, the last question first; keeps the requests."""

    weight_version = 0

    def __init__(self, parts: PolicyParts):
        self.parts, self.asked = parts, {}

    async def generate(self, requests, sampling):
        assert sampling.temperature == 0
        for request in reversed(requests):
            n = int(request.images[0].split(".")[0])
            self.asked[n] = self.parts.tokenizer.decode(request.prompt_ids)
            ids = tuple(self.parts.tokenizer.encode(OUTPUTS[n], add_special_tokens=False))
            yield Completion(request.id, 0, ids, (0.0,) * len(ids), "stop", 0)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("stage2", lambda q: stage2_text(q.question)),
        ("open_world", lambda q: open_world_text(q.question)),
        ("closed_world", lambda q: closed_world_text(q.question, list(q.options))),
    ],
)
def test_answers_keep_their_questions(prompt, text):
    engine = Scripted(parts := tiny())
    answers = ask(engine, parts, questions(), prompt=prompt, names=NAMES)
    assert [answer.output for answer in answers] == OUTPUTS
    assert [answer.question for answer in answers] == questions()
    for n, question in enumerate(questions()):
        assert text(question) in engine.asked[n]


def test_tables_are_hand_counted():
    parts = tiny()
    answers = ask(Scripted(parts), parts, questions(), prompt="stage2", names=NAMES)
    assert table(answers) == {
        "seen": {"n": 3, "included": 100.0, "exact": pytest.approx(100 / 3)},
        "unseen": {"n": 1, "included": 0.0, "exact": 0.0},
    }
    closed = ask(Scripted(parts), parts, questions(), prompt="closed_world", names=NAMES)
    assert table(closed)["seen"] == {"n": 3, "closed": pytest.approx(200 / 3)}
    unnamed = ask(Scripted(parts), parts, questions(), prompt="stage2", names={})
    assert set(table(unnamed)["seen"]) == {"n", "included"}


def test_the_command_writes_every_answer(tmp_path, monkeypatch, capsys):
    tiny().save(tmp_path / "policy")
    lines = []
    for n in range(3):
        Image.new("RGB", (70, 60), (80 * n, 90, 30)).save(tmp_path / f"{n}.png")
        line = {"image_path": f"{n}.png", "question": "What is it?", "ground_truth": "least auklet"}
        lines.append(json.dumps(line | {"options": ["least auklet", "puffin", "gull", "tern"]}))
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    argv = ["eval", f"--model.path={tmp_path / 'policy'}", f"--data={tmp_path / 'questions.jsonl'}"]
    argv += [f"--out={tmp_path / 'new' / 'eval.json'}", "--max_tokens=6", "--prompt=closed_world"]
    monkeypatch.setattr(sys, "argv", argv)
    eval_fgvr.main()
    written = json.loads((tmp_path / "new" / "eval.json").read_text())
    assert [a["question"]["image"] for a in written["answers"]] == [
        str(tmp_path / f"{n}.png") for n in range(3)
    ]
    assert all(a["output"] for a in written["answers"])
    (row,) = written["table"].values()
    assert row["n"] == 3 and "closed" in capsys.readouterr().out


def test_what_would_be_lost_at_the_end_is_named_before_a_model_is_loaded(tmp_path, monkeypatch):
    Image.new("RGB", (70, 60)).save(tmp_path / "0.png")
    line = {"question": "What is it?", "options": ["gull", "tern"], "ground_truth": "gull"}
    lines = [json.dumps({"image_path": f"{n}.png"} | line) for n in range(2)]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    (tmp_path / "file").write_text("")
    for out, message in (
        ("new/eval.json", r"1\.png': no such file \(1 bad photos"),
        ("file/eval.json", "--out: .*eval.json cannot be written: .*file is no folder"),
        (".", "--out: .* is a folder"),
    ):
        argv = ["eval", "--model.path=nowhere", f"--data={tmp_path / 'questions.jsonl'}"]
        monkeypatch.setattr(sys, "argv", [*argv, f"--out={tmp_path / out}"])
        with pytest.raises(ValueError, match=message):
            eval_fgvr.main()
