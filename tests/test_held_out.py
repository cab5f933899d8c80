"""Evaluation during training: what is asked, when, what it keeps, and when it ends a run."""

# ruff: noqa: F811
from __future__ import annotations

import math
from pathlib import Path

import pytest
from test_tapo import by_length, figures, options, train, workspace  # noqa: F401

from tercet.core.config import ModelConfig, RunConfig, TapoConfig
from tercet.core.data.manifest import Manifest
from tercet.core.data.vision import PromptEncoder
from tercet.core.models import load_policy
from tercet.rollout.local import LocalEngine
from tercet.train.cli.command_line import parse
from tercet.train.cli.interrupt import Interrupted
from tercet.train.evaluation import held_out
from tercet.train.evaluation.held_out import ask, draw, table
from tercet.train.logs.best import BestSoFar


def evaluations(out: Path) -> dict[int, tuple[float, float]]:
    rows = figures(out)
    return {r["step"]: (r["eval_seen"], r["eval_unseen"]) for r in rows if "eval_seen" in r}


def test_figures_are_those_of_the_checkpoints_and_come_when_they_are_due(
    workspace,
    tmp_path,
    monkeypatch,
):
    more = ["--run.steps=3", "--run.eval_every=2", "--run.eval_photos=3", "--run.save_every=1"]
    answers, real = [], held_out.ask

    def kept(*arguments, **given):
        answers.append(real(*arguments, **given))
        return answers[-1]

    monkeypatch.setattr(held_out, "ask", kept)
    train(monkeypatch, options(workspace, tmp_path / "run", *more, "--run.keep_last=9"))
    found = evaluations(tmp_path / "run")
    assert list(found) == [2, 3]  # and the last step
    manifest = Manifest.read(tmp_path / "run")
    for step, values in found.items():
        folder = tmp_path / "run" / "checkpoints" / f"step_{step:06d}"
        parts = load_policy(ModelConfig(path=str(folder)), "cpu")
        engine = LocalEngine(parts, PromptEncoder(parts))
        questions = [q for name in ("seen", "unseen") for q in draw(manifest, name, 3)]
        how = {"prompt": "stage2", "names": manifest.names, "max_tokens": 12}
        expected = ask(engine, parts, questions, **how)
        assert [a.output for a in answers.pop(0)] == [a.output for a in expected]
        assert all(a.output for a in expected) and len(expected) > 3
        shares = table(expected)
        assert values == (shares["seen"]["exact"] / 100, shares["unseen"]["exact"] / 100)
    assert not answers


def test_photos_are_drawn_from_all_sub_categories(workspace, tmp_path, monkeypatch):
    train(monkeypatch, options(workspace, tmp_path / "run", "--run.steps=1"))
    manifest = Manifest.read(tmp_path / "run")
    assert not evaluations(tmp_path / "run")
    for partition in ("seen", "unseen"):
        classes = {photo.sub_category for photo in manifest.test[partition]}
        drawn = draw(manifest, partition, len(classes))
        assert {q.truth for q in drawn} == classes and len(drawn) == len(classes)
        everything = draw(manifest, partition, 10**6)
        assert len(everything) == len(manifest.test[partition])
        assert draw(manifest, partition, 10**6) == everything


def scripted(monkeypatch, values: list[float]) -> None:
    """Evaluations that give these values for unseen, one after the other."""
    left = iter(values)

    def figures_of(self) -> dict[str, float]:
        due = self.questions and (self._run.steps_done + 1) % self._config.eval_every == 0
        return {"eval_seen": 0.0, "eval_unseen": next(left)} if due else {}

    monkeypatch.setattr(held_out.HeldOut, "figures", figures_of)


def test_a_run_ends_when_nothing_gets_better_and_keeps_the_best(
    workspace,
    tmp_path,
    monkeypatch,
    capsys,
):
    """Values at steps 2, 4, 6, 8: 0.3, 0.5, 0.5, 0.4. Two without a new best end it at step 8."""
    scripted(monkeypatch, [0.3, 0.5, 0.5, 0.4, 0.9])
    more = ["--run.steps=20", "--run.eval_every=2", "--run.save_every=2", "--run.keep_last=1"]
    more += ["--run.keep_best=eval_unseen", "--run.stop_after=2", "--rollout.groups_per_step=2"]
    last = train(monkeypatch, options(workspace, tmp_path / "run", *more))
    assert last.name == "step_000008" and len(figures(tmp_path / "run")) == 8
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step_000004", "step_000008"]
    said = capsys.readouterr()
    assert "2 values of eval_unseen without a new best (run.stop_after)" in said.out + said.err


def test_a_run_stopped_in_an_evaluation_does_it_again(
    workspace,
    tmp_path,
    monkeypatch,
):
    more = ["--run.steps=2", "--run.eval_every=1", "--run.eval_photos=2"]
    train(monkeypatch, options(workspace, tmp_path / "whole", *more))
    real, calls = held_out.ask, []

    def stopped(*arguments, **given):
        calls.append(1)
        if len(calls) == 1:
            raise Interrupted(2)
        return real(*arguments, **given)

    monkeypatch.setattr(held_out, "ask", stopped)
    argv = options(workspace, tmp_path / "run", *more)
    with pytest.raises(Interrupted):
        train(monkeypatch, argv)
    train(monkeypatch, argv, resume="auto")
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")
    assert list(evaluations(tmp_path / "run")) == [1, 2]


@pytest.mark.core
def test_steps_without_the_figure_do_not_count_and_the_state_is_kept():
    config = RunConfig(keep_best="eval_unseen", stop_after=2)
    best = BestSoFar(config)
    for value in (0.2, None, None, None, 0.1, None):
        best.note({"reward": 1.0} | ({} if value is None else {"eval_unseen": value}))
    assert not best.stale
    again = BestSoFar(config)
    again.restore(best.state())
    again.note({"eval_unseen": 0.2})
    assert again.stale and not best.stale
    again.note({"eval_unseen": 0.3})
    assert not again.stale
    older = BestSoFar(config)
    older.restore({"best": None})
    older.note({"eval_unseen": -math.inf})
    assert not older.stale and not BestSoFar(RunConfig()).stale


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--run.stop_after=2"], "run.stop_after needs run.keep_best"),
        (["--run.keep_best=eval_seen"], "run.keep_best eval_seen needs run.eval_every"),
        (
            ["--run.keep_best=eval_all", "--run.eval_every=1"],
            "is 'eval_all'; evaluations give eval",
        ),
    ],
)
def test_options_that_do_not_go_together_are_named(
    more,
    message,
    workspace,
    tmp_path,
    monkeypatch,
):
    with pytest.raises(ValueError, match=message):
        train(monkeypatch, options(workspace, tmp_path / "run", *more))


def test_without_held_out_photos_it_says_so(workspace, tmp_path, monkeypatch):
    more = ["--data.shots=5", "--data.seen_fraction=1", "--run.eval_every=1"]
    assert parse(TapoConfig, options(workspace, tmp_path, *more), "")
    with pytest.raises(ValueError, match="run.eval_every needs held-out photos"):
        train(monkeypatch, options(workspace, tmp_path / "run", *more))
