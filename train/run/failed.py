"""Groups that an update failed on: written down for a look, and left out of what goes on."""

from __future__ import annotations

import json
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Protocol

from tercet.core.config import TapoConfig
from tercet.core.packing import Piece
from tercet.core.types import Group
from tercet.train.learner.ranks import Ranks


class Updating(Protocol):
    """The part of a TapoRun that an update works on."""

    config: TapoConfig
    ranks: Ranks
    out: Path
    steps_done: int
    minibatches_done: int
    groups: list[Group]
    figures: dict[str, float]
    minibatch_figures: list[dict[str, float]]
    working_on: Sequence[Piece]
    """What is scored or trained on right now; empty in between."""


def set_aside(run: Updating, error: BaseException) -> str:
    """Take the groups of the mini-batch that failed out of the run's state; on all ranks.

    Rank 0 writes them to <out>/failed/step_000003 (the third step failed), beside the traceback.
    The other mini-batches of the step stay. Where single responses are dealt to mini-batches, the
    rest of a step that has begun to train would be dealt anew: it is dropped too, and the step is
    sampled again.

    Returns:
        What to tell about it; empty where no mini-batch was being worked on.
    """
    names = {piece.group.id for piece in run.working_on}
    if not names:
        return ""
    failed = [group for group in run.groups if group.id in names]
    run.groups = [group for group in run.groups if group.id not in names]
    if run.config.optim.minibatch_by == "response" and run.minibatches_done:
        run.groups, run.minibatch_figures, run.minibatches_done = [], [], 0
    run.figures["groups"] = float(len(run.groups))
    run.working_on = ()
    if not run.ranks.is_first:
        return ""
    try:
        folder = _write(run.out / "failed", run.steps_done + 1, failed, error)
    except OSError as unwritten:
        return f", without {len(failed)} groups of the failed mini-batch ({unwritten})"
    return f", without {len(failed)} groups of the failed mini-batch: see {folder}"


def _write(root: Path, step: int, groups: Sequence[Group], error: BaseException) -> Path:
    """groups.json and error.txt in a new folder of the step's name."""
    names = (f"step_{step:06d}" + (f"_{n}" if n > 1 else "") for n in count(1))
    folder = next(root / name for name in names if not (root / name).exists())
    folder.mkdir(parents=True)
    text = json.dumps([asdict(g) for g in groups], indent=1, default=lambda t: t.tolist())
    (folder / "groups.json").write_text(text, encoding="utf-8", errors="backslashreplace")
    said = "".join(traceback.format_exception(error))
    (folder / "error.txt").write_text(said, encoding="utf-8", errors="backslashreplace")
    return folder
