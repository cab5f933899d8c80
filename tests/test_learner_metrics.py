"""The table of a run's metrics and the reader of metrics.jsonl."""

import json

import pytest
import torch

from tercet.core.mismatch import mismatch_figures
from tercet.core.types import Group, Response, Triplet
from tercet.kernels.reference import TERMS
from tercet.train.logs.metrics import (
    METRICS,
    MORE_PANELS,
    PANELS,
    is_reserved,
    phase_seconds,
    read_metrics,
    tensorboard_tag,
    whole_lines,
)

pytestmark = pytest.mark.core


def test_every_metric_is_listed_once_and_described():
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names)) == 39
    assert all(metric.meaning and metric.meaning[-1] != "." for metric in METRICS)
    labels = [metric.label for metric in METRICS if metric.line]
    assert [label for label in labels if labels.count(label) > 1] == ["clip"] * 3


def test_what_the_loss_and_the_mismatch_report_is_listed():
    response = Response("anchor", (1,), (-1.0,), "stop", 0, old_logprobs=torch.tensor([-1.5]))
    group = Group("g", Triplet("t", "a", "p", "n", "What?", "bird", "wren"), (1,), [response])
    reported = {*TERMS, *mismatch_figures([group], 0)}
    assert len(reported) == 14
    assert reported <= {metric.name for metric in METRICS}


def test_what_the_table_shows_is_complete():
    for metric in METRICS:
        assert (metric.line in (1, 2, 3)) == bool(metric.label) == bool(metric.form), metric
        assert (metric.panel in PANELS | MORE_PANELS) == bool(metric.curve), metric
        assert not metric.line or len(format(0.1234, metric.form)) == int(metric.form[0]), metric
    assert {metric.panel for metric in METRICS if metric.panel} == {*PANELS, *MORE_PANELS}
    right = {metric.panel for metric in METRICS if metric.right}
    assert right == {title for title, label in (PANELS | MORE_PANELS).items() if label}


def test_tensorboard_groups_by_what_stands_before_the_slash():
    names = ("reward", "several_names", "seconds_update", "seconds_reward", "eval/seen")
    assert [tensorboard_tag(name) for name in names] == [
        "train/reward",
        "train/several_names",
        "seconds/update",
        "seconds/reward",
        "eval/seen",
    ]


def test_seconds_by_phase():
    line = {"step": 3, "reward": 0.5, "seconds_generate": 2.5, "seconds_sync": 0.25}
    assert phase_seconds(line) == {"generate": 2.5, "sync": 0.25}


@pytest.mark.parametrize("tail", ["", '{"step": 3, "rew', '{"step": 3}'])
def test_a_last_line_cut_short_is_left_out(tmp_path, tail):
    steps = [{"step": 1, "reward": 0.1}, {"step": 2, "reward": 1e-7}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(step) + "\n" for step in steps) + tail)
    assert read_metrics(path) == steps + ([{"step": 3}] if tail.endswith("}") else [])


def test_a_damaged_end_is_told_from_damage_before_good_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\0\0\0\n{"step"')
    assert whole_lines(path) == ([{"step": 1}], 11)
    path.write_bytes(b'{"step": 1}\n\0\0\0\nx\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: not a JSON object with a step"):
        whole_lines(path)


def test_an_empty_file_holds_no_step(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("line", ["nonsense", "", "[1]", "7", '"step"', '{"reward": 1}'])
def test_a_damaged_line_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: not a JSON object with a step"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_names_that_a_reward_must_not_use():
    taken = [
        "reward",
        "kept",
        "acceptance",
        "response_length",
        "len",
        "loss",
        "lr",
        "step",
        "groups",
    ]
    taken += ["seconds_generate", "seconds/update", "train/loss", "train/step", "mismatch_max"]
    assert all(map(is_reserved, taken))
    free = ["accuracy", "several_names", "format", "length", "rewards", "judge/score", "overall"]
    assert not any(map(is_reserved, free))
