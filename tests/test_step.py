"""The benchmark of the update step: methods compute one thing, and rows say what was measured."""

from __future__ import annotations

import csv
import shutil
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from support import shape_of

from tercet.bench import attention, figures, kernels, measure, objectives, rollout, step, whole_step
from tercet.bench.step_case import (
    QWEN3_CPU_MODEL,
    Workload,
    build_policy,
    make_micros,
    qwen3_4b,
    qwen_3b,
)
from tercet.bench.step_peers import METHODS, Method, flat, ours, unshared
from tercet.core.models import published
from tercet.train.fit.roofline import CARDS

TINY = dict(hidden=128, layers=2, vision_layers=2, heads=8, vision_heads=2, vocabulary=96)
SMALL = dict(n_anchor=2, n_positive=1, prompt=40, grid=(1, 12, 8), length=12)


def tiny_policy(dtype=torch.float64, **options):
    policy = build_policy(qwen_3b(**TINY), dtype, "cpu", **options)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() == 1:  # biases would be zero
                parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
    return policy


@pytest.fixture(scope="module")
def policy():
    return tiny_policy()


def computed(policy, name, micros):
    if name == "prefix_grouper":
        pytest.importorskip("prefix_grouper")
    run = METHODS[name].make(policy, micros)
    policy.zero_grad(set_to_none=True)
    loss = run()
    return loss, [parameter.grad for parameter in policy.parameters()]


@pytest.mark.parametrize("update_on", ["anchor", "own"])
@pytest.mark.parametrize("name", METHODS)
def test_methods_compute_one_loss_and_one_gradient(policy, name, update_on):
    micros = make_micros(Workload(update_on, groups=3, in_flight=2, **SMALL), policy)
    assert [len(flat(m.update)) for m in micros] == [6, 3]
    loss, found = computed(policy, name, micros)
    wanted, _ = computed(policy, "ours", micros)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-7)
    exact = step.exact_gradients(policy, micros)
    assert step.distance(found, exact) < 1e-6  # transformers' RMSNorm computes in float32
    assert all(gradient.abs().max() > 0 for gradient in exact)


def test_own_and_anchor_are_different_steps(policy):
    anchor, own = (
        computed(policy, "one_by_one", make_micros(Workload(on, **SMALL), policy))[1]
        for on in ("anchor", "own")
    )
    assert step.distance(own, anchor) > 1e-3


def test_checkpointing_changes_no_gradient(policy):
    micros = make_micros(Workload(**SMALL), policy)
    again = tiny_policy(checkpointing=True)
    for name in ("ours", "one_by_one", "padded"):
        found = computed(again, name, micros)[1]
        assert step.distance(found, computed(policy, name, micros)[1]) < 1e-10
    bench = step.Bench(again, 1, 1e12, model="tiny")
    row = bench.row("ours", Workload(**SMALL), micros)
    assert row.checkpointing is True
    plain = step.step_flops(METHODS["ours"], micros, bench.shape) / 1e12
    assert plain * 1.25 < row.tflop < plain * 4 / 3


@pytest.mark.parametrize("update_on, ratio", [("anchor", 2.19), ("own", 2.06)])
def test_the_3b_shape_promises_twice_the_speed(policy, update_on, ratio):
    """And 2.11 and 1.99 over one response a prompt that computes no logits of prompts."""
    shape = shape_of(qwen_3b())
    assert shape == shape_of(published()["Qwen/Qwen2.5-VL-3B-Instruct"])
    assert (shape.layers, shape.hidden, shape.vocabulary) == (36, 2048, 151_936)
    assert (shape.vision_layers, shape.full_layers, shape.head_dim) == (32, 4, 128)
    micros = make_micros(Workload(update_on), policy)
    assert len(micros[0].batch.labels) == 3500
    work = {name: step.step_flops(method, micros, shape) for name, method in METHODS.items()}
    assert work["one_by_one"] / work["ours"] == pytest.approx(ratio, abs=0.02)
    assert work["no_sharing"] / work["ours"] == pytest.approx(ratio - 0.08, abs=0.02)
    assert work["padded"] > work["no_sharing"] and work["plain_head"] == work["ours"]
    logits = 20 * 315 * 3 * 2 * 2048 * 151_936
    assert work["one_by_one"] - work["no_sharing"] == pytest.approx(logits, rel=1e-9)


