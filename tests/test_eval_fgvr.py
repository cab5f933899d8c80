"""Asking: answers belong to their questions, are written at once, and are never asked for twice."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from sglang_support import FLAGS, PYTHON, processes_in
from support import tiny

from tercet.core.data.manifest import Manifest
from tercet.core.prompts import closed_world_text, open_world_text, stage2_text
from tercet.core.types import Completion, EvalQuestion, Photo, PolicyParts
from tercet.rollout import launch
from tercet.train import eval_fgvr
from tercet.train.cli.arguments import overridden
from tercet.train.evaluation.held_out import ask, table

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


class Dying:
    """An engine whose process dies after so many answers."""

    def __init__(self, engine, answers: int):
        self.engine, self.left, self.asked = engine, answers, []

    async def generate(self, requests, sampling):
        self.asked += [request.id for request in requests]
        async for completion in self.engine.generate(requests, sampling):
            if self.left == 0:
                raise OSError("died")
            self.left -= 1
            yield completion

    def close(self) -> None: ...


def write_questions(folder: Path, n: int = 3, name: str = "my_bird_seen") -> str:
    lines = []
    for i in range(n):
        photo = folder / "photos" / "wren" / f"{i}.png"
        photo.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (70, 60), (80 * i % 256, 90, 30)).save(photo)
        line = {"image_path": f"/far/away/birds/wren/{i}.png", "question": f"Which is {i}?"}
        line |= {"options": ["wren", "puffin", "gull", "tern"], "ground_truth": "wren"}
        lines.append(json.dumps(line))
    (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return str(folder / f"{name}.jsonl")


def evaluate(monkeypatch, folder: Path, *more: str) -> list[dict]:
    """Run the command on the questions and photos in `folder`; rows of table.csv."""
    argv = [f"--model.path={folder / 'policy'}", f"--images={folder / 'photos'}"]
    argv += [f"--out={folder / 'new' / 'out'}", "--max_tokens=6", "--text_encoder=null"]
    argv = overridden([*argv, "--device=cpu"], more)
    monkeypatch.setattr(sys, "argv", ["eval_fgvr", *argv])
    eval_fgvr.main()
    with open(folder / "new" / "out" / "table.csv", newline="") as file:
        return list(csv.DictReader(file))


def answers_in(folder: Path) -> list[dict]:
    with open(folder / "new" / "out" / "answers.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture
def work(tmp_path) -> Path:
    tiny().save(tmp_path / "policy")
    return tmp_path


def test_the_command_asks_in_both_modes_and_writes_every_answer(work, monkeypatch, capsys):
    rows = evaluate(monkeypatch, work, f"--questions={write_questions(work)}")
    said = answers_in(work)
    assert sorted((a["line"], a["mode"], a["trial"]) for a in said) == [
        (line, mode, 0) for line in (1, 2, 3) for mode in ("closed", "open")
    ]
    assert all(a["output"] and a["finish"] == "length" for a in said)
    assert {a["image"] for a in said} == {f"/far/away/birds/wren/{i}.png" for i in range(3)}
    assert [(r["mode"], r["n"], r["cut_off"]) for r in rows] == [
        ("closed", "3", "3"),
        ("open", "3", "3"),
    ]
    assert "Closed-world accuracy" in capsys.readouterr().out
    out = work / "new" / "out"
    for name in ("lines.jsonl", "tables.csv", "tables.md", "by_sub_category.csv"):
        assert (out / name).stat().st_size > 0
    for mode in ("closed", "open"):
        assert Image.open(out / f"confusion_{mode}.png").size[0] > 500


def test_a_run_that_died_goes_on_without_asking_twice(work, monkeypatch):
    real, engines = launch.open_engine, []

    def dying(*arguments, **options):
        engines.append(Dying(real(*arguments, **options), 4 if not engines else -1))
        return engines[-1]

    monkeypatch.setattr(launch, "open_engine", dying)
    questions = write_questions(work)
    with pytest.raises(OSError, match="died"):
        evaluate(monkeypatch, work, f"--questions={questions}")
    first = answers_in(work)
    assert len(first) == 4
    with open(work / "new" / "out" / "answers.jsonl", "a") as file:
        file.write('{"file": "my_bird_seen", "line": 3, "mode"')  # half a line
    rows = evaluate(monkeypatch, work, f"--questions={questions}")
    assert len(engines[1].asked) == 2 and [row["n"] for row in rows] == ["3", "3"]
    assert answers_in(work)[:4] == first and len(answers_in(work)) == 6
    assert evaluate(monkeypatch, work, f"--questions={questions}") == rows
    assert len(engines) == 2  # nothing was left to ask


def test_answers_of_other_settings_are_not_mixed(work, monkeypatch):
    questions = write_questions(work)
    evaluate(monkeypatch, work, f"--questions={questions}", "--modes=open")
    with pytest.raises(ValueError, match="were given with max_tokens 6, now it is 7: give another"):
        evaluate(monkeypatch, work, f"--questions={questions}", "--max_tokens=7")
    write_questions(work, 2)
    with pytest.raises(ValueError, match=r"were given with file my_bird_seen.jsonl '\w+', now"):
        evaluate(monkeypatch, work, f"--questions={questions}")


def test_trials_are_sampled_each_with_a_seed_of_its_own(work, monkeypatch):
    more = [f"--questions={write_questions(work)}", "--modes=open", "--temperature=1"]
    (row,) = evaluate(monkeypatch, work, *more, "--trials=3")
    said = answers_in(work)
    assert row["trials"] == "3" and row["inclusion_error"] != ""
    assert sorted((a["line"], a["trial"]) for a in said) == [
        (line, trial) for line in (1, 2, 3) for trial in (0, 1, 2)
    ]
    assert len({a["output"] for a in said}) > 3
    evaluate(monkeypatch, work, *more, "--trials=1", f"--out={work / 'new' / 'one'}")
    with open(work / "new" / "one" / "answers.jsonl") as file:
        again = {a["line"]: a["output"] for a in map(json.loads, file)}
    assert again == {a["line"]: a["output"] for a in said if a["trial"] == 0}


def test_missing_photos_are_an_error_wrong_or_left_out(work, monkeypatch, capsys):
    questions = write_questions(work)
    os.remove(work / "photos" / "wren" / "1.png")
    (work / "photos" / "wren" / "2.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="2 of 3 questions have no usable photo: photo '/far"):
        evaluate(monkeypatch, work, f"--questions={questions}", "--model.path=nowhere")
    more = [f"--questions={questions}", "--modes=closed"]
    (row,) = evaluate(monkeypatch, work, *more, "--missing=skip")
    assert (row["n"], row["missing"]) == ("1", "0")
    printed = capsys.readouterr().out
    assert printed.count("2 of 3 questions have no usable photo: left out") == 2  # in each table
    (row,) = evaluate(monkeypatch, work, *more, "--missing=wrong")
    assert (row["n"], row["missing"]) == ("3", "2")
    assert "counted as wrong" in (work / "new" / "out" / "tables.md").read_text()
    assert len(answers_in(work)) == 1


def test_per_class_draws_from_question_files_too(work, monkeypatch):
    more = [f"--questions={write_questions(work, 5)}", "--modes=closed", "--per_class=2"]
    (row,) = evaluate(monkeypatch, work, *more)
    assert row["n"] == "2" and len({a["line"] for a in answers_in(work)}) == 2


def test_manifests_are_asked_about_too(work, monkeypatch):
    photos = [Photo(str(work / "p" / f"{n}.png"), "bird", "wren", "Which?") for n in range(2)]
    for photo in photos:
        Path(photo.image).parent.mkdir(exist_ok=True)
        Image.new("RGB", (60, 60)).save(photo.image)
    names = {"bird": ["wren", "gull", "tern"]}
    test = {"seen": photos[:1], "unseen": photos[1:]}
    Manifest([], [], test, names, {}, {}).write(work / "mine")
    rows = evaluate(
        monkeypatch, work, f"--questions={work / 'mine' / 'triplets.json'}", "--images=[]"
    )
    assert [(r["questions"], r["mode"], r["dataset"], r["partition"], r["n"]) for r in rows] == [
        (f"triplets_{partition}", mode, "bird", partition, "1")
        for partition in ("seen", "unseen")
        for mode in ("closed", "open")
    ]


@pytest.mark.sglang
@pytest.mark.skipif(not PYTHON, reason="no SGLang server: run make test-sglang")
def test_a_server_gives_the_answers_of_this_process(work, monkeypatch):
    questions = f"--questions={write_questions(work)}"
    evaluate(monkeypatch, work, questions, "--max_tokens=4")
    here = {(a["line"], a["mode"]): a["output"] for a in answers_in(work)}
    more = ["--rollout.engine=sglang", f"--rollout.sglang_python={PYTHON}", "--max_tokens=4"]
    more += [f"--rollout.sglang_args={' '.join(FLAGS)}", f"--out={work / 'served'}"]
    evaluate(monkeypatch, work, questions, *more)
    with open(work / "served" / "answers.jsonl", encoding="utf-8") as file:
        there = {(a["line"], a["mode"]): a["output"] for a in map(json.loads, file)}
    assert there == here and len(there) == 6
    assert processes_in(work / "served" / "sglang" / "server_0") == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--questions=[]"], "--questions: give at least one file"),
        (["--trials=2"], "--trials 2 needs --temperature above 0"),
        (["--modes", "open", "open"], "--modes: closed, open or both, each once"),
        (["--prompt=stage2"], "--prompt stage2 shows no options: it needs --modes open"),
        (["--out=my_bird_seen.jsonl"], "--out: my_bird_seen.jsonl is a file"),
        (["--questions", "my_bird_seen.jsonl", "a/../my_bird_seen.jsonl"], "have one name, 'my_b"),
        (["--modes=shut"], "modes must be a list, each entry 'closed' or 'open'"),
        (["--options=sorted"], "options must be 'released'"),
    ],
)
def test_options_that_do_not_go_together_are_named(more, message, tmp_path, monkeypatch):
    write_questions(tmp_path)
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    argv = overridden(["--questions=my_bird_seen.jsonl", "--model.path=nowhere"], more)
    with pytest.raises(ValueError, match=message):
        monkeypatch.setattr(sys, "argv", ["eval_fgvr", *argv])
        eval_fgvr.main()


def test_ctrl_c_ends_the_command_and_keeps_what_was_said(work):
    """Within two seconds on an idle machine; here only that it does not finish its work."""
    questions = write_questions(work, 40)
    command = [sys.executable, "-m", "tercet.train.eval_fgvr", f"--questions={questions}"]
    command += [f"--model.path={work / 'policy'}", f"--images={work / 'photos'}", "--device=cpu"]
    command += [f"--out={work / 'out'}", "--max_tokens=64", "--text_encoder=null"]
    command += ["--rollout.max_rows=1"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    answers = work / "out" / "answers.jsonl"
    deadline = time.monotonic() + 300
    while not (answers.exists() and answers.stat().st_size) and time.monotonic() < deadline:
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    kept = answers.read_text().splitlines()
    assert running.returncode == 130 and 0 < len(kept) < 80
    assert "stopped by SIGINT: " in said and "the same command goes on" in said
    assert all(json.loads(line)["output"] for line in kept)
