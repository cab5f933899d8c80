"""What people see of a run: progress bars, a line per step, metrics.jsonl, TensorBoard, others.

    with RunLog("runs/tapo", total_steps=300, config_yaml=text) as log:
        for step in range(1, 301):
            with log.phase("generate", total=160, unit="responses") as phase:
                phase.advance(10)
            log.step(step, {"reward": 0.52, "kl": 0.013})

Each second is counted once, so that a step's phases add up to the time that passed: a phase's clock
stops while another phase is open inside it, and `add_time` moves seconds from the open phase to the
named one.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import defaultdict, deque
from collections.abc import Collection
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tercet.train.logs.metrics import (
    METRICS_FILE,
    PHASES,
    SECONDS,
    tensorboard_tag,
    whole_lines,
)
from tercet.train.logs.scalars import Scalars
from tercet.train.logs.terminal import StepLines
from tercet.train.logs.trackers import Trackers

RECENT_STEPS = 20
"""Steps whose time says how long the rest will take."""


class _Lines(Console):
    """A console that falls silent when nobody reads it any more; rich's own ends the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Phase:
    """A timed part of a step, with a progress bar of its own."""

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

    def advance(self, n: float = 1, note: str = "") -> None:
        """Move the bar by `n` units; a note stands behind the unit from then on."""
        unit = {"unit": f"{self._unit}, {note}"} if note else {}
        self._log.progress.update(self._task, advance=n, **unit)

    def show(self, visible: bool) -> None:
        """Show or hide the bar."""
        self._log.progress.update(self._task, visible=visible)


