"""What a run shows on the terminal: lines of steps, and the block at its end."""

from __future__ import annotations

import json

import pytest

from tercet.train.logs.metrics import METRICS, PHASES
from tercet.train.logs.terminal import HEADER_EVERY, WIDTH, StepLines, duration, end_block

pytestmark = pytest.mark.core

STAGE1 = ("cross_entropy", "held_out_ce", "permuted_ce")
TAPO = [m.name for m in METRICS if m.line in (1, 2) and m.name not in (*STAGE1, "lora_merge_error")]
SECONDS = [f"seconds_{phase}" for phase in PHASES]
USUAL = dict.fromkeys([*TAPO, *SECONDS], 0.1234) | {"response_length": 345.2, "skipped_steps": 0.0}


def test_a_step_is_one_line_of_eighty_columns():
    lines = StepLines(300, verbose=False)
    shown = [*TAPO, *SECONDS]
    first = lines.of(12, USUAL, shown, 3 * 3600 + 300).splitlines()
    assert first == [
        "   step reward    acc   kept     len      kl  entropy     grad   sec    left",
        " 12/300  0.123  0.123  0.123   345.2  0.1234    0.123  1.2e-01  0.99  3h 05m",
    ]
    wide = StepLines(10_000, verbose=False)
    other = USUAL | {"reward": -1.0, "grad_norm": 123.4, "seconds_update": 2345.0}
    text = wide.of(10_000, other, shown, 1e6)
    assert max(map(len, text.splitlines())) <= WIDTH, text


def test_the_header_comes_back_now_and_then_and_with_a_new_column():
    lines, metrics = StepLines(100, verbose=False), {"reward": 0.5}
    counts = [len(lines.of(n, metrics, metrics, 1.0).splitlines()) for n in range(45)]
    assert [n for n, count in enumerate(counts) if count == 2] == [0, HEADER_EVERY, 40]
    both = {"reward": 0.5, "accuracy": 0.25}
    header, values = lines.of(45, both, both, None).splitlines()
    assert header.split() == ["step", "reward", "acc", "sec", "left"]
    blank = lines.of(46, {"accuracy": 0.25}, both, None)
    assert blank.index("0.250") == values.index("0.250") and "0.500" not in blank


def test_what_few_steps_have_is_on_a_line_of_its_own():
    lines = StepLines(9, verbose=False)
    metrics = {"reward": 0.5, "eval_seen": 0.61, "eval_unseen": 0.58, "skipped_steps": 0.5}
    *_, held_out, skipped = lines.of(3, metrics, metrics, 1.0).splitlines()
    assert held_out == "    held out: seen 0.610, unseen 0.580"
    assert skipped == "    50% of its updates were skipped: the gradient was not finite"
    stage1 = {"cross_entropy": 0.5, "held_out_ce": 0.75, "permuted_ce": 1.5}
    assert lines.of(4, stage1, stage1, 1.0).splitlines()[-1] == (
        "    held out: cross entropy 0.7500, with others' photos 1.5000"
    )


def test_every_other_metric_is_shown_on_demand():
    brief, all_of_it = (StepLines(300, verbose) for verbose in (False, True))
    shown = [*TAPO, *SECONDS]
    text = all_of_it.of(12, USUAL, shown, 60.0)
    assert text.startswith(brief.of(12, USUAL, shown, 60.0) + "\n    ")
    rest = text.splitlines()[2:]
    assert max(map(len, rest)) <= WIDTH and len(rest) <= 4
    cells = "  ".join(line.strip() for line in rest).split("  ")
    assert "clip 0.123/0.123/0.123" in cells and "gen 0.12 s" in cells and "Hneg 0.123" in cells
    labels = {m.label for m in METRICS if m.line == 2 and m.name in shown}
    assert labels <= {cell.partition(" ")[0] for cell in cells}


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0 s"),
        (99.4, "99 s"),
        (100, "2 min"),
        (5969, "99 min"),
        (3 * 3600 + 5 * 60, "3h 05m"),
        (100 * 3600, "4d 04h"),
        (20 * 86400, "20 d"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_end_says_what_was_reached_and_what_comes_next(tmp_path):
    steps = [{"step": n, "reward": n / 10, "accuracy": 0.5} for n in range(1, 11)]
    steps[4]["eval_seen"], steps[9]["eval_seen"] = 0.2, 0.4
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    checkpoint = tmp_path / "checkpoints" / "step_000010"
    checkpoint.mkdir(parents=True)
    lines = end_block(tmp_path, checkpoint, "tapo").splitlines()
    assert "10 steps are done." in lines
    assert "  reward                  0.300 -> 0.800" in lines
    assert "  held out, seen          0.400" in lines
    assert f"  checkpoint  {checkpoint}" in lines
    assert not [line for line in lines if "curves.png" in line]  # it is not there
    assert f"  python -m tercet.train.report {tmp_path}" in lines
    assert f"    --model.path {checkpoint} \\" in lines
    stage1 = end_block(tmp_path, checkpoint, "sft")
    assert f"--model.path {checkpoint} \\" in stage1 and "train/tapo.py" in stage1


def test_a_run_without_metrics_has_an_end_too(tmp_path):
    assert "the metrics cannot be read" in end_block(tmp_path, tmp_path, "tapo")
