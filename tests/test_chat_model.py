"""A chat endpoint as the evaluated model, and as the judge of answers."""

from __future__ import annotations

import asyncio
import csv
import json
import sys
import time
from base64 import b64decode
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_eval_fgvr import answers_in, write_questions
from test_judge import Endpoint, serving, short_pauses  # noqa: F401
from test_rescore import line, write_lines

from tercet.core.prompts import closed_world_text
from tercet.rollout.at_once import at_once
from tercet.rollout.server import ServerError
from tercet.train import eval_fgvr
from tercet.train.evaluation.chat_model import chat_messages
from tercet.train.evaluation.judging import read_verdict

OPTIONS = ["wren", "puffin", "gull", "tern"]


def evaluate(monkeypatch, folder: Path, url: str, *more: str) -> list[dict]:
    argv = ["eval_fgvr", f"--questions={folder / 'my_bird_seen.jsonl'}", "--text_encoder=null"]
    argv += [f"--images={folder / 'photos'}", f"--out={folder / 'new' / 'out'}", "--max_tokens=99"]
    argv += [f"--chat.url={url}", "--chat.model=them", "--chat.patience_s=1"]
    monkeypatch.setattr(sys, "argv", [*argv, *more])
    eval_fgvr.main()
    with open(folder / "new" / "out" / "table.csv", newline="") as file:
        return list(csv.DictReader(file))


def text_of(body: dict) -> str:
    return body["messages"][-1]["content"][-1]["text"]


def test_a_served_model_is_asked_as_our_own_are(tmp_path, monkeypatch, capsys):
    write_questions(tmp_path)
    named = {True: "<answer>wren</answer>", False: "<answer>owl</answer>"}
    chat = Endpoint(lambda body: named["options" in text_of(body)])
    with serving(chat) as url:
        rows = evaluate(monkeypatch, tmp_path, url, "--model.system_prompt=Be brief.")
        assert [(r["mode"], r["n"], r["closed"]) for r in rows] == [
            ("closed", "3", "100.000000"),
            ("open", "3", ""),
        ]
        evaluate(monkeypatch, tmp_path, url, "--model.system_prompt=Be brief.")
    assert len(chat.bodies) == 6  # the second run had nothing to ask
    assert "them" in capsys.readouterr().out
    body = next(b for b in chat.bodies if closed_world_text("Which is 1?", OPTIONS) == text_of(b))
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("them", 99, 0)
    assert "seed" not in body
    url_of_photo = body["messages"][1]["content"][0]["image_url"]["url"]
    sent = Image.open(BytesIO(b64decode(url_of_photo.partition("base64,")[2])))
    photo = Image.open(tmp_path / "photos" / "wren" / "1.png")
    assert np.array_equal(np.asarray(sent), np.asarray(photo))


def test_trials_have_seeds_of_their_own(tmp_path, monkeypatch):
    write_questions(tmp_path, 1)
    chat = Endpoint(lambda body: "<answer>wren</answer>")
    with serving(chat) as url:
        more = ["--temperature=0.7", "--trials=3", "--modes=open"]
        evaluate(monkeypatch, tmp_path, url, *more)
    assert len({body["seed"] for body in chat.bodies}) == 3
    assert all(0 <= body["seed"] < 2**31 and body["temperature"] == 0.7 for body in chat.bodies)


@pytest.mark.parametrize("statuses", [[429, 500], [503]])
def test_faults_that_pass_are_waited_out(statuses, tmp_path, monkeypatch):
    write_questions(tmp_path)
    with serving(Endpoint(lambda body: "<answer>wren</answer>", statuses)) as url:
        rows = evaluate(monkeypatch, tmp_path, url)
    assert [row["n"] for row in rows] == ["3", "3"]


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        (Endpoint(statuses=[500] * 99), "no answer in 1 s: Again: status 500"),
        (Endpoint(statuses=[401] * 99), "refused a request: 401"),
        (Endpoint(statuses=[400] * 99), "refused a request: 400"),
        (Endpoint(lambda body: b"<html>x</html>"), "5 bad answers, the last one: the reply can"),
        (Endpoint(lambda body: time.sleep(2) or "x"), "no answer in 1 s: ReadTimeout"),
    ],
)
def test_an_endpoint_that_fails_ends_the_run_with_one_line(chat, message, tmp_path, monkeypatch):
    write_questions(tmp_path, 1)
    with serving(chat) as url, pytest.raises(ServerError, match=message) as caught:
        more = ["--chat.timeout_s=0.5"] if "Timeout" in message else []
        evaluate(monkeypatch, tmp_path, url, "--modes=open", *more)
    assert "\n" not in str(caught.value)


def test_answers_before_a_failure_are_kept_and_one_refused_question_is_an_empty_answer(
    tmp_path, monkeypatch
):
    write_questions(tmp_path, 4)
    chat = Endpoint(lambda body: "<answer>wren</answer>", [200, 200, 401])
    with serving(chat) as url:
        one = ["--chat.concurrency=1", "--modes=closed"]
        with pytest.raises(ServerError, match="401"):
            evaluate(monkeypatch, tmp_path, url, *one)
        assert len(answers_in(tmp_path)) == 2
        chat.statuses = [200, 400]
        (row,) = evaluate(monkeypatch, tmp_path, url, *one)
    finishes = [(a["line"], a["output"], a["finish"]) for a in answers_in(tmp_path)]
    assert finishes[2:] == [(3, "<answer>wren</answer>", ""), (4, "", "refused")]
    assert (row["n"], row["no_answer"], float(row["closed"])) == ("4", "1", 75)


