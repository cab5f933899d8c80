"""The group log: what a step wrote about its groups, against the step's own figures."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
from support import tiny
from test_tapo import by_length, by_parity, options, train, workspace  # noqa: F401

from tercet.core.data.manifest import Manifest
from tercet.core.types import Group, Response, Triplet
from tercet.rollout.step_groups import StepGroups
from tercet.train.logs.group_files import read_groups, step_files, thin_out
from tercet.train.logs.group_log import TokenTexts, why


def lines_of(out: Path, step: int) -> list[dict]:
    lines, problem = read_groups(step_files(out / "groups")[step])
    assert not problem
    return lines


def unpacked(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f2").astype(np.float64)


def rows(lines: list[dict], name: str) -> np.ndarray:
    return np.concatenate([unpacked(r[name]) for line in lines for r in line["responses"]])


def metrics_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_step(workspace, tmp_path_factory) -> Path:  # noqa: F811
    """The folder of a run of one step and one mini-batch."""
    out = tmp_path_factory.mktemp("one_step")
    argv = options(workspace, out, "--optim.groups_per_minibatch=4", "--run.steps=1")
    with pytest.MonkeyPatch.context() as patch:
        train(patch, argv, reward=by_parity)
    return out


def test_the_file_of_a_step_gives_its_figures_again(workspace, one_step):  # noqa: F811
    """Reward, margin and mismatch of metrics.jsonl, computed from what the groups' file holds."""
    (figures,), lines = metrics_of(one_step), lines_of(one_step, 1)
    special = re.compile("|".join(map(re.escape, tiny().tokenizer.all_special_tokens)))
    responses = [r for line in lines for r in line["responses"]]
    assert len(lines) == 4 and [len(line["responses"]) for line in lines] == [4] * 4
    assert figures["reward"] == pytest.approx(np.mean([r["reward"] for r in responses]))
    assert figures["accuracy"] == np.mean([r["metrics"]["accuracy"] for r in responses])
    kept = [line for line in lines if line["kept"]]
    margin = rows(kept, "logprobs") - rows(kept, "neg_logprobs")
    assert margin.mean() == pytest.approx(figures["margin"], abs=1e-3)
    assert np.array_equal(rows(kept, "logprobs"), rows(kept, "old_logprobs"))
    on_anchor = [r for line in kept for r in line["responses"] if r["role"] == "anchor"]
    gaps = [unpacked(r["old_logprobs"]) - unpacked(r["rollout_logprobs"]) for r in on_anchor]
    assert np.abs(np.concatenate(gaps)).mean() == pytest.approx(figures["mismatch_mean"], abs=1e-3)
    for response in responses:
        assert special.sub("", "".join(response["tokens"])) == response["text"]
        assert len(response["tokens"]) == len(unpacked(response["rollout_logprobs"]))
    rewards = [r["reward"] for r in kept[0]["responses"]]
    expected = (np.array(rewards) - np.mean(rewards)) / (np.std(rewards, ddof=1) + 1e-6)
    assert [r["advantage"] for r in kept[0]["responses"]] == pytest.approx(expected.tolist())


def test_photos_and_names_are_those_of_the_triplet(one_step):
    manifest = Manifest.read(one_step)
    root = (one_step / json.loads((one_step / "triplets.json").read_text())["root"]).resolve()
    by_image = {anchor.image: anchor for anchor in manifest.anchors}
    for line in lines_of(one_step, 1):
        paths = {role: (root / key).resolve() for role, key in line["photos"].items()}
        assert all(path.is_file() for path in paths.values())
        anchor = by_image[str(paths["anchor"])]
        assert str(paths["positive"]) in anchor.positives
        assert str(paths["negative"]) in anchor.negatives
        folder = {role: path.parent.name.replace("_", " ") for role, path in paths.items()}
        assert line["names"] == folder and line["question"] == anchor.question
        assert folder["anchor"] == folder["positive"] != folder["negative"]


def test_what_a_step_did_not_need_is_null_and_steps_can_be_left_out(
    monkeypatch,
    workspace,  # noqa: F811
    tmp_path,
):
    argv = options(
        workspace,
        tmp_path,
        "--run.steps=2",
        "--run.log_groups=2",
        "--run.log_groups_every=2",
        "--loss.kl_coef=0",
        "--loss.neg_entropy_coef=0",
    )
    train(monkeypatch, argv)
    assert list(step_files(tmp_path / "groups")) == [2]
    lines = lines_of(tmp_path, 2)
    assert len(lines) == 2
    for response in (r for line in lines for r in line["responses"]):
        assert response["neg_logprobs"] is None and response["logprobs"] is not None


