"""The commands of docs/paper.md, one after the other, on a miniature of one data set."""

from __future__ import annotations

import csv
import importlib
import json
import math
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hostile import Hostile
from PIL import Image
from support import tiny
from test_docs import lines_of, our_command
from test_docs_pages import table_rows
from test_make_cot import Canned, good

from tercet.core.data.records import read_sft
from tercet.core.data.six_sets import EDITIONS
from tercet.train import plan
from tercet.train.cli.arguments import overridden

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "paper.md").read_text(encoding="utf-8")
BREEDS = ("Abyssinian", "Bengal", "Birman", "Bombay", "Siamese")
ANCHORS = 4 * 404
COMMON = ["--model.dtype=float32", "--run.device=cpu", "--run.steps=1"]
TINY = {
    "prepare": [],
    "make_triplets": ["--data.shots=3"],
    "make_cot": ["--embedder=endpoint", "--descriptions=1"],
    "sft": [*COMMON, "--model.gradient_checkpointing=false", "--optim.samples_per_step=2"],
    "tapo": [
        *COMMON,
        *("--model.min_pixels=null", "--model.max_pixels=null", "--rollout.colocated=false"),
        *("--rollout.engine=local", "--rollout.groups_per_step=2", "--rollout.n_anchor=2"),
        *("--rollout.n_positive=2", "--rollout.max_prompt_tokens=512", "--rollout.max_rounds=1"),
        *("--rollout.prompts_per_batch=2", "--rollout.max_response_tokens=8"),
        *("--rollout.on_exhausted=keep_last_round", "--optim.groups_per_minibatch=1"),
        "--parallel.micro_batch_tokens=2048",
    ],
    "eval_fgvr": [
        *("--model.min_pixels=3136", "--model.max_pixels=12544", "--rollout.engine=local"),
        *("--max_tokens=8", "--text_encoder=null", "--device=cpu"),
    ],
    "export": [],
}
"""Options in place of those that need GPUs, servers or hours."""


def make_pets(root: Path, monkeypatch) -> None:
    """A folder `photos` with the sixth data set in its publisher's form, and question files."""
    folder, rng = root / "photos" / "oxford-pet", np.random.default_rng(0)
    (folder / "annotations").mkdir(parents=True)
    (folder / "images").mkdir()
    listed: dict[str, list[str]] = {"trainval": [], "test": []}
    (root / "eval").mkdir()
    asked = {"seen": [], "unseen": []}
    for place, breed in enumerate(BREEDS):
        for number in range(1, 7):
            name = f"{breed}_{number}"
            pixels = rng.integers(0, 255, (70, 90, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{name}.jpg")
            listed["test" if number == 6 else "trainval"].append(f"{name} {place + 1} 1 1\n")
        line = {"image_path": f"oxford-pet/images/{breed}_6.jpg", "question": "Which pet is this?"}
        line |= {"options": [breed, *(b for b in BREEDS if b != breed)][:4], "ground_truth": breed}
        asked["seen" if place < 3 else "unseen"].append(json.dumps(line) + "\n")
    for part, of_part in listed.items():
        (folder / "annotations" / f"{part}.txt").write_text("".join(of_part))
    for partition, of_partition in asked.items():
        (root / "eval" / f"pet_{partition}.jsonl").write_text("".join(of_partition))
    (pets,) = [edition for edition in EDITIONS if edition.super_category == "pet"]
    cut = (replace(pets, counts=(5, 25, 5)),)
    monkeypatch.setattr("tercet.core.data.six_sets.find_sets.__defaults__", ("error", cut))


def teaches(label: str, seed: int) -> str:
    return good(label)


def run_line(line: str, root: Path, url: str, monkeypatch) -> None:
    """One command of the page, with miniature options and what its placeholders stand for."""

    def newest(run: str) -> str:
        found = sorted((root / "runs" / run / "checkpoints").glob("step_*"))
        return str(found[-1]) if found else ""

    words = shlex.split(line.replace("http://127.0.0.1:30000", url))
    stands_for = {"MODEL": "policy", "TEACHER": "m", "STAGE1": newest("stage1")}
    stands_for |= {"CHECKPOINT": newest("tapo_3b"), "ENV/bin/python": ""}
    words = [stands_for.get(word, word) for word in words if "=" not in word or "--" in word]
    name, argv = our_command(words)
    argv = [word for word in argv if not (word.startswith("eval/") and "pet_" not in word)]
    first = next((n for n, word in enumerate(argv) if word.startswith("-")), len(argv))
    argv = [*argv[:first], *overridden(argv[first:], TINY[name])]
    monkeypatch.setattr(sys, "argv", [name, *(word for word in argv if word)])
    importlib.import_module(f"tercet.train.{name}").main()


def test_the_papers_run_on_a_miniature(tmp_path, monkeypatch, capsys):
    make_pets(tmp_path, monkeypatch)
    tiny(hidden_size=64, layers=1, vision_layers=1).save(tmp_path / "policy")
    (tmp_path / "train").symlink_to(Path(__file__).resolve().parents[1] / "train")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("test_make_cot.NAMES", BREEDS)
    with Hostile(Canned(teaches)) as server:
        for line in lines_of(PAGE):
            run_line(line, tmp_path, server.url, monkeypatch)
    listing = json.loads((tmp_path / "photos" / "manifest.json").read_text())
    seen = {c["sub_category"] for c in listing["classes"] if c["partition"] == "seen"}
    assert seen == set(BREEDS[:3])
    triplets = json.loads((tmp_path / "triplets" / "triplets.json").read_text())
    assert {a["sub_category"] for a in triplets["anchors"]} == seen
    records, _ = read_sft(tmp_path / "cot" / "stage1.json")
    said = [record.messages[-1][1] for record in records]
    assert sorted(s.partition("<answer>")[2].partition("</answer>")[0] for s in said) == sorted(
        seen
    )
    trained = json.loads((tmp_path / "runs" / "tapo_3b" / "triplets.json").read_text())
    assert trained["anchors"] == triplets["anchors"]
    with open(tmp_path / "eval_3b" / "table.csv", encoding="utf-8") as file:
        counts = {(row["questions"], row["mode"]): row["n"] for row in csv.DictReader(file)}
    assert counts == {
        (f"pet_{partition}", mode): n
        for partition, n in (("seen", "3"), ("unseen", "2"))
        for mode in ("closed", "open")
    }
    card = (tmp_path / "fine_r1_3b" / "README.md").read_text()
    assert "| pet | 5 | 3 | 9 |" in card and "### Closed-world accuracy" in card
    assert "groups_per_step: 2" in card and str(tmp_path) not in card


@pytest.mark.parametrize("row", [r for r in table_rows(PAGE) if len(r) == 4], ids=lambda r: r[0])
def test_memory_and_hours_are_those_of_the_plan(row):
    found, _ = plan.read(["--recipe", row[0], "--gpus", "4", "--gpu", "A6000"])
    cache = {"generate": found.cache_bytes}
    peak = max(part.total + cache.get(name, 0) for name, part in found.memory().items())
    run, groups = found.config.run, found.config.rollout.groups_per_step
    steps = math.ceil(run.epochs * ANCHORS / groups)
    seconds = sum(phase.seconds for phase in found.phases()) / plan.LIKELY
    assert row[1:] == [f"{peak / 2**30:.1f}", str(steps), f"{steps * seconds / 3600:.1f}"]
