import errno
import io
import json
import math
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tercet.train.logs.run_log import RunLog

pytestmark = pytest.mark.core


def open_log(out, total_steps=5, terminal=False, **options):
    text = io.StringIO()
    console = Console(
        file=text, force_terminal=terminal, force_interactive=terminal, width=120, highlight=False
    )
    return RunLog(out, total_steps, "run: {seed: 0}\n", console=console, **options), text


def recorded(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def scalars(out, tag):
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    return [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(tag)]


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    replacement = SimpleNamespace(perf_counter=lambda: now.seconds)
    monkeypatch.setattr("tercet.train.logs.run_log.time", replacement)
    return now


def test_a_step_is_written_everywhere(tmp_path, clock):
    log, text = open_log(tmp_path)
    with log:
        with log.phase("generate", total=4, unit="responses") as phase:
            clock.seconds += 2.5
            phase.advance(4)
        log.step(0, {"reward": torch.tensor(0.5), "eval/seen": 0.25, "groups": 16})
        log.step(1, {"reward": 0.75})
    assert recorded(tmp_path) == [
        {"step": 0, "reward": 0.5, "eval/seen": 0.25, "groups": 16.0, "seconds_generate": 2.5},
        {"step": 1, "reward": 0.75},
    ]
    assert text.getvalue().splitlines() == [
        "   step reward   sec    left",
        "    0/5  0.500  2.50    12 s",
        "    1/5  0.750  0.00     5 s",
    ]
    assert scalars(tmp_path, "train/reward") == [(0, 0.5), (1, 0.75)]
    assert scalars(tmp_path, "seconds/generate") == [(0, 2.5)]
    assert scalars(tmp_path, "eval/seen") == [(0, 0.25)]
    assert (tmp_path / "config.yaml").read_text() == "run: {seed: 0}\n"


def test_seconds_are_counted_once(tmp_path, clock):
    log, _ = open_log(tmp_path)
    with log:
        with log.phase("generate"):
            clock.seconds += 3
            log.add_time("reward", 1.25)  # spent inside the 3 s
            with log.phase("sync"):
                clock.seconds += 0.5
            clock.seconds += 2
        clock.seconds += 7  # belongs to no phase
        for _ in range(3):
            with log.phase("update"):
                clock.seconds += 1.5
        log.add_time("reward", 0.25)
        log.step(0, {})
        first, second = log.phase("old"), log.phase("negative")
        first.__enter__()
        clock.seconds += 1
        second.__enter__()
        clock.seconds += 2
        first.__exit__(None, None, None)  # the one opened first ends first
        clock.seconds += 4
        second.__exit__(None, None, None)
        log.step(1, {})
    first, second = recorded(tmp_path)
    assert first == {
        "step": 0,
        "seconds_generate": 3.75,
        "seconds_reward": 1.5,
        "seconds_update": 4.5,
        "seconds_sync": 0.5,
    }
    assert list(first)[1:] == [f"seconds_{p}" for p in ("generate", "reward", "update", "sync")]
    assert second == {"step": 1, "seconds_old": 1.0, "seconds_negative": 6.0}


def test_a_phase_that_is_open_at_the_end_of_a_step_goes_on_in_the_next(tmp_path, clock):
    log, _ = open_log(tmp_path)
    with log, log.phase("generate"):
        clock.seconds += 2
        log.step(0, {})
        clock.seconds += 3
        log.step(1, {})
    assert [row["seconds_generate"] for row in recorded(tmp_path)] == [2.0, 3.0]


def test_time_worked_beside_a_phase_leaves_it_no_less_than_nothing(tmp_path, clock):
    log, _ = open_log(tmp_path)
    with log:
        with log.phase("generate"):
            clock.seconds += 1
            log.add_time("reward", 1.5)
        log.step(0, {})
    assert recorded(tmp_path) == [{"step": 0, "seconds_generate": 0.0, "seconds_reward": 1.5}]


@pytest.mark.parametrize("value", [None, "high"])
def test_a_value_that_is_no_number_is_named_and_nothing_is_written(tmp_path, value):
    log, text = open_log(tmp_path)
    with log:
        log.step(0, {"kl": 0.1})
        with pytest.raises(ValueError, match=rf"'grad_norm' of step 1 must be .*{value!r}"):
            log.step(1, {"kl": 0.2, "grad_norm": value})
        log.step(1, {"kl": 0.2})
    assert recorded(tmp_path) == [{"step": 0, "kl": 0.1}, {"step": 1, "kl": 0.2}]
    assert len(text.getvalue().splitlines()) == 3  # with a header


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, torch.tensor(math.nan)])
def test_a_value_that_is_not_finite_is_left_out(tmp_path, value):
    log, _ = open_log(tmp_path)
    with log:
        log.step(0, {"kl": 0.1, "loss": value})
    assert recorded(tmp_path) == [{"step": 0, "kl": 0.1}]


