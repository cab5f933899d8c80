"""What a run shows on the terminal: a header now and then, a line a step, and a block at its end.

  step reward    acc   kept     len      kl  entropy     grad   sec    left
12/300  0.571  0.524  0.792    23.0  0.2284    0.090  2.2e-01  1.85   9 min
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from tercet.train.logs.group_files import GROUPS
from tercet.train.logs.metrics import (
    METRICS,
    METRICS_FILE,
    PHASES,
    Metric,
    phase_seconds,
    read_metrics,
)

WIDTH = 80
"""Characters of a line."""
HEADER_EVERY = 20  # steps
FEW = 5
"""So many steps at a run's beginning and end say what it has reached."""
NEXT = {
    "tapo": (
        "python -m tercet.train.report {out}",
        "python -m tercet.train.eval_fgvr --text_encoder null \\",
        "  --model.path {checkpoint} \\",
        "  --questions {out}/triplets.json",
    ),
    "sft": (
        "python -m tercet.train.report {out}",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 torchrun --nproc-per-node 1 train/tapo.py \\",
        "  --model.path {checkpoint} \\",
        "  --data.path PHOTOS --run.out runs/tapo",
    ),
}
"""What to run next, by command."""


class StepLines:
    """The lines of the steps of a run; they know which columns there have been.

    Args:
        total_steps: of the run.
        verbose: also show every other metric, below the line.
    """

    def __init__(self, total_steps: int, verbose: bool):
        self._total, self._verbose = total_steps, verbose
        self._columns: list[Metric] = []
        self._since_header = 0

    def of(
        self, step: int, metrics: dict[str, float], shown: Collection[str], left_s: float | None
    ) -> str:
        """The lines of a step.

        Args:
            step: its number.
            metrics: its metrics, with `seconds_<phase>`.
            shown: every name that there has been; one without a value now leaves its column blank.
            left_s: seconds until the run's end; None: not known.
        """
        columns = [metric for metric in METRICS if metric.line == 1 and metric.name in shown]
        lines = []
        if columns != self._columns or self._since_header == HEADER_EVERY:
            self._columns, self._since_header = columns, 0
            lines.append(self._join("step", [m.label for m in columns], "sec", "left"))
        self._since_header += 1
        values = [_value(metric, metrics) for metric in columns]
        seconds = _short(sum(phase_seconds(metrics).values()))
        left = "" if left_s is None else duration(left_s)
        lines.append(self._join(f"{step}/{self._total}", values, seconds, left))
        lines += _rare(metrics)
        if self._verbose:
            rest = [""]
            for cell in _rest(metrics, shown):
                fits = rest[-1] and len(rest[-1]) + 2 + len(cell) <= WIDTH
                rest[-1:] = [f"{rest[-1]}  {cell}"] if fits else [*rest[-1:], f"    {cell}"]
            lines += rest[1:]
        return "\n".join(lines)

    def _join(self, step: str, cells: Sequence[str], seconds: str, left: str) -> str:
        width = max(7, 2 * len(str(self._total)) + 1)
        sizes = [max(len(m.label), int(m.form.split(".")[0])) for m in self._columns]
        middle = [cell.rjust(size) for cell, size in zip(cells, sizes, strict=True)]
        cells = "  ".join([*middle, seconds.rjust(4), left.rjust(6)])
        return f"{step.rjust(width)} {cells}".rstrip()


def _rare(metrics: dict[str, float]) -> list[str]:
    """Lines of what only some steps have."""
    found = [
        f"{m.label} {_value(m, metrics)}" for m in METRICS if m.line == 3 and m.name in metrics
    ]
    lines = [f"    held out: {', '.join(found)}"] if found else []
    if share := metrics.get("skipped_steps"):
        lines.append(f"    {share:.0%} of its updates were skipped: the gradient was not finite")
    return lines


def _rest(metrics: dict[str, float], shown: Collection[str]) -> Iterator[str]:
    """`label value` of all other metrics; those with one label are joined by slashes."""
    listed = [m for m in METRICS if m.line == 2 and m.name in shown]
    for label, column in groupby(listed, attrgetter("label")):
        values = "/".join(_value(metric, metrics).strip() or "-" for metric in column)
        yield f"{label} {values}"
    for name, seconds in phase_seconds(metrics).items():
        yield f"{PHASES.get(name, name)} {_short(seconds).strip()} s"


def _value(metric: Metric, metrics: dict[str, float]) -> str:
    """The metric's number; empty where there is none."""
    return format(metrics[metric.name], metric.form) if metric.name in metrics else ""


def _short(seconds: float) -> str:
    """Three digits in four characters."""
    digits = 2 if seconds < 9.995 else 1 if seconds < 99.95 else 0
    return f"{seconds:4.{digits}f}"


def duration(seconds: float) -> str:
    """A time in at most six characters: 45 s, 12 min, 4h 05m, 3d 04h, 20 d."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 100:
        return f"{hours}h {minutes:02d}m"
    return f"{hours // 24}d {hours % 24:02d}h" if hours < 240 else f"{hours // 24} d"


def say_end(out: str, checkpoint: Path, command: str) -> None:
    """Print, on rank 0, what a run has reached, where everything is, and what to run next."""
    if os.environ.get("RANK", "0") == "0":
        print(end_block(Path(out), checkpoint, command))


def end_block(out: Path, checkpoint: Path, command: str) -> str:
    """What `say_end` prints.

    Args:
        out: the run's folder.
        checkpoint: the last one's.
        command: tapo or sft.
    """
    try:
        steps = read_metrics(out / METRICS_FILE)
    except (ValueError, OSError) as error:
        steps, lines = [], [f"the metrics cannot be read: {error}"]
    else:
        lines = [f"{len(steps):,} steps are done."]
    for metric in METRICS:
        values = [step[metric.name] for step in steps if metric.name in step]
        if metric.name in ("reward", "accuracy", "cross_entropy") and values:
            few = min(FEW, -(-len(values) // 2))
            first, last = (sum(part) / few for part in (values[:few], values[-few:]))
            lines.append(f"  {metric.curve:<24}{first:.3f} -> {last:.3f}")
        elif metric.line == 3 and values:
            lines.append(f"  {metric.curve:<24}{values[-1]:.3f}")
    places = {"checkpoint": checkpoint, "metrics": out / METRICS_FILE, "groups": out / GROUPS}
    places |= {"pictures": out / "curves.png", "": out / "samples.png"}
    found = [f"  {name:<12}{place}" for name, place in places.items() if place.exists()]
    after = [f"  {line.format(out=out, checkpoint=checkpoint)}" for line in NEXT[command]]
    return "\n".join(["", *lines, "where it is", *found, "what to run next", *after])
