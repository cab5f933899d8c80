"""How a training run logs, clips and ends: what TAPO and stage 1 do alike."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tercet.core.config import SftConfig, TapoConfig
from tercet.core.packing import Piece
from tercet.core.rewards import read_apart
from tercet.core.rollout_config import LEAST_STEPS
from tercet.core.types import PolicyParts
from tercet.rollout.step_groups import StepGroups
from tercet.train.cli.arguments import options_of as types_of
from tercet.train.cli.interrupt import Interrupted
from tercet.train.learner.merged import lora_figures
from tercet.train.learner.optim import HALF_UPDATED, Schedule, optimizer_step
from tercet.train.learner.policy import Policy
from tercet.train.learner.ranks import Ranks
from tercet.train.logs.environment import peak_memory_gib, write_environment
from tercet.train.logs.run_log import Phase, RunLog, SilentLog
from tercet.train.logs.trackers import Trackers
from tercet.train.run.checkpoint import Checkpoints
from tercet.train.run.failed import set_aside
from tercet.train.run.identity import shared_options
from tercet.train.run.run_folder import RunFolder


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
    schedule: Schedule
    steps_done: int
    total_steps: int
    working_on: Sequence[Piece]
    """What an update of TAPO works on right now; empty in between, and in stage 1."""

    def save(self, keep: int = 0) -> Path: ...


def open_log(run: Run, resolved: str) -> RunLog | SilentLog:
    """The run's log on rank 0, at its next step; elsewhere one that says nothing. A collective."""

    def make() -> RunLog:
        run.folder.write()
        options = run.config.run
        shared = shared_options(run.folder.identity.options, types_of(type(run.config)))
        trackers = Trackers(options.log_to, options.project, Path(options.out), shared)
        shown = options.log_to, trackers, options.verbose
        log = RunLog(options.out, run.total_steps, resolved, *shown)
        for line in run.folder.lines:
            log.say(line)
        log.resume_at(run.steps_done + 1)
        write_environment(log.out, run.ranks.device, run.ranks.size, run.total_steps)
        log.say(f"attention: {run.policy.attention}")
        return log

    return run.ranks.on_first(make) or SilentLog()


@contextmanager
def saved_on_error(run: Run) -> Iterator[None]:
    """Write a checkpoint before any exception goes on.

    It is the state after the last whole optimiser step. After an error in an update it is without
    the groups of the mini-batch that failed (see failed.set_aside), and no earlier checkpoint is
    removed for it.

    Not saved from are an exception that came to some ranks only, as the others wait elsewhere, and
    one that came out of the optimiser's own step.
    """
    try:
        yield
    except BaseException as error:
        if HALF_UPDATED in getattr(error, "__notes__", ()):
            run.log.say(HALF_UPDATED)
        elif run.ranks.size == 1 or error is run.ranks.raised_on_all:
            _save_from(run, error)
        raise


def _save_from(run: Run, error: BaseException) -> None:
    """Save after an exception; one that comes meanwhile is told and does not hide the first."""
    stopped, aside = isinstance(error, Interrupted), ""
    try:
        if not stopped:
            aside = set_aside(run, error)
        folder = run.save(keep=0 if stopped else sys.maxsize)
        run.checkpoints.wait()
    except Exception as second:
        run.log.say(f"no checkpoint after {run.steps_done} steps: {second}")
        return
    said = f"checkpoint after {run.steps_done} steps: {folder}"
    if stopped:
        error.saved = f"{said}; --resume auto goes on from it"
    else:
        run.log.say(said + aside)


def finish_step(run: Run, figures: dict[str, float]) -> Path | None:
    """Log a step, and save it where one is due; returns the checkpoint's folder."""
    figures = figures | lora_figures(run.policy, run.ranks)
    figures["peak_mem_gib"] = peak_memory_gib(run.ranks.device)
    run.ranks.share(run.folder.check)
    try:
        run.log.step(run.steps_done, figures)  # before anything else can fail
    except Exception as error:  # what only reports does not end training, on one rank least of all
        run.log.say(f"step {run.steps_done} is not in the log: {error}")
    run.checkpoints.note(figures)
    options, last = run.config.run, run.steps_done == run.total_steps
    if run.checkpoints.best.stale and not last:
        said = f"{options.stop_after} values of {options.keep_best} without a new best"
        run.log.say(f"step {run.steps_done} is the last: {said} (run.stop_after)")
        last = True
    if not last and run.steps_done % options.save_every:
        return None
    folder = run.save()
    run.log.say(f"checkpoint after step {run.steps_done}: {folder}")
    return folder


def add_up(sums: dict[str, Tensor], metrics: dict[str, Tensor]) -> None:
    """Add a micro-batch's metrics to those of the mini-batch, without waiting for the device."""
    for name, value in metrics.items():
        sums[name] = sums[name] + value if name in sums else value


