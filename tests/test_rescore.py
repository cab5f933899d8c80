"""`--rescore`: equal to the released script's rules, written out one by one, on any outputs."""

from __future__ import annotations

import csv
import json
import random
import sys
import time
from pathlib import Path

import pytest
from eval_support import Released, siglip

from tercet.train import eval_fgvr
from tercet.train.evaluation.metrics import closed_world_correct, open_world_included
from tercet.train.evaluation.text_similarity import TextEncoder

QUESTIONS = {
    "bird_seen": [
        ("birds/001.Black_footed_Albatross/1.jpg", "Black_Footed_Albatross", "Laysan Albatross"),
        ("bird_200/images/002.Laysan_Albatross/1.jpg", "Laysan Albatross", "Sooty Albatross"),
    ],
    "car_unseen": [
        (
            "/home/me/stanford-cars/cars_test/00002.jpg",
            "Acura RL Sedan 2012",
            "Acura TL Sedan 2012",
        ),
        ("stanford-cars/cars_test/00003.jpg", "Hummer 2010", "Acura RL Sedan 2012"),
        ("stanford-cars/cars_test/00004.jpg", "Ferrari_458_Italia 2012", "Hummer 2010"),
    ],
    "my_things": [
        ("fgvc_aircraft/data/images/1.jpg", "Boeing 737-200", "Boeing 737-300"),
        ("fgvc_aircraft/data/images/2.jpg", "Boeing 737-300", "aircraft"),
        ("fgvc_aircraft/data/images/3.jpg", "aircraft", "Boeing 737-300"),
        ("flower102/jpg/1.jpg", "hard-leaved pocket orchid", "Object"),
        ("dogs_120/Images/n0-x/1.jpg", "object", "Shih-Tzu"),
    ],
}
"""File -> (path, truth, another option)."""
PIECES = [
    *("<answer>", "</answer>", "<answer>", "</answer>", "<think>", "</think>", "<answer></answer>"),
    *("\n", " ", "\t", "", "_", ".", "你好，这是鸟", "Ответ: птица", "🦜", "<ANSWER>", "</answer"),
    *("black footed albatross", "BLACK_FOOTED_ALBATROSS", "acura rl", "Boeing\n737-300", "İ"),
]


def nasty(rng: random.Random, options: list[str]) -> str:
    """An output with nested and repeated tags, nothing, other languages, or 100 kB of it."""
    kind = rng.random()
    if kind < 0.1:
        return rng.choice(["", " ", "\n", "<answer> \n </answer>", "<answer></answer>"])
    parts = rng.choices([*PIECES, *options, *options], k=rng.randint(1, 9))
    if kind < 0.12:
        parts.insert(1, "very long " * 10_000)
    if kind > 0.6:
        parts = [*parts, "<answer>", *rng.choices([*options, *PIECES], k=2), "</answer>"]
    return "".join(parts)


