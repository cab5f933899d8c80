"""The benchmark of phases: whose time a second is, and a step and a start on small photos."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from support import tiny

from tercet.bench import phases
from tercet.bench.phases import Clock, Row, rows_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random policy and small generated photos."""
    root = tmp_path_factory.mktemp("phases")
    tiny(hidden_size=64, layers=1, vision_layers=1).save(root / "policy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phases, "KINDS", 1)
        patch.setattr(phases, "NAMES", 4)
        patch.setattr(phases, "SIDES", (80, 60))
        phases.generate(root / "generated", 4)
    return root


def test_a_second_is_one_phase_s_alone(monkeypatch):
    """A clock of our own; what runs inside another phase is not that one's."""
    moments = iter([(0, 0), (1, 0.5), (3, 1.5), (7, 2), (8, 2.5), (20, 9), (21, 10)])
    monkeypatch.setattr(phases, "now", lambda: next(moments))
    case = SimpleNamespace(inner=lambda: 5)
    case.outer = lambda: case.inner() + 1
    clock = Clock()
    with clock.watching({"all": [(case, "outer")], "part": [(case, "inner")]}):
        assert case.outer() == 6
    assert dict(clock.spent) == {"all": (2 + 1, 1 + 0.5), "part": (4, 0.5)}
    with clock.phase("later"):  # the time between two phases is nobody's
        pass
    assert clock.spent["later"] == (1, 1)


def test_rows_are_a_step_s_and_end_with_the_whole():
    spent = {"a": (4.0, 1.0), "b": (6.0, 3.0), "once: c": (9.0, 8.0)}
    assert rows_of("step", spent, 2) == [
        Row("step", "b", 3.0, 1.5, 0.75),
        Row("step", "a", 2.0, 0.5, 0.25),
        Row("step", "whole", 5.0, 2.0, 1.0),
        Row("step", "once: c", 9.0, 8.0, None),
    ]


def test_a_run_s_steps_are_counted_without_the_first(folder, tmp_path):
    few = ("groups_per_step=2", "n_anchor=2", "n_positive=1", "max_response_tokens=4")
    shots = ("--data.shots=2", "--data.sft_shots=0", "--data.embedder=policy")
    more = [*(f"--rollout.{one}" for one in few), *shots]
    argv = phases.options_of(folder / "generated", folder / "policy", tmp_path / "run", *more)
    rows = {row.phase: row for row in phases.steps(argv, 1)}
    # So few photos are all decoded in the first step, and kept.
    assert rows.keys() | {"photos"} == phases.STEP.keys() | {"whole"}
    counted = [row for name, row in rows.items() if name != "whole" and row.share is not None]
    assert sum(row.s for row in counted) == pytest.approx(rows["whole"].s)
    assert min(rows[name].s for name in ("sampling", "forward", "backward")) > 0


def test_a_start_is_counted_from_the_command(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "cache"))
    shots = ("--data.shots=2", "--data.sft_shots=0")
    argv = phases.options_of(folder / "generated", folder / "policy", tmp_path / "run", *shots)
    spent = phases.start(argv, time.time() - 5)
    assert spent.keys() == phases.START.keys() | {"imports"}
    assert 5 <= spent["imports"][0] < 60 and spent["embedding"][0] > 0
    rows = rows_of("start", spent)
    ours = [r.cpu_s for r in rows if r.phase not in ("imports", "policy", "embedding", "whole")]
    assert phases.own(rows) == pytest.approx(sum(ours))
