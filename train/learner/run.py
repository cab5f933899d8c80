"""How a training run logs, clips and ends: what TAPO and stage 1 do alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tercet.core.config import SftConfig, TapoConfig
from tercet.core.types import PolicyParts
from tercet.train.learner.checkpoint import Checkpoints
from tercet.train.learner.optim import optimizer_step
from tercet.train.learner.policy import Policy
from tercet.train.learner.ranks import Ranks
from tercet.train.learner.run_folder import RunFolder
from tercet.train.learner.run_log import RunLog, SilentLog


class Run(Protocol):
    """What TapoRun and SftRun hold."""

    config: TapoConfig | SftConfig
    parts: PolicyParts
    log: RunLog | SilentLog
    ranks: Ranks
    folder: RunFolder
    policy: Policy
    optimizer: torch.optim.Optimizer
    checkpoints: Checkpoints
    skipped: int
    """Optimiser steps skipped in a row."""
    steps_done: int
    total_steps: int

    def save(self) -> Path: ...


def open_log(run: Run, resolved: str) -> RunLog | SilentLog:
    """The run's log on rank 0, at its next step; elsewhere one that says nothing."""
    if not run.ranks.is_first:
        return SilentLog()
    run.folder.write()
    log = RunLog(run.config.run.out, run.total_steps, resolved, run.config.run.wandb)
    for line in run.folder.lines:
        log.say(line)
    log.resume_at(run.steps_done + 1)
    log.say(f"attention: {run.policy.attention}")
    return log


@contextmanager
def saved_on_error(run: Run) -> Iterator[None]:
    """Write a checkpoint before any exception goes on.

    One that came to some ranks only is not saved from: the others wait elsewhere.
    """
    try:
        yield
    except BaseException as error:
        if run.ranks.size == 1 or error is run.ranks.raised_on_all:
            run.log.say(f"checkpoint after {run.steps_done} steps: {run.save()}")
            run.checkpoints.wait()
        raise


def finish_step(run: Run, figures: dict[str, float]) -> Path | None:
    """Log a step, and save it where one is due; returns the checkpoint's folder."""
    run.ranks.share(run.folder.check)
    run.checkpoints.note(figures)
    run.log.step(run.steps_done, figures)
    if run.steps_done % run.config.run.save_every and run.steps_done < run.total_steps:
        return None
    return run.save()


def add_up(sums: dict[str, Tensor], metrics: dict[str, Tensor]) -> None:
    """Add a micro-batch's metrics to those of the mini-batch, without waiting for the device."""
    for name, value in metrics.items():
        sums[name] = sums[name] + value if name in sums else value


def clip_and_step(run: Run, lr: float, sums: dict[str, Tensor]) -> dict[str, float]:
    """Take the optimiser step that a mini-batch's gradients ask for; returns its figures.

    Args:
        run: its policy has the gradients of this rank, summed over micro-batches.
        lr: learning rate.
        sums: this rank's loss and metrics.

    Raises:
        ValueError: for the max_skipped-th time in a row the gradient is not finite.
    """
    sums = run.ranks.add(sums)
    limit = run.config.optim.max_grad_norm
    norm, stepped = optimizer_step(run.optimizer, run.policy.parameters(), lr, limit)
    run.skipped = 0 if stepped else run.skipped + 1
    if run.skipped == run.config.optim.max_skipped:
        run.ranks.raise_on_all(
            ValueError(
                f"step {run.steps_done + 1}: the gradient was not finite {run.skipped} times in a "
                "row (optim.max_skipped): lower optim.lr, or look at the last groups"
            )
        )
    figures = {name: float(value) for name, value in sums.items()}
    figures |= {"lr": lr, "skipped_steps": float(not stepped)}
    return figures | ({"grad_norm": norm} if stepped else {})


def mean_figures(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean over the mini-batches that have a figure."""
    names = dict.fromkeys(name for update in updates for name in update)
    values = {name: [u[name] for u in updates if name in u] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}