class RunLog:
    """Shows and records a run; a context manager for rank 0.

    A terminal shows one bar for the run and one for the innermost open phase, below a line for each
    finished step. Anything else, such as a file, gets the lines alone.

    Args:
        out: folder of the run; gets config.yaml, metrics.jsonl and tensorboard/.
        total_steps: steps of the whole run.
        config_yaml: the resolved options as YAML.
        log_to: words of run.log_to; of them TensorBoard is written here.
        trackers: the others; None: there are none.
        verbose: show every metric of a step, not the most important ones alone.
        console: where lines and bars are shown; None: standard output.
    """

    def __init__(
        self,
        out: Path | str,
        total_steps: int,
        config_yaml: str,
        log_to: Collection[str] = ("tensorboard",),
        trackers: Trackers | None = None,
        verbose: bool = False,
        console: Console | None = None,
    ):
        self.out = Path(out)
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "config.yaml").write_text(config_yaml, encoding="utf-8")
        self._metrics_path = self.out / METRICS_FILE
        self._scalars: Scalars | None = None
        self._next_step = self._last_step = None
        self._seconds: dict[str, float] = defaultdict(float)
        self._phases: list[Phase] = []
        self._clock: float | None = None
        self._shown: dict[str, None] = {}  # every name so far, in the order of its first step
        self._lines, self._total_steps = StepLines(total_steps, verbose), total_steps
        self._ends = deque([time.perf_counter()], RECENT_STEPS + 1)  # of the last steps
        self._log_to, self._trackers = log_to, trackers
        self.console = console or _Lines(highlight=False, force_terminal=sys.stdout.isatty())
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

    def __exit__(self, _kind, error: BaseException | None, _traceback) -> None:
        try:
            self.close()
        except OSError:
            if error is None:  # else the disk was full before
                raise

    def phase(self, name: str, total: float | None = None, unit: str = "") -> Phase:
        """A phase of the current step, a context manager.

        Args:
            name: one of PHASES, or any other.
            total: units of work; None where the number is not known.
            unit: what is counted, for instance "responses".
        """
        return Phase(self, name, total, unit)

    def add_time(self, name: str, seconds: float) -> None:
        """Add seconds to the named phase, and subtract them from the innermost open one, if any."""
        self._seconds[name] += seconds
        if self._phases:
            self._seconds[self._phases[-1].name] -= seconds

    def resume_at(self, step: int) -> None:
        """Make `step` the next one; lines of metrics.jsonl at or after it are dropped.

        What a kill or a power cut left at the file's end is dropped too, with a line.

        Args:
            step: number of the next step, from 1.

        Raises:
            ValueError: a step was already logged, or a line of metrics.jsonl that good ones follow
                is not a JSON object with a step.
        """
        if self._next_step is not None:
            raise ValueError("resume_at must come before the first step of this RunLog")
        if damaged := _drop_from(self._metrics_path, step):
            self.say(f"{self._metrics_path}: its last {damaged} bytes were damaged and are dropped")
        self.progress.reset(self._run, completed=max(0, step - 1))
        self._next_step = step
        try:
            if "tensorboard" in self._log_to:
                self._scalars = Scalars(self.out / "tensorboard", step)
        except OSError as error:
            self._without_scalars(error)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Show and record a finished step, with the seconds of its phases.

        Args:
            step: number of the step, from 1, larger than the last one.
            metrics: numbers (or 0-d tensors) by the names of METRICS, or any other names. One that
                is not finite is left out.

        Raises:
            ValueError: a value is no number, a metric is called "step", or the step is not after
                the last one.
            OSError: metrics.jsonl cannot be written.
        """
        if "step" in metrics:
            raise ValueError("a metric cannot be called 'step': that is the number of the line")
        numbers = {name: _number(name, value, step) for name, value in metrics.items()}
        numbers = {name: number for name, number in numbers.items() if math.isfinite(number)}
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(f"step {step} was logged after step {self._last_step}")
        if self._next_step is None:
            self.resume_at(step)
        numbers |= self._take_seconds()
        with open(self._metrics_path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | numbers, allow_nan=False) + "\n")
        try:
            if self._scalars is not None:
                self._scalars.add(step, {tensorboard_tag(n): value for n, value in numbers.items()})
        except OSError as error:
            self._without_scalars(error)
        self._last_step = step
        self._shown |= dict.fromkeys(numbers)
        self._ends.append(time.perf_counter())
        a_step = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        left_s = a_step * max(0, self._total_steps - step)
        self.say(self._lines.of(step, numbers, self._shown, left_s))
        if self._trackers is not None:
            self._say_all(self._trackers.log(step, numbers))
        self.progress.advance(self._run)

    def say(self, text: str) -> None:
        """Show a line of text, above the bars."""
        self.console.print(text, soft_wrap=True, markup=False)

    def picture(self, name: str, png: Path) -> None:
        """Show a picture, if it is there, beside the metrics of the last step."""
        if not png.is_file() or self._last_step is None:
            return
        try:
            if self._scalars is not None:
                self._scalars.picture(self._last_step, name, png.read_bytes())
        except OSError as error:
            self._without_scalars(error)
        if self._trackers is not None:
            self._say_all(self._trackers.picture(name, png, self._last_step))

    def _say_all(self, lines: list[str]) -> None:
        for line in lines:
            self.say(line)

    def close(self) -> None:
        """Remove the bars, restore the terminal and close the files."""
        self.progress.stop()
        if self._trackers is not None:
            self._say_all(self._trackers.close())
        if self._scalars is not None:
            self._scalars.close()

    def _without_scalars(self, error: OSError) -> None:
        """Go on without TensorBoard; metrics.jsonl holds all of it too."""
        self._scalars = None
        self.say(f"TensorBoard gets nothing from here on: {error}")

    def _charge(self) -> None:
        """Add the time since the last call to the innermost open phase."""
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
        """`seconds_<phase>` since the last step, in the order of PHASES; other phases follow."""
        self._charge()
        seconds, self._seconds = self._seconds, defaultdict(float)
        order = [name for name in PHASES if name in seconds]
        order += [name for name in seconds if name not in PHASES]
        return {f"{SECONDS}{name}": round(max(0.0, seconds[name]), 4) for name in order}


def _number(name: str, value: float, step: int) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"metric {name!r} of step {step} must be a number, got {value!r}"
        ) from error


def _drop_from(path: Path, step: int) -> int:
    """Remove the lines of a metrics.jsonl at or after a step, and a damaged end; returns its bytes.

    A new file is made where there is none.
    """
    steps, damaged = whole_lines(path) if path.exists() else ([], 0)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in steps if line["step"] < step)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    return damaged


class SilentLog:
    """A RunLog, and its phases, that do nothing: for all ranks but the first."""

    def phase(self, name: str, total: float | None = None, unit: str = "") -> SilentLog:
        return self

    def advance(self, n: float = 1, note: str = "") -> None: ...

    def add_time(self, name: str, seconds: float) -> None: ...

    def resume_at(self, step: int) -> None: ...

    def step(self, step: int, metrics: dict[str, float]) -> None: ...

    def say(self, text: str) -> None: ...

    def __enter__(self) -> SilentLog:
        return self

    def __exit__(self, *exception) -> None: ...
