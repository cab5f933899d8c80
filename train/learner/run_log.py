"""What people see of a run: progress bars, a line per step, metrics.jsonl, TensorBoard, wandb.

    with RunLog("runs/tapo", total_steps=300, config_yaml=text) as log:
        for step in range(1, 301):
            with log.phase("generate", total=160, unit="responses") as phase:
                phase.advance(10)
            log.step(step, {"reward": 0.52, "kl": 0.013})

Seconds are counted once: while a phase is open inside another one, or `add_time` takes a share out
of it, the outer phase's clock stands still, so that a step's phases add up to the time that passed.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_WIDTH = 160
COLUMNS = (
    (
        ("reward", "6.3f", ("reward",)),
        ("acc", "5.3f", ("accuracy",)),
        ("several", "5.3f", ("several_names",)),
        ("kept", "5.3f", ("acceptance",)),
        ("len", "6.1f", ("response_length",)),
        ("loss", "7.4f", ("loss",)),
        ("ce", "7.4f", ("cross_entropy",)),
        ("pg", "7.4f", ("pg_loss",)),
        ("kl", "6.4f", ("kl",)),
        ("H", "6.3f", ("entropy",)),
        ("Hneg", "6.3f", ("neg_entropy",)),
        ("Hexact", "5.3f", ("exact_entropy",)),
    ),
    (
        ("clip", "5.3f", ("clip_frac_high", "clip_frac_low", "clip_frac_dual")),
        ("kl_old", "7.1e", ("approx_kl",)),
        ("grad", "7.1e", ("grad_norm",)),
        ("skip", "1.0f", ("skipped_steps",)),
        ("lr", "7.1e", ("lr",)),
        ("tok/s", "5.0f", ("tokens_per_s",)),
    ),
)
"""The two lines of a step: label, format, metrics. Any other metric goes to the files only."""
PHASES = {
    "generate": "gen",
    "reward": "rew",
    "old": "old",
    "negative": "neg",
    "update": "upd",
    "sync": "sync",
}
"""The phases of a step in their order, and how the line calls them; others follow as they come."""


class Phase:
    """A part of a step with a bar of its own; `advance` moves it."""

    def __init__(self, log: RunLog, name: str, total: float | None, unit: str):
        self._log, self.name, self._total, self._unit = log, name, total, unit
        self._task = None

    def __enter__(self) -> Phase:
        self._task = self._log.progress.add_task(self.name, total=self._total, unit=self._unit)
        self._log._open(self)
        return self

    def __exit__(self, *exception) -> None:
        self._log._shut(self)
        self._log.progress.remove_task(self._task)

    def advance(self, n: float = 1) -> None:
        """Moves the bar by `n` units."""
        self._log.progress.advance(self._task, n)

    def show(self, visible: bool) -> None:
        self._log.progress.update(self._task, visible=visible)


class RunLog:
    """Shows a run and records it; to be used by one process of a run, as a context manager.

    On a terminal one bar shows the run and one the phase at work; elsewhere there is a line per
    step and nothing else.

    Args:
        out: folder of the run; gets config.yaml, the metrics file and tensorboard/.
        total_steps: rollout steps of the whole run.
        config_yaml: resolved configuration; None writes no config.yaml.
        wandb: Weights & Biases project; None: not used.
        metrics_file: name of the JSON Lines file in `out`.
        console: where to show it; None: standard output.

    Raises:
        ValueError: `wandb` is set but the package is not installed.
    """

    def __init__(
        self,
        out: Path | str,
        total_steps: int,
        config_yaml: str | None,
        wandb: str | None = None,
        metrics_file: str = "metrics.jsonl",
        console: Console | None = None,
    ):
        self.out = Path(out)
        self.out.mkdir(parents=True, exist_ok=True)
        if config_yaml is not None:
            (self.out / "config.yaml").write_text(config_yaml, encoding="utf-8")
        self._metrics_path = self.out / metrics_file
        self._metrics = self._tensorboard = self._last_step = None
        self._seconds: dict[str, float] = defaultdict(float)
        self._phases: list[Phase] = []
        self._clock: float | None = None
        self._shown: list[str] = []
        self._wandb = None if wandb is None else _start_wandb(wandb, self.out, config_yaml)
        self.console = console or Console(highlight=False, force_terminal=sys.stdout.isatty())
        self.progress = Progress(
            TextColumn("{task.description:>9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]:<10}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            refresh_per_second=4,
            speed_estimate_period=3600,  # seconds: a step may take minutes
            disable=not self.console.is_interactive,
        )
        self._run = self.progress.add_task("run", total=total_steps, unit="steps")

    def __enter__(self) -> RunLog:
        self.progress.start()
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def phase(self, name: str, total: float | None = None, unit: str = "") -> Phase:
        """A phase of the current step, to be entered with `with`.

        Args:
            name: generate, reward, old, negative, update, sync, or any other.
            total: units of work; None when it is not known.
            unit: what is counted, for instance "responses".
        """
        return Phase(self, name, total, unit)

    def add_time(self, name: str, seconds: float) -> None:
        """Counts seconds as the named phase's, taken out of the phase that is open, if any."""
        self._seconds[name] += seconds
        if self._phases:
            self._seconds[self._phases[-1].name] -= seconds

    def resume_at(self, step: int) -> None:
        """Prepares for `step`, from 1, to be the next: recorded lines at or after it are dropped.

        Raises:
            ValueError: A line of the metrics file that is not JSON with a step, by its number.
        """
        if self._metrics is not None:
            raise ValueError("resume_at must come before the first step of this RunLog")
        _drop_from(self._metrics_path, step)
        self.progress.reset(self._run, completed=max(0, step - 1))
        self._metrics = open(self._metrics_path, "a", encoding="utf-8")  # noqa: SIM115
        self._tensorboard = _summary_writer(self.out / "tensorboard", step)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Shows and records a finished step, with the seconds of its phases as `seconds_<phase>`.

        Args:
            step: number of the step, from 1, each larger than the one before.
            metrics: numbers by the names of COLUMNS, or any other names.

        Raises:
            ValueError: A value that is not a finite number, by its name (leave grad_norm out of a
                step that was skipped), or a step that is not after the last one.
        """
        if "step" in metrics:
            raise ValueError("a metric cannot be called 'step': that is the number of the line")
        row = {name: _number(name, value, step) for name, value in metrics.items()}
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(f"step {step} was logged after step {self._last_step}")
        if self._metrics is None:
            self.resume_at(step)
        seconds = self._take_seconds()
        row |= {f"seconds_{name}": value for name, value in seconds.items()}
        self._metrics.write(json.dumps({"step": step} | row, allow_nan=False) + "\n")
        self._metrics.flush()
        for name, value in row.items():
            self._tensorboard.add_scalar(_tag(name), value, step)
        if self._wandb is not None:
            self._wandb.log(row, step=step)
        self._last_step = step
        self._shown += [name for name in row if name not in self._shown]
        self.say(step_line(step, row, self._shown))
        self.progress.advance(self._run)

    def say(self, text: str) -> None:
        """Shows a line of its own, above the bars."""
        self.console.print(text, soft_wrap=True, markup=False)

    def close(self) -> None:
        """Ends the bars, gives the terminal back and closes the files."""
        self.progress.stop()
        for sink in (self._metrics, self._tensorboard):
            if sink is not None:
                sink.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _charge(self) -> None:
        """Books the time since the last change to the innermost open phase."""
        now = time.perf_counter()
        if self._phases:
            self._seconds[self._phases[-1].name] += now - self._clock
        self._clock = now

    def _open(self, phase: Phase) -> None:
        self._charge()
        self._phases.append(phase)
        self._show_innermost()

    def _shut(self, phase: Phase) -> None:
        self._charge()
        self._phases.remove(phase)
        self._show_innermost()

    def _show_innermost(self) -> None:
        for phase in self._phases:
            phase.show(phase is self._phases[-1])

    def _take_seconds(self) -> dict[str, float]:
        """Seconds per phase since the last step, in the order of PHASES."""
        self._charge()
        seconds, self._seconds = self._seconds, defaultdict(float)
        order = [name for name in PHASES if name in seconds]
        order += [name for name in seconds if name not in PHASES]
        return {name: round(max(0.0, seconds[name]), 4) for name in order}


def step_line(step: int, row: dict[str, float], shown: list[str]) -> str:
    """A step as aligned text: one line where LINE_WIDTH allows it, else two.

    Args:
        step: its number.
        row: its metrics, with `seconds_<phase>`.
        shown: names that had a column before; one that is missing now leaves it blank.
    """
    first, second = ([*_cells(columns, row, shown)] for columns in COLUMNS)
    phases = [name for name in shown if name.startswith("seconds_")]
    if phases:
        total = sum(row.get(name, 0.0) for name in phases)
        short = {f"seconds_{phase}": label for phase, label in PHASES.items()}
        parts = [f"{short.get(name, name[8:])} {_short(row.get(name, 0.0))}" for name in phases]
        second.append(f"{_short(total)} s: {' '.join(parts)}")
    label, indent = f"step {step:>5}", " " * 4
    if len("  ".join([label, *first, *second])) <= LINE_WIDTH:
        return "  ".join([label, *first, *second])
    lines = []
    for start, cells in ((label, first), (indent, second)):
        lines.append(start)
        for cell in cells:
            if len(lines[-1]) + 2 + len(cell) > LINE_WIDTH:
                lines.append(indent)
            lines[-1] += "  " + cell
    return "\n".join(lines)


def _short(seconds: float) -> str:
    """Three digits in four characters."""
    digits = 2 if seconds < 9.995 else 1 if seconds < 99.95 else 0
    return f"{seconds:4.{digits}f}"


def _cells(columns: tuple, row: dict[str, float], shown: list[str]) -> Iterator[str]:
    """`label value` for each column with a metric that was ever shown."""
    for label, form, names in columns:
        if present := [name for name in names if name in shown]:
            blank = " " * int(form.split(".")[0])
            values = [format(row[name], form) if name in row else blank for name in present]
            yield f"{label} {'/'.join(values)}"


def _tag(name: str) -> str:
    """A metric's name in TensorBoard, which groups by what stands before the slash."""
    if "/" in name:
        return name
    return name.replace("seconds_", "seconds/", 1) if "seconds_" in name else f"train/{name}"