def clip_and_step(run: Run, lr: float, sums: dict[str, Tensor]) -> dict[str, float]:
    """Take the optimiser step that a mini-batch's gradients ask for; returns its finite figures.

    After the weights have changed nothing in here fails.

    Args:
        run: its policy has the gradients of this rank, summed over micro-batches.
        lr: learning rate.
        sums: this rank's loss and metrics.

    Raises:
        ValueError: for the max_skipped-th time in a row the gradient is not finite.
    """
    sums = {name: float(value) for name, value in run.ranks.add(sums).items()}
    limit = run.config.optim.max_grad_norm
    norm, stepped = optimizer_step(run.optimizer, run.policy.parameters(), lr, limit)
    run.schedule.taken += stepped
    run.skipped = 0 if stepped else run.skipped + 1
    if run.skipped == run.config.optim.max_skipped:
        run.ranks.raise_on_all(
            ValueError(
                f"step {run.steps_done + 1}: the gradient was not finite {run.skipped} times in a "
                "row (optim.max_skipped): lower optim.lr, or look at the last groups"
            )
        )
    figures = {name: value for name, value in sums.items() if math.isfinite(value)}
    if {"entropy", "neg_entropy"} <= figures.keys() and run.config.loss.needs_negative:
        figures["margin"] = figures["neg_entropy"] - figures["entropy"]
    figures |= {"lr": lr, "skipped_steps": float(not stepped)}
    return figures | ({"grad_norm": norm} if stepped else {})


def mean_figures(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean over the mini-batches that have a figure."""
    names = dict.fromkeys(name for update in updates for name in update)
    values = {name: [u[name] for u in updates if name in u] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}


def report_end(run: Run, draw: Callable[[], None]) -> None:
    """Draw the figures of a finished run on rank 0; where that fails, say why."""
    if run.ranks.is_first:
        try:
            draw()
            run.log.picture("samples", run.folder.path / "samples.png")
        except Exception as error:
            run.log.say(f"the figures of the run are not drawn: {error}")


def sampling_progress(run: Run, phase: Phase) -> Callable[[int, StepGroups], None]:
    """What a TAPO run does while it samples: moves the bar, and stops where it is told to.

    Once a step it says that none of the first `groups_per_step` groups passed: a reward that ties
    every group is noticed before the last round.
    """
    said = False

    def progress(responses: int, so_far: StepGroups) -> None:
        nonlocal said
        phase.advance(responses, so_far.kept)
        if not (said or so_far.groups_kept):
            said = so_far.groups_done >= run.config.rollout.groups_per_step
            if said:
                run.log.say(f"step {run.steps_done + 1}: {so_far.kept} so far")
        run.stop.check()

    return progress


def settle(config: TapoConfig, parts: PolicyParts, anchors: int, saved: Mapping) -> int:
    """Put numbers in the place of a run's `auto` options, and say how many steps it has.

    Args:
        config: changed in place.
        parts: the policy, before LoRA is added.
        anchors: of the run.
        saved: trainer state of the checkpoint that the run goes on from, whose groups a step it
            keeps; empty for a new run.

    Returns:
        Rollout steps of the whole run.
    """
    rollout, groups = config.rollout, anchors * config.run.epochs
    if rollout.groups_per_step == "auto":
        rollout.groups_per_step = saved.get("groups_per_step", "auto")
    rollout.settle(sum(parameter.numel() for parameter in parts.model.parameters()), groups)
    return config.run.steps or max(1, groups // rollout.groups_per_step)


def length_lines(config: TapoConfig, steps: int, time: str) -> list[str]:
    """How long a run is, and a warning where that is too short to change much.

    Args:
        config: every option, settled.
        steps: rollout steps of the whole run.
        time: how long it is likely to take, in words.
    """
    rollout, groups = config.rollout, config.rollout.groups_per_step
    size = config.optim.groups_per_minibatch or groups
    updates = steps * math.ceil(groups / size)
    responses = steps * groups * (rollout.n_anchor + rollout.n_positive)
    counts = f"{updates:,} optimiser steps, {responses:,} responses; {time}"
    lines = [f"{steps:,} steps of {groups:,} groups: {counts}"]
    if updates < LEAST_STEPS:
        lines.append(
            f"{updates} optimiser steps are few (under {LEAST_STEPS}) at optim.lr "
            f"{config.optim.lr:g}: lower rollout.groups_per_step, or raise run.epochs"
        )
    return lines


def announce(run: Run, sampled: PolicyParts, time: str) -> None:
    """Say what is to be known at a TAPO run's start: of its data, its reward and its sampler.

    Args:
        run: a TAPO run.
        sampled: what rank 0 samples from, where it samples in this process.
        time: how long it is likely to take, in words.
    """
    config = run.config
    names = [name for of_super in run.manifest.names.values() for name in of_super]
    lines = [*run.manifest.remarks(), read_apart(config.rollout.reward, names)]
    lines += [*length_lines(config, run.total_steps, time), config.loss.works_against_kl]
    if sampled is not run.parts:
        lines.append("rank 0 samples on a whole copy of the policy")
    for line in filter(None, lines):
        run.log.say(line)