def test_what_sharing_promises_qwen3_vl_4b(policy):
    """The same step: photos of 256 tokens, ten responses; the method that is measured is exact."""
    shape = shape_of(qwen3_4b())
    assert shape == shape_of(published()["Qwen/Qwen3-VL-4B-Instruct"])
    micros = make_micros(Workload("anchor"), policy)
    work = {name: step.step_flops(method, micros, shape) for name, method in METHODS.items()}
    assert work["one_by_one"] / work["ours"] == pytest.approx(1.94, abs=0.01)
    small = build_policy(qwen3_4b(**QWEN3_CPU_MODEL), torch.float64, "cpu")
    micros = make_micros(Workload(**SMALL), small)
    exact = step.exact_gradients(small, micros)
    for name in ("ours", "one_by_one"):
        assert step.distance(computed(small, name, micros)[1], exact) < 1e-6


def bench_of(dtype=torch.float32):
    return step.Bench(tiny_policy(dtype), 2, 1e11, model="tiny")


def test_what_is_not_exact_is_not_timed(monkeypatch):
    def wrong(policy, micros):
        late = [
            replace(m, batch=replace(m.batch, advantages=1.01 * m.batch.advantages)) for m in micros
        ]
        return ours(policy, late)

    def broken(policy, micros):
        return lambda: 1 / 0

    monkeypatch.setitem(step.ALL, "wrong", Method(wrong, unshared))
    monkeypatch.setitem(step.ALL, "broken", Method(broken, unshared))
    monkeypatch.setitem(sys.modules, "prefix_grouper", None)
    rows = bench_of().methods(
        Workload(**SMALL), ["wrong", "one_by_one", "broken", "prefix_grouper"]
    )
    wrong, right, broken, absent = rows
    assert "over the gate of 0.0001" in wrong.note and wrong.grad_error > 1e-3
    assert broken.note == "ZeroDivisionError: division by zero"
    assert absent.note.startswith("ModuleNotFoundError") and "prefix_grouper" in absent.note
    assert all(
        row.ms_50 is row.mfu is row.measured_ratio is None for row in (wrong, broken, absent)
    )
    assert right.note == "" and right.grad_error < 1e-4 and right.measured_ratio == 1


def test_16_bit_gradients_are_compared_on_a_model_of_few_layers(policy):
    shallow = tiny_policy(torch.bfloat16)
    deep = build_policy(qwen_3b(**TINY | {"layers": 9}), torch.bfloat16, "cpu")
    bench = step.Bench(deep, 1, 1e11, shallow, model="tiny")
    for row in bench.methods(Workload(**SMALL), ["ours", "one_by_one", "plain_head"]):
        assert row.note == "" and 1e-3 < row.grad_error < 0.1 and row.ms_50 > 0
    assert bench.row("ours", Workload(), []).dtype == "bfloat16"


def test_figures_of_a_row_follow_from_its_time():
    bench = bench_of()
    ours, base = bench.methods(Workload("own", **SMALL), ["ours", "one_by_one"])
    assert (ours.method, base.method) == ("ours", "one_by_one")
    assert ours.ms_20 <= ours.ms_50 <= ours.ms_80
    assert ours.tokens_per_s == pytest.approx(1e3 * ours.response_tokens / ours.ms_50)
    assert ours.mfu == pytest.approx(ours.tflop / (ours.ms_50 / 1e3) / 0.1)
    assert base.mfu == pytest.approx(ours.mfu * ours.ms_50 / base.ms_50)
    assert ours.predicted_ratio == pytest.approx(base.tflop / ours.tflop)
    assert ours.measured_ratio == pytest.approx(base.ms_50 / ours.ms_50)
    assert ours.packed_tokens == 3 * 40 + 2 * (ours.response_tokens - 3)
    assert 0 < ours.extra_mib < base.extra_mib


