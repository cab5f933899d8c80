"""The benchmark of sampling: both ways have the same log-probs, and rows say what was timed."""

from __future__ import annotations

import csv

import pytest
import torch

from tercet.bench import measure, sampling
from tercet.bench.step_case import Workload, build_policy, qwen_3b

TINY = dict(hidden=128, layers=2, vision_layers=2, heads=8, vision_heads=2, vocabulary=96)
WORKLOAD = Workload(groups=2, n_anchor=3, n_positive=0, prompt=40, grid=(1, 12, 8))


@pytest.fixture(scope="module")
def case():
    return sampling.Case(build_policy(qwen_3b(**TINY), torch.float32, "cpu"), WORKLOAD)


def test_both_sample_all_tokens_of_all_responses(case):
    for name, method in sampling.METHODS.items():
        ids, _ = method(case, 9)
        assert ids.shape == (6, 9), name
        assert not set(ids.flatten().tolist()) & set(case.banned), name
        assert len({tuple(row) for row in ids.tolist()}) == 6, name


def test_the_gate_sees_another_policy(case, monkeypatch):
    assert sampling.logprob_error(case) < 1e-5
    ids, found = sampling.ours(case, 8, greedy=True)
    monkeypatch.setattr(sampling, "ours", lambda *_, **__: (ids, found + 0.01))
    assert sampling.logprob_error(case) == pytest.approx(0.01, abs=1e-4)
    monkeypatch.setattr(sampling, "ours", lambda *_, **__: (ids.roll(1, 1), found))
    assert sampling.logprob_error(case) == float("inf")


def test_figures_of_a_row_follow_from_its_times(case, monkeypatch):
    """Times of our own: 30 ms for the first token, 10 ms for each of the other four."""
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(
        measure,
        "interleaved",
        lambda calls, *_: {key: (0.0, 30.0 + 10.0 * (key[1] - 1), 0.0) for key in calls},
    )
    ours, base = sampling.run_case(case, case, "tiny", 5, 1)
    assert (ours.method, base.method) == ("ours", "transformers")
    assert (ours.prefill_ms, ours.decode_ms) == (30, 10)
    assert ours.tokens_per_s == pytest.approx(6 * 5 / 0.07)
    assert ours.decode_tokens_per_s == pytest.approx(6 / 0.01)
    shape = case.model.config.text_config
    attention = 2 * 128 * 128 + 2 * 128 * 16  # eight query heads of 16 and one key head
    layer = attention + 3 * 128 * shape.intermediate_size
    assert ours.floor_ms == pytest.approx(4 * (2 * layer + 128 * 96) / 1e6)
    assert ours.floor_share == pytest.approx(ours.floor_ms / 10) and ours.ratio == 1


def test_what_differs_is_not_timed(case, monkeypatch):
    monkeypatch.setattr(sampling, "logprob_error", lambda gate: 0.1)
    monkeypatch.setitem(sampling.METHODS, "transformers", lambda *_: 1 / 0)
    for row in sampling.run_case(case, case, "tiny", 3, 1):
        assert row.tokens_per_s is None and row.logprob_error == 0.1
        expected = "log-probs differ" if row.method == "ours" else "ZeroDivisionError"
        assert expected in row.note


def test_the_command_writes_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sampling, "CPU_MODEL", TINY)
    monkeypatch.setattr(sampling, "CPU_WORKLOAD", WORKLOAD)
    sampling.main(["--out", str(tmp_path / "a.csv"), "--rounds=1", "--tokens=3"])
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == list(sampling.METHODS)
    assert all(float(row["tokens_per_s"]) > 0 and row["tokens"] == "3" for row in rows)
    assert "x of transformers" in capsys.readouterr().out
