"""The outer loop of a training command: steps, checkpoints, and an orderly stop."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Protocol

from tercet.train.interrupt import Interrupted, StopSignal
from tercet.train.run_log import RunLog


class Run(Protocol):
    """What TapoRun and SftRun offer; an exception in `step` leaves a state that can be saved."""

    log: RunLog
    stop: StopSignal
    steps_done: int
    total_steps: int

    def step(self) -> dict[str, float]: ...

    def save(self) -> Path: ...


def run_steps(run: Run, save_every: int) -> Path | None:
    """Run all steps; save every `save_every`, at the end, and before any exception goes on.

    Returns:
        The last checkpoint; None when there was nothing left to do.
    """
    saved = None
    try:
        while run.steps_done < run.total_steps:
            run.stop.check()
            run.log.step(run.steps_done + 1, run.step())
            if run.steps_done % save_every == 0 or run.steps_done == run.total_steps:
                saved = run.save()
    except BaseException:
        run.log.say(f"checkpoint after {run.steps_done} steps: {run.save()}")
        raise
    return saved


def command(main) -> None:
    """Run `main()`; bad input ends with one line, an interruption with 128 + its signal."""
    try:
        main()
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except Interrupted as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