def test_memory_is_the_peak_above_what_is_returned():
    def call():
        kept = torch.ones(2**18)  # 1 MiB
        for _ in range(3):
            torch.ones(2**20)
        return [kept]

    kept, extra = measure.extra_mib(call, on_gpu=False)
    assert kept[0].sum() == 2**18 and extra == pytest.approx(4, abs=0.01)


def test_calls_take_turns_by_either_clock(monkeypatch):
    """Clocks of our own: work takes 2 s of both, waiting 3 s of the wall's alone."""
    order, now = [], {"wall": 0.0, "cpu": 0.0}
    clocks = {name: (lambda name=name: now[name]) for name in now}
    monkeypatch.setattr(measure, "CLOCKS", clocks)

    def spend(name: str, wall: float, cpu: float) -> None:
        order.append(name)
        now["wall"], now["cpu"] = now["wall"] + wall, now["cpu"] + cpu

    calls = {"work": lambda: spend("work", 2, 2), "wait": lambda: spend("wait", 3, 0)}
    wall, cpu = (measure.interleaved(calls, 3, 1, False, clock) for clock in ("wall", "cpu"))
    assert order == ["work", "wait"] * 8
    assert wall == {"work": (2000.0,) * 3, "wait": (3000.0,) * 3}
    assert cpu == {"work": (2000.0,) * 3, "wait": (0.0,) * 3}


def test_a_ledger_keeps_its_columns(tmp_path):
    row, shared = bench_of().row("ours", Workload(), []), measure.conditions("cpu", "abc")
    measure.append(tmp_path / "a.csv", [row], shared)
    measure.append(tmp_path / "a.csv", [row, row], shared)
    with (tmp_path / "a.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3 and lines[0] == lines[2]
    assert (lines[0]["method"], lines[0]["torch"]) == ("ours", torch.__version__)
    assert [*lines[0]][-6:] == ["device", "torch", "triton", "transformers", "commit", "date"]
    for text in ("method,ms\n", ",".join([*vars(row), "colour"]) + "\n"):
        (tmp_path / "b.csv").write_text(text)
        with pytest.raises(ValueError, match=r"b\.csv has the columns \['method', "):
            measure.append(tmp_path / "b.csv", [row], shared)


@pytest.mark.parametrize(
    "kind", [kernels.Row, step.Row, rollout.Row, attention.Row, whole_step.Row]
)
def test_rows_go_on_in_the_ledgers_as_they_are(kind, tmp_path):
    """With fewer shared columns than new ledgers have, in their own order."""
    name = f"{kind.__module__.rpartition('.')[2]}.csv"
    copy = Path(shutil.copy(figures.RESULTS / name, tmp_path))
    before = copy.read_text()
    row = kind(*(index + 0.5 for index, _ in enumerate(fields(kind))))
    shared = measure.conditions("cpu", "abc") | {"sglang": "0.5", "trl": "1.16"}
    measure.append(copy, [row], shared)
    text = copy.read_text()
    assert text.startswith(before) and text.count("\n") == before.count("\n") + 1
    with copy.open(newline="") as file:
        (*_, last) = csv.DictReader(file)
    assert last == {k: str(v) for k, v in (vars(row) | shared).items() if k in last}
    assert last["commit"] == "abc" and None not in last


def test_the_command_writes_rows_and_the_figure_shows_them(tmp_path, monkeypatch):
    workload = partial(Workload, **SMALL)
    monkeypatch.setitem(step.MODELS, "qwen2_5_vl_3b", ("tiny", qwen_3b, TINY))
    monkeypatch.setattr(step, "Workload", workload)
    sweeps = {"groups": [workload(groups=n, in_flight=n) for n in (1, 2)], "length": [workload()]}
    monkeypatch.setattr(step, "SWEEPS", sweeps)
    monkeypatch.setattr(measure, "keep_memory", lambda: None)  # for good, in this process
    ledger = tmp_path / "step.csv"
    monkeypatch.setattr("sys.argv", ["step", "--out", str(ledger), "--rounds", "1"])
    step.main()
    with ledger.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == [*METHODS] * 3 + ["ours"] * 3
    assert [(row["update_on"], row["groups"]) for row in rows[:-3]] == [
        step for step in (("anchor", "1"), ("own", "1"), ("anchor", "4")) for _ in METHODS
    ]
    assert [row["sweep"] for row in rows[-3:]] == ["groups", "groups", "length"]
    grown = [float(row["tflop"]) for row in rows[-3:-1]]
    assert grown[1] == pytest.approx(2 * grown[0], rel=0.1)
    timed = [row for row in rows if row["ms_50"]]
    assert {row["method"] for row in rows} - {row["method"] for row in timed} <= {"prefix_grouper"}

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: drawn.append(self))
    figures.draw_step(ledger, tmp_path / "step.png")
    time, memory, curve, growth = drawn[0].axes
    bars = [row for row in timed if row["update_on"] == "anchor" and not row["sweep"]]
    bars = [row for row in bars if row["groups"] == "1"]
    slow = max(float(row["ms_50"]) for row in bars) / 1e3
    anchor, own = time.containers
    assert anchor.patches[0].get_width() == pytest.approx(slow)
    assert (
        len(own.patches)
        == len(memory.containers[0].patches)
        == len({row["method"] for row in timed})
    )
    assert list(curve.get_lines()[0].get_xdata()) == pytest.approx(grown)
    mib = [float(row["extra_mib"]) for row in rows[-3:-1]]
    assert list(growth.get_lines()[0].get_ydata()) == pytest.approx(mib)