def _number(name: str, value: float, step: int) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"metric {name!r} of step {step} must be a finite number, got {value!r}")
    return number


def _drop_from(path: Path, step: int) -> None:
    """Removes the lines of a metrics file at or after a step, and a last line cut short."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = []
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith("\n"):
            break
        try:
            recorded = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a JSON object with a step") from error
        if recorded < step:
            kept.append(line)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)


def _summary_writer(folder: Path, step: int):
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    return SummaryWriter(str(folder), purge_step=step)


def _start_wandb(project: str, out: Path, config_yaml: str | None) -> ModuleType:
    """Starts a run of Weights & Biases; runs resumed in one folder share its group."""
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            f"run.wandb is {project!r} but the package wandb is not installed: "
            "`pip install wandb`, or leave run.wandb out"
        ) from error
    import yaml

    config = yaml.safe_load(config_yaml) if config_yaml else None
    wandb.init(project=project, group=out.name, dir=str(out), config=config)
    return wandb


class SilentLog:
    """Stands in for a RunLog on ranks that neither show nor record."""

    def phase(self, name: str, total: float | None = None, unit: str = "") -> SilentLog:
        return self

    def advance(self, n: float = 1) -> None: ...

    def add_time(self, name: str, seconds: float) -> None: ...

    def resume_at(self, step: int) -> None: ...

    def step(self, step: int, metrics: dict[str, float]) -> None: ...

    def say(self, text: str) -> None: ...

    def __enter__(self) -> SilentLog:
        return self

    def __exit__(self, *exception) -> None: ...