def test_several_photos_keep_their_places(photos):
    turns = [
        {"role": "user", "content": "<image>one?"},
        {"role": "assistant", "content": "wren"},
        {"role": "user", "content": "a <image> b"},
    ]
    first, said, last = chat_messages(turns, photos[:2])
    assert [item["type"] for item in last["content"]] == ["text", "image_url", "text"]
    assert said == {"role": "assistant", "content": "wren"}
    assert first["content"][1]["text"] == "one?"
    assert first["content"][0] != last["content"][1]


def test_at_once_is_bounded_and_its_first_error_ends_it():
    running, most, done = 0, 0, []

    async def work(n: int) -> int:
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        await asyncio.sleep(0.001 * (n % 3))
        running -= 1
        if n == 20:
            raise ValueError("twenty")
        return n

    async def collect():
        async for n in at_once(range(100), 4, work):
            done.append(n)

    with pytest.raises(ValueError, match="twenty"):
        asyncio.run(collect())
    assert most == 4 and 10 < len(done) <= 24 and len(set(done)) == len(done)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("accuracy: 100, usefulness: 70, obedience: 95", (100, 70, 95)),
        ("**Obedience**: 5\n**Accuracy** = 0\n- Usefulness (0-100): 7.5", (0, 7.5, 5)),
        ("Obedience: 5; accuracy: 0; usefulness: 7.5", (0, 7.5, 5)),
        ('{"accuracy": 85, "usefulness": 60, "obedience": 100}', (85, 60, 100)),
        ("accuracy: 85/100, usefulness: 60/100, obedience: 100/100", (85, 60, 100)),
        ("<think>accuracy: 1</think>accuracy: 85, usefulness: 60, obedience: 7", (85, 60, 7)),
        ("85, 60, 100", (85, 60, 100)),
        ("Score: 85/100", None),
        ("eighty", None),
        ("", None),
        ("accuracy: 300, usefulness: 60, obedience: 100", None),
        ("accuracy: -5, usefulness: 60, obedience: 100", None),
        ("accuracy: 85, usefulness: 60", None),
        ("accuracy: 85, accuracy: 60, obedience: 100, usefulness: 3", None),
        ("85 60 100 4", None),
        ("<think>85, 60, 100", None),
    ],
)
def test_verdicts_are_three_numbers(reply, verdict):
    assert read_verdict(reply) == verdict


def test_reading_a_verdict_takes_linear_time():
    start = time.process_time()
    for text in ("accuracy" * 20_000, "accuracy: " + "9" * 100_000, "accuracy " * 10_000 + "-"):
        read_verdict(text)
    assert time.process_time() - start < 5


def judge_answers(monkeypatch, folder: Path, url: str, *more: str) -> list[dict]:
    argv = ["eval_fgvr", f"--questions={folder / 'my_bird_seen.jsonl'}", "--text_encoder=null"]
    argv += [f"--rescore={folder / 'a.jsonl'}", f"--out={folder / 'out'}", f"--judge.url={url}"]
    monkeypatch.setattr(sys, "argv", [*argv, *more])
    eval_fgvr.main()
    with open(folder / "out" / "judge.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_judge_gives_three_means_and_is_asked_again_where_it_cannot_be_read(
    tmp_path, monkeypatch, capsys
):
    write_questions(tmp_path)
    outputs = ["good", "bad", "odd"]
    lines = [line("my_bird_seen", n, "closed", text) for n, text in enumerate(outputs, start=1)]
    write_lines(tmp_path / "a.jsonl", lines)

    def say(body: dict) -> str:
        text = text_of(body)
        if "good" in text:
            whole = "accuracy: 100, usefulness: 80, obedience: 90"
            return whole if "Attempt 2" in text else "85/100"
        return "accuracy: 0, usefulness: 20, obedience: 50" if "bad" in text else "eighty"

    chat = Endpoint(say)
    with serving(chat) as url:
        (row,) = judge_answers(monkeypatch, tmp_path, url)
        assert len(chat.bodies) == 2 + 1 + 3
        again = judge_answers(monkeypatch, tmp_path, url)
        assert again == [row] and len(chat.bodies) == 6  # all replies are kept in a file
    assert (row["answers"], row["unreadable"]) == ("3", "1")
    found = [float(row[name]) for name in ("RSC_A", "RSC_U", "RSC_O")]
    assert found == [50, 50, 70] and float(row["RSC_A_low"]) == 0
    judged = [json.loads(x) for x in (tmp_path / "out" / "judged.jsonl").open()]
    assert [(j["line"], j["RSC_U"]) for j in judged] == [(1, 80), (2, 20), (3, None)]
    assert "3 answers were judged without their photo" in capsys.readouterr().out
    asked = text_of(chat.bodies[0])
    assert "Options: ['wren', 'puffin', 'gull', 'tern']" in asked and "Right answer: wren" in asked


def test_a_judge_sees_the_photo_where_it_is_there(tmp_path, monkeypatch):
    write_questions(tmp_path, 1)
    write_lines(tmp_path / "a.jsonl", [line("my_bird_seen", 1, "open", "{braces} {0}")])
    chat = Endpoint(lambda body: "accuracy: 1, usefulness: 2, obedience: 3")
    with serving(chat) as url:
        judge_answers(monkeypatch, tmp_path, url, f"--images={tmp_path / 'photos'}")
    content = chat.bodies[0]["messages"][0]["content"]
    assert [item["type"] for item in content] == ["image_url", "text"]
    assert "{braces} {0}" in content[1]["text"] and "Options" not in content[1]["text"]


def test_one_model_at_a_time(tmp_path, monkeypatch):
    write_questions(tmp_path, 1)
    with pytest.raises(ValueError, match="--chat.url and --clip are given: name one model"):
        evaluate(monkeypatch, tmp_path, "http://127.0.0.1:9/v1", "--clip=x", "--modes=closed")