def write_questions(folder: Path) -> list[str]:
    for stem, rows in QUESTIONS.items():
        lines = [
            {
                "image_path": path,
                "question": "What is it?",
                "options": [truth, other, "none of it"],
                "ground_truth": truth,
            }
            for path, truth, other in rows
        ]
        (folder / f"{stem}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return [str(folder / f"{stem}.jsonl") for stem in QUESTIONS]


def rescore(monkeypatch, out: Path, answers: Path, questions: list[str], *more: str) -> list[dict]:
    """Rows of table.csv after the command that outside checks call."""
    argv = ["--questions", *questions, "--rescore", str(answers), "--domain_words", "released"]
    argv += ["--options", "released", "--out", str(out), *more]
    monkeypatch.setattr(sys, "argv", ["eval_fgvr", *argv])
    eval_fgvr.main()
    with open(out / "table.csv", newline="") as file:
        return list(csv.DictReader(file))


def line(file: str, number: int, mode: str, output: str, trial: int = 0) -> dict:
    return {"file": file, "line": number, "mode": mode, "trial": trial, "output": output}


def write_lines(path: Path, lines) -> Path:
    path.write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return siglip(tmp_path_factory.mktemp("siglip"))


@pytest.mark.parametrize("mask", [False, True], ids=["no mask", "attention mask"])
def test_every_figure_equals_the_released_rules(mask, tmp_path, monkeypatch):
    folder = siglip(tmp_path / "siglip", mask=mask)
    rng, lines = random.Random(mask), []
    for stem, rows in QUESTIONS.items():
        for n, (_, truth, other) in enumerate(rows, start=1):
            # One question has one answer a mode and trial: the outputs are spread over trials.
            for mode in ("open", "closed"):
                for trial in range(25):
                    lines.append(line(stem, n, mode, nasty(rng, [truth, other]), trial))
    rng.shuffle(lines)
    answers = write_lines(tmp_path / "answers.jsonl", lines)
    paths = write_questions(tmp_path)
    more = ["--text_encoder", str(folder)]
    table = rescore(monkeypatch, tmp_path / "out", answers, paths, *more)
    assert [(r["questions"], r["mode"]) for r in table] == [
        (stem, mode) for stem in QUESTIONS for mode in ("closed", "open")
    ]
    released = Released(folder)
    for row in table:
        expected = {"closed": [], "inclusion": [], "similarity": []}
        for x in lines:
            path, truth, _ = QUESTIONS[x["file"]][x["line"] - 1]
            if (x["file"], x["mode"]) != (row["questions"], row["mode"]):
                continue
            if x["mode"] == "closed":
                expected["closed"].append(released.closed(x["output"], truth))
            else:
                expected["inclusion"].append(released.inclusion(x["output"], truth, path))
                expected["similarity"].append(released.similarity(x["output"], truth, path))
        assert int(row["n"]) == len(QUESTIONS[row["questions"]]) and row["trials"] == "25"
        for name, values in expected.items():
            if not values:
                assert row[name] == ""
                continue
            mean = 100 * sum(values) / len(values)
            assert float(row[name]) == pytest.approx(mean, abs=1e-4)
            assert float(row[f"{name}_low"]) <= mean <= float(row[f"{name}_high"])
            assert 0 < mean < 100
    scored = [json.loads(x) for x in (tmp_path / "out" / "lines.jsonl").open(encoding="utf-8")]
    assert len(scored) == len(lines)
    said = {tuple(x[k] for k in ("file", "line", "mode", "trial")): x["output"] for x in lines}
    for s in scored:
        path, truth, _ = QUESTIONS[s["file"]][s["line"] - 1]
        output = said[s["file"], s["line"], s["mode"], s["trial"]]
        assert (s["output"], s["truth"]) == (output, truth)
        if s["mode"] == "closed":
            assert s["closed"] == released.closed(output, truth)
        else:
            assert s["domain_word"] == released.word(path)
            assert s["inclusion"] == released.inclusion(output, truth, path)
            found = released.similarity(output, truth, path)
            assert s["similarity"] == pytest.approx(found, abs=1e-4)


def test_words_by_super_category(tmp_path, encoder, monkeypatch):
    """They change the word, and where the rule for cars' names applies."""
    lines = [line(stem, 1, "open", "Acura RL") for stem in QUESTIONS]
    answers = write_lines(tmp_path / "answers.jsonl", lines)
    argv = ["--questions", *write_questions(tmp_path), "--rescore", str(answers)]
    argv += ["--text_encoder", str(encoder), "--domain_words", "super_category"]
    monkeypatch.setattr(sys, "argv", ["eval_fgvr", *argv, "--out", str(tmp_path / "out")])
    eval_fgvr.main()
    scored = [json.loads(x) for x in (tmp_path / "out" / "lines.jsonl").open()]
    assert [s["domain_word"] for s in scored] == ["bird", "car", "aircraft"]
    assert [s["inclusion"] for s in scored] == [0, 1, 0]


def test_texts_are_embedded_once_and_kept(tmp_path, encoder, monkeypatch):
    lines = [line("bird_seen", n, "open", "a bird", t) for n in (1, 2) for t in (0, 1)]
    answers = write_lines(tmp_path / "answers.jsonl", lines)
    paths, more = write_questions(tmp_path), ["--text_encoder", str(encoder)]
    asked = []

    embed = TextEncoder.__call__

    def counted(self, texts):
        asked.append(list(texts))
        return embed(self, texts)

    monkeypatch.setattr(TextEncoder, "__call__", counted)
    first = rescore(monkeypatch, tmp_path / "out", answers, paths, *more)
    probes, *batches = asked
    assert sorted(sum(batches, [])) == sorted(
        ["bird", "object", "Black_Footed_Albatross", "Laysan Albatross", "a bird"]
    )
    asked.clear()
    assert rescore(monkeypatch, tmp_path / "out", answers, paths, *more) == first
    assert asked == [probes]
    asked.clear()
    other = siglip(tmp_path / "other", seed=1)
    changed = rescore(monkeypatch, tmp_path / "out", answers, paths, "--text_encoder", str(other))
    assert len(asked) == 2 and changed[0]["similarity"] != first[0]["similarity"]


NO_ENCODER = ("--text_encoder", "null")


def test_trials_give_mean_and_standard_error(tmp_path, monkeypatch):
    right, wrong = "<answer>Laysan Albatross</answer>", "<answer>x</answer>"
    said = [right, right, wrong, wrong, wrong, wrong]
    lines = [line("bird_seen", 1 + n % 2, "open", text, n // 2) for n, text in enumerate(said)]
    answers = write_lines(tmp_path / "a.jsonl", lines)
    (row,) = rescore(monkeypatch, tmp_path / "o", answers, write_questions(tmp_path), *NO_ENCODER)
    # Only question 2 is about a Laysan albatross: the trials' shares are 50, 0 and 0 %.
    assert float(row["inclusion"]) == pytest.approx(50 / 3, abs=1e-5)
    assert float(row["inclusion_error"]) == pytest.approx(50 / 3, abs=1e-5)
    assert (row["n"], row["trials"], row["similarity"], row["closed"]) == ("2", "3", "", "")


def test_what_has_no_answer_is_left_out_and_said_or_counts_as_wrong(tmp_path, monkeypatch, capsys):
    lines = [line("bird_seen", 2, "open", "<answer>Laysan Albatross</answer>")]
    answers = write_lines(tmp_path / "a.jsonl", lines)
    paths = write_questions(tmp_path)
    (row,) = rescore(monkeypatch, tmp_path / "o", answers, paths, *NO_ENCODER)
    assert (row["n"], float(row["inclusion"])) == ("1", 100)
    assert "1 of the questions have no answer: left out" in capsys.readouterr().out
    more = [*NO_ENCODER, "--missing", "wrong"]
    (row,) = rescore(monkeypatch, tmp_path / "o", answers, paths, *more)
    assert (row["n"], float(row["inclusion"]), row["missing"]) == ("2", 50, "1")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (line("bird_seen", 3, "open", ""), r"a.jsonl:2: an answer to line 3 of 'bird_seen', which"),
        (line("cat_seen", 1, "open", ""), "no question of: bird_seen, car_unseen, my_things"),
        (line("bird_seen", 1, "open", "y"), r"a.jsonl:2: another answer to the question of .*:1"),
        (line("bird_seen", 1, "shut", ""), "'mode' must be closed or open, got 'shut'"),
        (line("bird_seen", True, "open", ""), "'line' must be a whole number, got True"),
        (line("bird_seen", 1, "open", 3), "'output' must be a text, got 3"),
        (line("bird_seen", 2, "open", "") | {"image": "x/1.jpg"}, "an answer about 'x/1.jpg', but"),
        ([1], "a line must be a JSON object"),
    ],
)
def test_answers_that_are_none_are_named(broken, message, tmp_path, monkeypatch):
    answers = write_lines(tmp_path / "a.jsonl", [line("bird_seen", 1, "open", "x"), broken])
    with pytest.raises(ValueError, match=message):
        rescore(monkeypatch, tmp_path / "o", answers, write_questions(tmp_path), *NO_ENCODER)


def test_half_a_line_at_the_end_and_repeated_lines_are_left_out(tmp_path, monkeypatch, capsys):
    answers = write_lines(tmp_path / "a.jsonl", 2 * [line("bird_seen", 1, "open", "\ud800 bird")])
    with open(answers, "a") as file:
        file.write('{"file": "bird_seen", "line": 2, "mo')
    paths = write_questions(tmp_path)
    (row,) = rescore(monkeypatch, tmp_path / "o", answers, paths, *NO_ENCODER)
    said = capsys.readouterr().out
    assert row["n"] == "1" and "a.jsonl:3 breaks off" in said and "1 repeated lines" in said
    with open(answers, "a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match="a.jsonl:3: malformed JSON line"):
        rescore(monkeypatch, tmp_path / "o", answers, paths, *NO_ENCODER)


def test_an_encoder_that_cannot_be_loaded_is_named(tmp_path, monkeypatch):
    answers = write_lines(tmp_path / "a.jsonl", [line("bird_seen", 1, "open", "x")])
    (tmp_path / "empty").mkdir()
    more = ["--text_encoder", str(tmp_path / "empty")]
    with pytest.raises(ValueError, match=r"--text_encoder '.*empty' cannot be loaded: .*null"):
        rescore(monkeypatch, tmp_path / "o", answers, write_questions(tmp_path), *more)


def test_rules_are_linear_in_the_output():
    """Ten times the length takes far less than a hundred times as long."""

    def seconds(n: int) -> float:
        text = "<answer>" * n + "x" * n + "</answer" * n
        start = time.process_time()
        closed_world_correct(text, "wren")
        open_world_included(text + "</answer>", "wren", False)
        return time.process_time() - start

    assert seconds(100_000) < 40 * max(seconds(10_000), 1e-3)


def test_the_released_files_are_scored_as_they_are(real_photos, tmp_path, monkeypatch):
    """35,566 lines; a model that always takes the first option scores 100."""
    files = sorted((real_photos.parent / "released" / "eval").glob("*.jsonl"))
    if not files:
        pytest.skip("no released question files beside the photos")
    lines = []
    for file in files:
        for n, text in enumerate(file.open(encoding="utf-8"), start=1):
            first = json.loads(text)["options"][0]
            lines.append(line(file.stem, n, "closed", f"<answer>{first}</answer>"))
    answers = write_lines(tmp_path / "a.jsonl", lines)
    table = rescore(monkeypatch, tmp_path / "o", answers, list(map(str, files)), *NO_ENCODER)
    assert len(table) == 12 and sum(int(row["n"]) for row in table) == 35_566
    assert all(float(row["closed"]) == float(row["closed_strict"]) == 100 for row in table)
