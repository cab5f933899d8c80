"""Errors at random places of a run, one after the other: it goes on to its end each time.

TERCET_FAULTS says how many runs are disturbed.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch
from ranks_support import OPTIONS, make_workspace

from tercet.core.config import TapoConfig
from tercet.rollout.sampler import GroupSampler
from tercet.train import tapo
from tercet.train.cli.command_line import parse
from tercet.train.learner.policy import Policy
from tercet.train.logs.run_log import RunLog
from tercet.train.run.checkpoint import Checkpoints, find_checkpoint, load_state

RUNS = int(os.environ.get("TERCET_FAULTS", "3"))
STEPS, MINIBATCHES = 3, 2
PLACES = [
    (GroupSampler, "_fill", 60),
    (Policy, "forward", 24),
    (Policy, "accumulate", 18),
    (tapo, "clip_and_step", 6),
    (torch.optim.AdamW, "step", 6),
    (tapo.TapoRun, "_set", 12),
    (tapo.TapoRun, "_sync", 4),
    (RunLog, "step", 3),
    (Checkpoints, "_write", 3),
]
"""Where an error comes, and in how many calls a whole run gets there."""


class Fault(Exception):
    """An error that nothing expects."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("workspace")
    make_workspace(root)
    return root


def disturb(patch: pytest.MonkeyPatch, rng: random.Random) -> str:
    """Let one call of one place fail; returns which."""
    owner, name, most = rng.choice(PLACES)
    left, function = rng.randrange(most), getattr(owner, name)

    def fails(*arguments, **options):
        nonlocal left
        left -= 1
        if left == -1:
            raise Fault(name)
        return function(*arguments, **options)

    patch.setattr(owner, name, fails)
    return name


def attempt(patch: pytest.MonkeyPatch, out: str) -> bool:
    """Run, or go on, to the end; False where the fault ended it."""
    options = [*OPTIONS, f"--run.steps={STEPS}", "--run.save_every=1", f"--run.out={out}"]
    config, _, resolved = parse(TapoConfig, options, "")
    resume = "auto" if find_checkpoint(out, "auto") else None
    try:
        tapo.train(config, resolved, resume)
        return True
    except Fault:
        return False


@pytest.mark.filterwarnings("error:checkpoint")  # none is ever damaged
@pytest.mark.parametrize("number", range(RUNS))
def test_a_run_goes_on_after_errors_anywhere(monkeypatch, workspace, number):
    """Every step has its line (but for an error of the log), and optimiser, schedule and checkpoint
    agree on the steps that were taken: as many as were asked for, less those of failed groups."""
    monkeypatch.chdir(workspace)
    rng, out = random.Random(number), f"faults{number}"
    places, done = [], False
    while not done:
        with monkeypatch.context() as patch:
            if len(places) < 4:
                places.append(disturb(patch, rng))
            done = attempt(patch, out)
    state = load_state(find_checkpoint(out, "auto"))
    assert state["steps_done"] == STEPS and state["groups"] == [], places
    assert STEPS <= state["optimizer_steps"] <= STEPS * MINIBATCHES, places
    assert set(state["updates"].values()) == {state["optimizer_steps"]}, places
    lines = [json.loads(line) for line in (workspace / out / "metrics.jsonl").open()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)) and len(steps) >= STEPS - places.count("step"), places
    assert all("reward" in line and line["skipped_steps"] == 0 for line in lines), places
