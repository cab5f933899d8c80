"""A run's folder as the report shows it: whatever can be read of it, and what cannot."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tercet.core.config import SftConfig, TapoConfig
from tercet.core.data.files import read_bytes
from tercet.core.presets import PRESETS
from tercet.train.cli.arguments import read_mapping
from tercet.train.logs.group_files import GROUPS, step_files
from tercet.train.logs.metrics import ENVIRONMENT, METRICS_FILE, read_metrics
from tercet.train.run.identity import IDENTITY, LOCK, Kind, kind_of

CONFIG, TABLE, FAILED = "config.yaml", "table.csv", "failed"
TRIPLETS = "triplets.json"  # core.data.manifest's, which would import torch
MARKS = (METRICS_FILE, CONFIG, IDENTITY)
"""A folder with any of these is a run's."""
MOST = 1 << 30
"""Bytes read of a file."""
DEPTH, MOST_TABLES = 4, 20
"""Evaluations are looked for so many folders deep; so many of them are shown."""


@dataclass
class Run:
    """What is known of a run."""

    name: str
    folder: Path
    command: str = "tapo"
    state: str = ""
    problems: list[str] = field(default_factory=list)
    """What cannot be read, and what went wrong in the run."""
    steps: list[dict[str, float]] = field(default_factory=list)
    """Lines of metrics.jsonl."""
    options: dict[str, object] = field(default_factory=dict)
    """By dotted name."""
    changed: list[str] = field(default_factory=list)
    """Options that differ from their defaults."""
    environment: dict[str, object] = field(default_factory=dict)
    model: str = ""
    """Digest of the model that it began from; empty where that is not known."""
    root: Path | None = None
    """What the keys of photos are relative to."""
    names: dict[str, list[str]] = field(default_factory=dict)
    """Known sub-categories by super-category."""
    group_files: dict[int, Path] = field(default_factory=dict)
    evaluations: list[dict] = field(default_factory=list)


def read_run(folder: Path, name: str, evaluations: Sequence[Path]) -> Run:
    """Read a run's folder.

    Args:
        folder: of a run that is over, goes on, or crashed, of this version or an earlier one.
        name: what it is called on the page.
        evaluations: folders of evaluations beside those in the run's own.

    Raises:
        ValueError: it is no run's folder.
    """
    if not any((folder / mark).exists() for mark in MARKS):
        inside = sorted({file.parent.name for mark in MARKS for file in folder.glob(f"*/{mark}")})
        hint = f"; runs inside it are {', '.join(inside[:MOST_TABLES])}" if inside else ""
        raise ValueError(f"{folder} is no run's folder: it has none of {', '.join(MARKS)}{hint}")
    run = Run(name, folder)
    for read in (_metrics, _options, _environment, _identity, _triplets, _failed):
        try:
            read(run)
        except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
            run.problems.append(str(error))
    run.group_files = step_files(folder / GROUPS)
    if run.command == "tapo" and run.steps and not run.group_files:
        run.problems.append("no groups were logged: run.log_groups is 0, or the run is older")
    run.state = _state(run)
    for place in (folder, *evaluations):
        _tables(run, place)
    return run


def _json(path: Path) -> dict:
    found = json.loads(read_bytes(path, MOST))
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found


def _metrics(run: Run) -> None:
    path = run.folder / METRICS_FILE
    if not path.exists():
        return
    try:
        run.steps = read_metrics(path)
    except ValueError as error:  # good lines follow a damaged one
        run.problems.append(f"{error}: left out")
        for line in read_bytes(path, MOST).splitlines():
            try:
                step = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(step, dict) and type(step.get("step")) is int:
                run.steps.append(step)
    run.steps = [
        {name: value for name, value in step.items() if isinstance(value, int | float)}
        for step in run.steps
    ]


def _options(run: Run) -> None:
    path = run.folder / CONFIG
    if not path.exists():
        run.problems.append(f"{CONFIG} is not there: no options are known")
        return
    found = _flat(read_mapping(str(path)))
    run.command = "tapo" if any(name.startswith("rollout.") for name in found) else "sft"
    if run.command == "tapo":
        defaults = _flat(asdict(TapoConfig())) | PRESETS["tercet"]
    else:
        defaults = _flat(asdict(SftConfig()))
    run.options = {name: value for name, value in found.items() if _is_shown(name)}
    run.changed = [n for n, v in run.options.items() if n not in defaults or defaults[n] != v]


def _flat(sections: dict[str, object]) -> dict[str, object]:
    """Options by dotted name."""
    return {
        f"{section}.{name}": value
        for section, options in sections.items()
        if isinstance(options, dict)
        for name, value in options.items()
    }


def _is_shown(option: str) -> bool:
    """Whether an option may stand on a page that is handed on: keys of servers may not."""
    try:
        return kind_of(option) is not Kind.UNKEPT
    except KeyError:  # of another version
        return "key" not in option and "token" not in option


def _environment(run: Run) -> None:
    path = run.folder / ENVIRONMENT
    if path.exists():
        run.environment = _json(path)
    else:
        run.problems.append(f"{ENVIRONMENT} is not there: the run is older")


def _identity(run: Run) -> None:
    path = run.folder / IDENTITY
    if path.exists():
        stored = _json(path)
        run.model = str(stored.get("identity", stored).get("model", ""))


def _triplets(run: Run) -> None:
    path = run.folder / TRIPLETS
    if run.command != "tapo" or not path.exists():
        return
    stored = _json(path)
    run.root = Path(os.path.normpath(run.folder.absolute() / stored["root"]))
    run.names = {str(name): [str(n) for n in names] for name, names in stored["names"].items()}


def _failed(run: Run) -> None:
    for folder in sorted((run.folder / FAILED).glob("step_*"))[:MOST_TABLES]:
        said = (folder / "error.txt").read_text(encoding="utf-8", errors="replace").strip()
        run.problems.append(f"an update failed ({folder.name}): {said.rpartition(chr(10))[2]}")


def _state(run: Run) -> str:
    """Whether it goes on, is over, or was stopped."""
    done = int(run.steps[-1]["step"]) if run.steps else 0
    total = run.environment.get("steps of the run")
    of = f" of {total:,}" if isinstance(total, int) else ""
    if _is_locked(run.folder / LOCK):
        return f"running, {done:,}{of} steps"
    if not done:
        return "no step was finished"
    if isinstance(total, int) and done < total:
        return f"ended at step {done:,}{of}: stopped, or crashed"
    return f"{done:,}{of} steps"


def _is_locked(path: Path) -> bool:
    """Whether a process writes into the run's folder."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def _tables(run: Run, folder: Path) -> None:
    """Add the tables of the evaluations in a folder."""
    found = []
    for depth in range(DEPTH):
        found += sorted(folder.glob("*/" * depth + TABLE))
    for path in found[:MOST_TABLES]:
        try:
            text = read_bytes(path, MOST).decode("utf-8", errors="replace")
            rows = list(csv.DictReader(io.StringIO(text)))
        except (ValueError, csv.Error) as error:
            run.problems.append(str(error))
            continue
        title = os.path.relpath(path.parent, run.folder)
        rows = [{k: v for k, v in row.items() if k and isinstance(v, str)} for row in rows]
        run.evaluations.append({"title": title, "rows": rows})
