"""One photo to a name: what samples agree on, candidates of a chain of thought, the command."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from pathlib import Path

import pytest
from support import tiny

from tercet.core.config import ModelConfig
from tercet.core.models import load_policy
from tercet.core.tool_config import PredictConfig
from tercet.train import predict
from tercet.train.evaluation.reasoning import candidates, reasoning_of

THOUGHT = """<think> Analysis of Visual Features:
1. Ears: small.

 Candidate Subcategories
The features suggest a terrier. Within this group:

 Candidate Subcategories:
1. Irish Terrier
   - Ears: small
2. **Airedale Terrier**: larger
3. Welsh Terrier (a smaller one that is mostly black and tan)

 Comparison Process
 1. Irish Terrier
   - Ears: V-shaped.
The prediction is: Irish Terrier.
</think>

<answer>Irish Terrier</answer>"""


def test_candidates_are_the_list_under_its_heading():
    assert candidates(THOUGHT) == ["Irish Terrier", "Airedale Terrier", "Welsh Terrier"]
    assert reasoning_of(THOUGHT).startswith("Analysis") and "<" not in reasoning_of(THOUGHT)
    text = "<think>A wren is small, a gull is not.</think><answer>wren</answer>"
    assert candidates(text, ["gull", "tern", "wren"]) == ["wren", "gull"]
    assert candidates(text) == [] and reasoning_of("no tags") == "no tags"


def test_looking_for_candidates_takes_linear_time():
    def seconds(n: int) -> float:
        start = time.process_time()
        for text in ("candidate categor\n" * n, "1. a\n" * n, "candidate categor\n- " + " a" * n):
            candidates(text + "<answer>x</answer>")
        return time.process_time() - start

    assert seconds(5000) < 40 * max(seconds(500), 1e-3)


def test_stage_1_answers_are_among_their_candidates(real_photos):
    path = real_photos.parent / "released" / "Fine-R1-Stage1-data.json"
    if not path.exists():
        pytest.skip("no stage-1 records beside the photos")
    outputs = [record["messages"][-1]["content"] for record in json.loads(path.read_text())]
    found = [candidates(output) for output in outputs]
    assert sum(2 <= len(names) <= 6 for names in found) / len(found) > 0.95


def test_the_name_is_what_most_samples_say():
    def said(name, thought="?"):
        return f"<think>{thought}</think><answer>{name}</answer>"

    outputs = [said("gull"), said("Wren"), said("wren", "gull or wren"), "wren", said("")]
    found = predict.summary("a.jpg", outputs, [])
    assert (found["name"], found["agree"], found["samples"]) == ("Wren", 2, 5)
    assert found["said"] == {"Wren": 2, "gull": 1} and found["reasoning"] == "?"
    outputs = [said("a wren"), said("wren or gull"), said("a tern"), said("Wren!")]
    chosen = predict.summary("a.jpg", outputs, ["gull", "wren"])
    assert (chosen["name"], chosen["agree"], chosen["said"]) == ("wren", 2, {"wren": 2})
    nothing = predict.summary("a.jpg", ["no idea"], [])
    assert (nothing["name"], nothing["agree"], nothing["reasoning"]) == (None, 0, "no idea")
    assert predict.described(nothing) == "a.jpg: no answer\n  no idea"
    first = predict.described(found).splitlines()[:2]
    assert first == ["a.jpg: Wren (2 of 5 samples)", "  also said: gull (1)"]


@pytest.fixture
def policy_folder(tmp_path):
    tiny().save(tmp_path / "policy")
    return tmp_path / "policy"


def run(monkeypatch, capsys, *argv) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, argv)])
    predict.main()
    return capsys.readouterr().out.splitlines()


def test_the_command_prints_a_json_object_a_photo(policy_folder, photos, monkeypatch, capsys):
    common = ["--model.path", policy_folder, "--device", "cpu", "--max_tokens", "6"]
    few = ["--samples", "3", "--options", "red longbill", "wren", "--json"]
    lines = run(monkeypatch, capsys, *photos[:2], photos[0], *common, *few)
    found = [json.loads(line) for line in lines]
    assert [x["photo"] for x in found] == [*photos[:2], photos[0]]
    assert all(x["samples"] == 3 and x["name"] is None and x["reasoning"] for x in found)
    assert found[0] == found[2] != found[1] | {"photo": photos[0]}
    again = run(monkeypatch, capsys, *photos[:2], photos[0], *common, *few)
    assert again == lines
    (first, *_) = run(monkeypatch, capsys, photos[0], *common)
    assert first == f"{photos[0]}: no answer"


def test_the_lines_in_the_docs_need_nothing_of_ours(policy_folder, photos, monkeypatch):
    """They answer as the in-process engine does."""
    docs = Path(__file__).resolve().parents[1] / "docs" / "evaluation.md"
    (code,) = re.findall(r"^```py\n(.*?)^```$", docs.read_text(), re.DOTALL | re.MULTILINE)
    for name, value in (("CHECKPOINT", policy_folder), ("bird.jpg", photos[0]), ("512", 6)):
        code = code.replace(name, str(value))
    found: dict = {}
    exec(code, found)
    parts = load_policy(ModelConfig(path=str(policy_folder)), "cpu")
    options = PredictConfig(question="", max_tokens=6)
    monkeypatch.setattr("tercet.core.prompts.open_world_text", lambda _: "What bird is this?")
    ours = asyncio.run(predict.sample(options, parts, photos[:1]))
    assert ours == {photos[0]: [found["answer"]]} and found["answer"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "name at least one photo"),
        (["--model.path", "x", "--json"], "name at least one photo"),
        (["nowhere.jpg", "--model.path", "x"], "nowhere.jpg"),
        (["a.jpg", "--options", "wren", "wren"], "--options: a name stands there twice"),
        (["a.jpg", "--samples", "0"], "samples must be a whole number from 1"),
    ],
)
def test_bad_command_lines_are_named(argv, message, monkeypatch, capsys):
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, capsys, *argv)
