"""The profile of an update step: what its phases and kernels are counted as."""

from __future__ import annotations

import re

import pytest
import torch

from tercet.bench import profile_step
from tercet.bench.profile_step import Marked, Marks, Work
from tercet.bench.step_case import Workload, build_policy, make_micros, qwen_3b

TINY = dict(hidden=128, layers=2, vision_layers=2, heads=8, vision_heads=2, vocabulary=96)
SMALL = Workload(n_anchor=2, n_positive=1, prompt=40, grid=(1, 12, 8), length=12)


def test_a_phase_lasts_until_the_next_begins(monkeypatch):
    """A clock of our own, in seconds."""
    times = iter([0.0, 0.5, 0.75, 2.0, 2.5])
    monkeypatch.setattr(profile_step.time, "perf_counter", lambda: next(times))
    marks = Marks(on_gpu=False)
    for phase in ("other", "vision", "other", "backward", ""):
        marks.start(phase)
    assert marks.take() == {"other": 1750.0, "vision": 250.0, "backward": 500.0}
    assert marks.take() == {}


def test_marks_change_no_gradient_and_meet_every_phase():
    policy = build_policy(qwen_3b(**TINY), torch.float32, "cpu")
    batches = [micro.batch for micro in make_micros(SMALL, policy)]
    policy.accumulate(batches[0])
    wanted = [parameter.grad.clone() for parameter in policy.parameters()]
    marked = Marked(policy, Marks(on_gpu=False))
    marked.step(batches)
    assert all(torch.equal(p.grad, w) for p, w in zip(marked.parameters(), wanted, strict=True))
    spent = marked.marks.take()
    assert set(spent) == set(profile_step.PHASES) and all(ms > 0 for ms in spent.values())


def test_busy_time_is_the_union_of_the_work():
    work = [Work("a", 100, 150, 50), Work("b", 140, 160, 20), Work("c", 165, 200, 35)]
    work += [Work("d", 1200, 1300, 100), Work("e", 1210, 1250, 40)]
    found = profile_step.busy_time(work)
    assert found.span == pytest.approx(1.2) and found.gaps == [1.0]  # 5 us are no gap
    assert found.busy == pytest.approx((60 + 35 + 100) / 1e3)


def test_the_largest_kernels_come_first(monkeypatch):
    monkeypatch.setattr(profile_step, "LARGEST", 1)
    work = [Work("small", 0, 1, 1.0), Work("two\nlines", 0, 9, 4.0), Work("two\nlines", 0, 9, 5.0)]
    head, first, whole = profile_step.kernel_table(work)
    assert first.split() == ["0.01", "90.0%", "2", "4.5", "two", "lines"]
    assert whole.split() == ["0.01", "100.0%", "3", "all"]


def test_the_command_writes_its_report(tmp_path, monkeypatch, capsys):
    models = {"qwen2_5_vl_3b": ("tiny", qwen_3b, TINY)}
    monkeypatch.setattr(profile_step, "MODELS", models)
    monkeypatch.setattr(profile_step, "Workload", lambda **_: SMALL)
    out = tmp_path / "new" / "profile.txt"
    profile_step.main(["--out", str(out), "--rounds=1"])
    text = out.read_text()
    assert text == capsys.readouterr().out
    rows = sum(round(12 * (0.8 + 0.4 * (n + 0.5) / 3)) for n in range(3))
    assert f"{2 * (40 + rows - 3)} packed tokens, {rows} response tokens" in text
    shares = re.findall(rf"^(?:{'|'.join(profile_step.PHASES)}) .* ([\d.]+)%$", text, re.M)
    assert len(shares) == 5 and sum(map(float, shares)) == pytest.approx(100, abs=0.3)
    assert re.search(r"% +\d+ +[\d.]+  aten::mm$", text, re.M)