def test_steps_must_rise_and_step_is_no_metric(tmp_path):
    log, _ = open_log(tmp_path)
    with log:
        log.step(4, {})
        with pytest.raises(ValueError, match="step 4 was logged after step 4"):
            log.step(4, {})
        with pytest.raises(ValueError, match="cannot be called 'step'"):
            log.step(5, {"step": 5})
        with pytest.raises(ValueError, match="before the first step"):
            log.resume_at(2)


@pytest.mark.parametrize("tail", ["", '{"step": 5, "rew'])
def test_after_a_resume_each_step_is_there_once(tmp_path, tail):
    log, _ = open_log(tmp_path)
    with log:
        for step in range(5):
            log.step(step, {"reward": step / 10})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(tail)  # cut short by a kill
    log, _ = open_log(tmp_path)
    with log:
        log.resume_at(3)
        for step in (3, 4):
            log.step(step, {"reward": 1 + step / 10})
    expected = [(0, 0.0), (1, 0.1), (2, 0.2), (3, 1.3), (4, 1.4)]
    assert [(row["step"], row["reward"]) for row in recorded(tmp_path)] == expected


@pytest.mark.parametrize(
    "end",
    [
        b"\0" * 512,
        b"\0" * 512 + b"\n",
        b"nonsense\n",
        b'{"step": 5, "rew\n\0\0\n\xff\xfe\n[1]\n{"step": "7"}\n{"step": true}\n',
        b'{"step": ' + b"9" * 5000 + b"}\n",
        b"[" * 100_000,
    ],
    ids=range(6),
)
def test_what_a_power_cut_left_at_the_end_is_dropped_with_a_line(tmp_path, end):
    good = b'{"step": 1, "reward": 0.5}\n{"step": 2, "reward": 0.25}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good + end)
    log, text = open_log(tmp_path)
    with log:
        log.resume_at(3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == good
    assert (
        f"metrics.jsonl: its last {len(end)} bytes were damaged and are dropped" in text.getvalue()
    )


def full_disk(folder, monkeypatch):
    """Every file in the folder is opened as /dev/full."""
    opened = open

    def full(path, *arguments, **options):
        inside = str(path).startswith(str(folder))
        return opened("/dev/full" if inside else path, *arguments, **options)

    for module in ("run_log", "scalars"):
        monkeypatch.setattr(f"tercet.train.logs.{module}.open", full, raising=False)


def test_a_full_disk_is_one_error_and_no_traceback(tmp_path, monkeypatch, capfd):
    log, text = open_log(tmp_path)
    with pytest.raises(OSError) as caught, log:
        log.step(1, {"reward": 0.5})
        full_disk(tmp_path, monkeypatch)
        log.step(2, {"reward": 0.5})
    assert caught.value.errno == errno.ENOSPC
    assert [row["step"] for row in recorded(tmp_path)] == [1]
    shown = capfd.readouterr()
    assert "Traceback" not in shown.err + shown.out + text.getvalue()


@pytest.mark.parametrize("from_the_start", [True, False])
def test_a_run_goes_on_without_tensorboard(tmp_path, monkeypatch, capfd, from_the_start):
    log, text = open_log(tmp_path)
    with log:
        if not from_the_start:
            log.resume_at(1)
        full_disk(tmp_path / "tensorboard", monkeypatch)
        if not from_the_start:
            monkeypatch.setattr(log._scalars._file, "write", no_space)
        for step in (1, 2):
            log.step(step, {"reward": 0.5})
    assert [row["step"] for row in recorded(tmp_path)] == [1, 2]
    assert text.getvalue().count("TensorBoard gets nothing from here on: [Errno 28] No space") == 1
    assert "Traceback" not in capfd.readouterr().err


def no_space(_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_folder_that_is_gone_is_named(tmp_path):
    log, _ = open_log(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="run/metrics.jsonl"), log:
        log.step(1, {"reward": 0.5})
        (tmp_path / "run").rename(tmp_path / "moved")
        log.step(2, {"reward": 0.5})


def test_after_a_resume_tensorboard_shows_each_step_once(tmp_path):
    for start, reward in ((0, 0.5), (2, 0.75)):
        log, _ = open_log(tmp_path)
        with log:
            log.resume_at(start)
            for step in range(start, 4):
                log.step(step, {"reward": reward})
        time.sleep(1.1)  # event files are ordered by the second of their names
    expected = [(0, 0.5), (1, 0.5), (2, 0.75), (3, 0.75)]
    assert scalars(tmp_path, "train/reward") == expected


def test_a_new_run_in_an_old_folder_starts_its_metrics_again(tmp_path):
    for reward in (0.1, 0.2):
        log, _ = open_log(tmp_path)
        with log:
            log.step(0, {"reward": reward})
    assert recorded(tmp_path) == [{"step": 0, "reward": 0.2}]


def test_a_damaged_metrics_file_is_named_with_its_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\nnonsense\n{"step": 2}\n')
    log, _ = open_log(tmp_path)
    with log, pytest.raises(ValueError, match=r"metrics.jsonl, line 2: not a JSON object"):
        log.resume_at(1)
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3


def test_a_terminal_shows_bars_and_is_restored_after_an_exception(tmp_path):
    log, text = open_log(tmp_path, terminal=True)
    with pytest.raises(KeyError), log, log.phase("generate", total=160, unit="responses") as phase:
        phase.advance(40, "3 of 16 groups kept")
        with log.phase("update"):
            log.progress.refresh()
            inner = text.getvalue()
        log.progress.refresh()
        text.truncate(len(text.getvalue()))
        raise KeyError("reward")
    shown = text.getvalue()
    assert "update" in inner and "0/5" in inner and "steps" in inner
    assert "generate" in shown and "40/160" in shown and "responses, 3 of 16 groups kept" in shown
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert shown.count(hide) == 1 and shown.rindex(show) > shown.rindex(hide)
    log.close()  # again, does no harm


def test_without_a_terminal_there_is_a_line_per_step_and_nothing_else(tmp_path):
    log, text = open_log(tmp_path)
    with log:
        for step in range(3):
            with log.phase("update", total=2, unit="mini-batches") as phase:
                phase.advance()
            log.step(step, {"reward": 0.5})
    assert "\x1b" not in text.getvalue()
    assert [line[:15] for line in text.getvalue().splitlines()] == [
        "   step reward ",
        *(f"    {step}/5  0.500 " for step in range(3)),
    ]


def test_a_message_is_shown_as_it_is(tmp_path):
    log, text = open_log(tmp_path)
    with log:
        log.say("left out: [red]a.jpg[/red] " + "x" * 200)
    assert text.getvalue() == "left out: [red]a.jpg[/red] " + "x" * 200 + "\n"


def test_a_file_gets_no_bars_even_where_colours_are_forced(tmp_path, monkeypatch, capsys, clock):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with RunLog(tmp_path, 1, "") as log, log.phase("update", total=1):
        log.step(1, {"reward": 0.5})
    assert capsys.readouterr().out == (
        "   step reward   sec    left\n    1/1  0.500  0.00     0 s\n"
    )


def test_the_bar_of_the_run_goes_on_from_the_resumed_step(tmp_path):
    log, _ = open_log(tmp_path, total_steps=10)
    with log:
        log.resume_at(4)
        assert log.progress.tasks[0].completed == 3
        log.step(4, {})
        assert (log.progress.tasks[0].completed, log.progress.tasks[0].total) == (4, 10)


def test_a_picture_goes_to_tensorboard_and_none_where_it_is_not_wanted(tmp_path):
    png = tmp_path / "samples.png"
    Image.new("RGB", (3, 2), "red").save(png)
    log, _ = open_log(tmp_path / "a")
    with log:
        log.picture("samples", png)  # before the first step there is no place for it
        log.step(4, {"reward": 0.5})
        log.picture("samples", png)
        log.picture("samples", tmp_path / "none.png")
    (shown,) = EventAccumulator(str(tmp_path / "a" / "tensorboard")).Reload().Images("samples")
    assert shown.step == 4 and shown.encoded_image_string == png.read_bytes()
    log, _ = open_log(tmp_path / "b", log_to=())
    with log:
        log.step(1, {"reward": 0.5})
        log.picture("samples", png)
    assert not (tmp_path / "b" / "tensorboard").exists()