def test_an_empty_ledger_draws_nothing(tmp_path):
    (tmp_path / "step.csv").write_text("device,model,dtype,clock,ms_50\n")
    with pytest.raises(ValueError, match="holds no timed row"):
        figures.draw_step(tmp_path / "step.csv", tmp_path / "step.png")


@pytest.mark.parametrize("name, card", [("NVIDIA RTX A6000", "A6000"), ("NVIDIA H200", "H200")])
def test_a_gpu_s_peak_is_the_datasheet_s(monkeypatch, name, card):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert measure.peak_flops("cuda", torch.bfloat16) == CARDS[card].tflops * 1e12


def test_every_objective_is_checked_and_timed_beside_tapo(tmp_path):
    policy = build_policy(qwen_3b(**TINY), torch.float32, "cpu")
    rows = objectives.measured(policy, Workload(**SMALL), 1, "wall", "tiny")
    assert [row.objective for row in rows] == [*objectives.OBJECTIVES, objectives.SCORING]
    for row in rows[:-1]:
        assert row.note == "" and row.grad_error <= 1e-4 and row.ms_50 > 0
        assert row.n_anchor + row.n_positive == 3
    by_name = {row.objective: row for row in rows}
    assert by_name["tapo"].of_tapo == 1 and by_name["tapo"].n_positive == 1
    # TAPO runs the negative's branch too, and keeps its activations.
    assert by_name["dapo"].extra_mib < 0.8 * by_name["tapo"].extra_mib
    measure.append(tmp_path / "ledger.csv", rows, measure.conditions("cpu", "now"))


def test_an_objective_whose_gradients_are_off_is_not_timed(monkeypatch):
    policy = build_policy(qwen_3b(**TINY), torch.float32, "cpu")
    monkeypatch.setattr(
        objectives, "OBJECTIVES", {n: objectives.OBJECTIVES[n] for n in ("tapo", "dapo")}
    )
    monkeypatch.setitem(measure.GATE, torch.float32, -1.0)
    tapo, dapo, scoring = objectives.measured(policy, Workload(**SMALL), 1, "wall", "tiny")
    assert tapo.ms_50 is dapo.ms_50 is scoring.of_tapo is None and "over the gate" in dapo.note
    assert scoring.ms_50 > 0


def test_errors_are_a_parameter_s_and_in_16_bits_the_whole_gradient_s():
    exact = [torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1e-4])]
    found = [torch.tensor([3.0, 4.5]), torch.tensor([0.0, 2e-4])]
    assert step.distance(found, exact) == pytest.approx(0.1)
    found[1] = torch.tensor([0.0, 2e-3])  # of a norm below a thousandth of the whole
    assert step.distance(found, exact) == pytest.approx(1.9e-3 / 5e-3, rel=1e-3)
    half = [tensor.bfloat16() for tensor in found]
    assert step.distance(half, exact) == pytest.approx(0.1, rel=1e-3)
