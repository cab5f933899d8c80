"""The outer loop of a training command: steps, checkpoints, and an orderly stop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tercet.core.config import SftConfig, TapoConfig
from tercet.core.types import PolicyParts
from tercet.train.learner.checkpoint import Checkpoints, find_checkpoint
from tercet.train.learner.interrupt import StopSignal
from tercet.train.learner.optim import optimizer_step
from tercet.train.learner.policy import Policy
from tercet.train.learner.ranks import Ranks, is_on_all_ranks, on_all_ranks
from tercet.train.learner.run_log import RunLog, SilentLog


class Run(Protocol):
    """What TapoRun and SftRun offer; an exception in `step` leaves a state that can be saved."""

    config: TapoConfig | SftConfig
    parts: PolicyParts
    log: RunLog | SilentLog
    ranks: Ranks
    policy: Policy
    optimizer: torch.optim.Optimizer
    saver: Checkpoints
    skipped: int
    """Optimiser steps skipped in a row."""
    steps_done: int
    total_steps: int

    def check_stop(self) -> None: ...

    def step(self) -> dict[str, float]: ...

    def save(self) -> Path: ...

    def draw(self) -> None: ...

    def close(self) -> None: ...


def run(
    make: Callable[[TapoConfig | SftConfig, str, StopSignal, Path | None], Run],
    config: TapoConfig | SftConfig,
    resolved: str,
    resume: str | None,
) -> Path:
    """Make a run, take it to its last step and draw its figures.

    Args:
        make: TapoRun or SftRun.
        config: every option.
        resolved: the same as YAML, kept beside the run.
        resume: checkpoint folder, `auto`, or None for a new run.

    Returns:
        The folder of the last checkpoint.
    """
    found = find_checkpoint(config.run.out, resume) if resume else None
    with StopSignal() as stop:
        made = make(config, resolved, stop, found)
        with closing(made), made.log:
            saved = run_steps(made, config.run.save_every)
        made.draw()
    return saved or found


def run_steps(run: Run, save_every: int) -> Path | None:
    """Run all steps; save every `save_every`, at the end, and before any exception goes on.

    One that came to some ranks only is not saved from: the others wait elsewhere.

    Returns:
        The last checkpoint; None when there was nothing left to do.
    """
    saved = None
    try:
        while run.steps_done < run.total_steps:
            run.check_stop()
            step, figures = run.steps_done + 1, run.step()
            run.saver.note(figures)
            run.log.step(step, figures)
            if run.steps_done % save_every == 0 or run.steps_done == run.total_steps:
                saved = run.save()
        run.saver.wait()
    except BaseException as error:
        if run.ranks.size == 1 or is_on_all_ranks(error):
            run.log.say(f"checkpoint after {run.steps_done} steps: {run.save()}")
            run.saver.wait()
        raise
    return saved


def add_up(sums: dict[str, Tensor], metrics: dict[str, Tensor]) -> None:
    """Add a micro-batch's metrics to those of the mini-batch, without waiting for the device."""
    for name, value in metrics.items():
        sums[name] = sums[name] + value if name in sums else value


def take_step(run: Run, lr: float, sums: dict[str, Tensor]) -> dict[str, float]:
    """Take the optimiser step that a mini-batch's gradients ask for; returns its figures.

    Raises:
        ValueError: for the max_skipped-th time in a row the gradient is not finite.
    """
    limit = run.config.optim.max_grad_norm
    norm, stepped = optimizer_step(run.optimizer, run.policy.parameters(), lr, limit)
    run.skipped = 0 if stepped else run.skipped + 1
    if run.skipped == run.config.optim.max_skipped:
        raise on_all_ranks(
            ValueError(
                f"step {run.steps_done + 1}: the gradient was not finite {run.skipped} times in a "
                "row (optim.max_skipped): lower optim.lr, or look at the last groups"
            )
        )
    figures = {name: float(value) for name, value in sums.items()}
    figures |= {"lr": lr, "skipped_steps": float(not stepped)}
    return figures | ({"grad_norm": norm} if stepped else {})


def open_log(run: Run, resolved: str) -> RunLog | SilentLog:
    """The run's log on rank 0, at its next step; elsewhere one that says nothing."""
    if not run.ranks.is_first:
        return SilentLog()
    log = RunLog(run.config.run.out, run.total_steps, resolved, run.config.run.wandb)
    log.resume_at(run.steps_done + 1)
    log.say(f"attention: {run.policy.attention}")
    return log
