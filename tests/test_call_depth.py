"""How deep the code lies: functions of ours between the step and the model."""

from __future__ import annotations

import traceback
from pathlib import Path

from test_tapo import by_length, options
from test_tapo import workspace as workspace  # a fixture

from tercet.core.config import TapoConfig
from tercet.train import tapo
from tercet.train.cli.command_line import parse

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"core", "kernels", "rollout", "train", "bench"}


def ours_since_step() -> list[str]:
    """Functions of ours on the stack, from the step inwards."""
    names = [
        frame.name
        for frame in traceback.extract_stack()
        if Path(frame.filename).resolve().is_relative_to(ROOT)
        and Path(frame.filename).resolve().relative_to(ROOT).parts[0] in ROOMS
    ]
    return names[names.index("step") + 1 :] if "step" in names else []


def test_at_most_two_functions_between_step_and_model(monkeypatch, workspace, tmp_path):
    """Old log-probs, the negative's at the start of the step, and the update itself."""
    chains = set()
    build_policy = tapo.build_policy

    def watched(*arguments):
        policy = build_policy(*arguments)
        model = policy.model.model.language_model
        model.register_forward_pre_hook(lambda *_: chains.add(tuple(ours_since_step())))
        return policy

    monkeypatch.setattr(tapo, "build_policy", watched)
    monkeypatch.setattr(tapo, "load_reward", lambda spec: by_length)
    argv = options(workspace, tmp_path, "--run.steps=1", "--run.preset=released")
    config, _, resolved = parse(TapoConfig, argv, "")
    tapo.train(config, resolved)
    trained = {chain for chain in chains if "_sample" not in chain and chain}
    assert {chain[-1] for chain in trained} == {"forward"} and len(trained) == 2
    assert all(len(chain) <= 2 for chain in trained), trained
