"""Checkpoints of a run's state: in the background, the best kept, nothing lost on a full disk."""

from __future__ import annotations

import errno
import resource
import threading
from types import SimpleNamespace

import pytest
import torch
from support import tiny

from tercet.core.config import ModelConfig, OptimConfig, ParallelConfig, RunConfig
from tercet.core.models import load_policy
from tercet.train.learner import saving
from tercet.train.learner.checkpoint import find_checkpoint, load_state
from tercet.train.learner.lora import add_lora
from tercet.train.learner.optim import build_optimizer
from tercet.train.learner.policy import Policy
from tercet.train.learner.ranks import Ranks
from tercet.train.learner.saving import Saver

pytestmark = pytest.mark.core


def trained(lora_rank: int = 0) -> SimpleNamespace:
    """A policy that has taken one step."""
    parts = tiny()
    if lora_rank:
        add_lora(parts.model, ModelConfig(lora_rank=lora_rank))
    policy = Policy(parts)
    optimizer = build_optimizer(policy.model.named_parameters(), OptimConfig(lr=1e-2))
    run = SimpleNamespace(
        parts=parts,
        policy=policy,
        optimizer=optimizer,
        ranks=Ranks(torch.device("cpu"), ParallelConfig()),
    )
    step(run)
    return run


def step(run) -> None:
    for number, parameter in enumerate(run.policy.parameters()):
        if parameter.requires_grad:
            noise = torch.Generator().manual_seed(number)
            parameter.grad = torch.randn(parameter.shape, generator=noise)
    run.optimizer.step()


def states(run) -> dict[str, dict[str, torch.Tensor]]:
    return {
        name: {kind: value.clone() for kind, value in run.optimizer.state[parameter].items()}
        for name, parameter in run.policy.named_parameters()
        if parameter.requires_grad
    }


def folders(out) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_states_come_back_from_several_files(tmp_path, monkeypatch, lora_rank):
    monkeypatch.setattr(saving, "FILE_BYTES", 30_000)
    run, config = trained(lora_rank), RunConfig(out=str(tmp_path))
    folder = Saver(run, config).save(1, {"steps_done": 1})
    assert len(list((folder / "sharded").iterdir())) > 2
    fresh, state = trained(lora_rank), load_state(folder)
    step(fresh)  # its states differ now
    Saver(fresh, config).restore(folder, state)
    assert state["steps_done"] == 1
    for name, expected in states(run).items():
        found = states(fresh)[name]
        assert found.keys() == expected.keys()
        for kind, value in expected.items():
            assert torch.equal(found[kind], value) and found[kind].dtype == value.dtype
    if lora_rank:  # additions are not in the export: they come back as well
        added = zip(run.policy.named_parameters(), fresh.policy.parameters(), strict=True)
        assert all(torch.equal(ours, theirs) for (name, ours), theirs in added if "lora" in name)


def test_in_the_background_it_writes_what_was_there_when_asked(tmp_path, monkeypatch):
    run, config = trained(), RunConfig(out=str(tmp_path), async_save=True)
    before, weights = states(run), {n: p.clone() for n, p in run.policy.named_weights()}
    may_write, save_checkpoint = threading.Event(), saving.save_checkpoint

    def late(*arguments):
        assert may_write.wait(30)
        return save_checkpoint(*arguments)

    monkeypatch.setattr(saving, "save_checkpoint", late)
    saver, groups = Saver(run, config), ["a group"]
    folder = saver.save(1, {"groups": groups})
    assert not folder.exists()
    step(run)
    groups.clear()
    may_write.set()
    saver.wait()
    assert find_checkpoint(tmp_path, "auto") == folder
    written = dict(load_policy(ModelConfig(path=str(folder))).model.named_parameters())
    assert all(torch.equal(written[name], weight) for name, weight in weights.items())
    state = load_state(folder)
    assert state["groups"] == ["a group"]
    saver.restore(folder, state)
    for name, expected in before.items():
        assert all(torch.equal(states(run)[name][k], v) for k, v in expected.items())
    saver.close()


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("limit", [100_000, 700_000], ids=["shards", "weights"])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, in_background, limit, monkeypatch):
    """The operating system refuses files over a limit."""
    monkeypatch.setattr(saving, "FILE_BYTES", limit if limit < 500_000 else 200_000)
    run = trained()
    saver = Saver(run, RunConfig(out=str(tmp_path), async_save=in_background, keep_last=1))
    first = saver.save(1, {})
    saver.wait()
    assert (first / "model.safetensors").stat().st_size > limit
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match="step_000002 could not be written") as caught:
            saver.save(2, {})
            saver.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert find_checkpoint(tmp_path, "auto") == first
    saver.save(3, {})
    saver.wait()
    assert folders(tmp_path) == ["step_000003"]
    saver.close()


def test_the_best_is_kept_also_after_a_restart(tmp_path):
    run = trained()
    config = RunConfig(out=str(tmp_path), keep_last=1, keep_best="accuracy")
    saver = Saver(run, config)
    for number, accuracies in enumerate([(0.1, 0.3), (0.5, 0.4), (0.9, -0.9)], start=1):
        for accuracy in accuracies:
            saver.note({"accuracy": accuracy, "reward": 9.0})
        folder = saver.save(number, {})
    assert folders(tmp_path) == ["step_000002", "step_000003"]
    saver = Saver(run, config)
    saver.restore(folder, load_state(folder))
    saver.note({"accuracy": 0.44})
    saver.save(4, {})
    assert folders(tmp_path) == ["step_000002", "step_000004"]
    saver.note({"accuracy": 0.46})
    saver.save(5, {})
    assert folders(tmp_path) == ["step_000005"]


def test_a_figure_that_is_not_there_is_named(tmp_path):
    saver = Saver(trained(), RunConfig(out=str(tmp_path), keep_best="acuracy"))
    with pytest.raises(ValueError, match=r"keep_best is 'acuracy'.*accuracy, reward"):
        saver.note({"accuracy": 0.1, "reward": 0.2})


def test_states_of_other_parameters_are_named(tmp_path):
    run, config = trained(4), RunConfig(out=str(tmp_path))
    folder = Saver(run, config).save(1, {})
    with pytest.raises(ValueError, match=r"step_000001 holds \S+lora_A\S+ \[4, \d+\], which"):
        Saver(trained(), config).restore(folder, load_state(folder))