def test_a_resumed_run_writes_its_steps_again(monkeypatch, workspace, tmp_path):  # noqa: F811
    argv = options(workspace, tmp_path, "--run.steps=2", "--run.save_every=1", "--run.keep_last=9")
    train(monkeypatch, argv)
    whole = [lines_of(tmp_path, step) for step in (1, 2)]
    for step in (2, 7):
        (tmp_path / "groups" / f"step_{step:06d}.jsonl.gz").write_bytes(b"of another time")
    again = str(tmp_path / "checkpoints" / "step_000001")
    train(monkeypatch, argv, resume=again)
    assert [lines_of(tmp_path, step) for step in (1, 2)] == whole
    assert list(step_files(tmp_path / "groups")) == [1, 2]


def test_a_folder_that_cannot_be_written_costs_a_line(monkeypatch, workspace, tmp_path, capsys):  # noqa: F811
    (tmp_path / "groups").write_text("in the way")
    train(monkeypatch, options(workspace, tmp_path, "--run.steps=1"))
    said = capsys.readouterr().out
    assert "the groups of step 1 are not written: " in said and len(metrics_of(tmp_path)) == 1


@pytest.mark.core
def test_a_character_of_several_tokens_stands_at_the_first():
    tokenizer = tiny().tokenizer
    text = "an œuf à Zürich 蝶 🦋 red"
    ids = tokenizer.encode(text)
    texts = TokenTexts(tokenizer).of(ids)
    assert len(texts) == len(ids) > len(text.split())
    assert "".join(texts) == text and "" in texts and "\ufffd" not in "".join(texts)
    cut = ids[: texts.index("")]  # amid a character
    assert TokenTexts(tokenizer).of(cut)[:-1] == texts[: len(cut) - 1]


def group(name: str, *accuracies: float | None) -> Group:
    triplet = Triplet(name, "a", "p", "n", "Which?", "bird", "wren")
    responses = [Response("anchor", (1,), (-0.5,), "stop", 0) for _ in accuracies]
    for response, accuracy in zip(responses, accuracies, strict=True):
        response.metrics = {} if accuracy is None else {"accuracy": accuracy}
    return Group(name, triplet, (1,), responses)


@pytest.mark.core
@pytest.mark.parametrize(
    "accuracies, passes, kept, expected",
    [
        ((1.0, 0.0), True, True, "passed"),
        ((1.0, 0.0), True, False, "surplus"),
        ((1.0, 0.0), False, False, "surplus"),
        ((1.0, 1.0), False, True, "filled up"),
        ((1.0, 1.0), False, False, "all right"),
        ((0.2, 0.0), False, False, "all wrong"),
        ((None, None), False, False, "rewards alike"),
    ],
)
def test_why_a_group_was_kept_or_dropped(accuracies, passes, kept, expected):
    one = group("a", *accuracies)
    sampled = StepGroups([], rewarded=[one], passing={"a"} if passes else set())
    assert why(one, kept, sampled) == expected
    assert why(one, kept, None) == ""


@pytest.mark.core
def test_the_oldest_files_are_thinned_out(tmp_path):
    def write(step: int) -> None:
        (tmp_path / f"step_{step:06d}.jsonl.gz").write_bytes(b"x" * 100)
        thin_out(tmp_path, 850)

    for step in range(1, 41):
        write(step)
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 850
    left = list(step_files(tmp_path))
    assert left[-4:] == [37, 38, 39, 40] and 5 <= len(left) <= 8
    gaps = np.diff(left)
    assert all(gaps[i] >= gaps[i + 1] for i in range(len(gaps) - 1)), left
    (tmp_path / "step_000041.jsonl.gz").write_bytes(b"x" * 5000)
    thin_out(tmp_path, 850)
    assert list(step_files(tmp_path)) == [41]  # the newest stays, whatever its size


@pytest.mark.core
def test_a_damaged_file_gives_what_is_good_and_says_what_is_not(tmp_path):
    file, good = tmp_path / "step_000001.jsonl.gz", b'{"step": 1}\n{"step": 1}\n'
    file.write_bytes(gzip.compress(good + b'{"step'))
    groups, problem = read_groups(file)
    assert groups == [{"step": 1}] * 2 and problem == f"{file.name}, line 3: not a JSON object"
    for content in (b"", b"no gzip", gzip.compress(good)[:-9]):
        file.write_bytes(content)
        assert read_groups(file)[0] == []
    assert (
        "cannot be read" in read_groups(file)[1]
        and "step_000002" in read_groups(file.with_name("step_000002.jsonl.gz"))[1]
    )
