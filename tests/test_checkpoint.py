"""Checkpoints: whole or not there, never replaced; in the background, the best kept, also when the
disk is full or the run is interrupted."""

from __future__ import annotations

import errno
import json
import random
import resource
import shutil
import threading
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import tiny
from torch import nn
from torch.nn import Parameter

from tercet.core.config import ModelConfig, OptimConfig, ParallelConfig, RunConfig
from tercet.core.models import load_policy
from tercet.core.types import Group, Response, Triplet
from tercet.train.learner.device import rng_state, set_rng_state
from tercet.train.learner.lora import add_lora
from tercet.train.learner.optim import build_optimizer, optimizer_step
from tercet.train.learner.policy import Policy
from tercet.train.learner.ranks import Ranks
from tercet.train.run import checkpoint
from tercet.train.run.checkpoint import Checkpoints, find_checkpoint, load_state

pytestmark = pytest.mark.core


def save_model(folder):
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    (folder / "processor").mkdir()
    (folder / "processor" / "size.json").write_text("{}")


def without_weights(write=save_model) -> SimpleNamespace:
    """A run that trains nothing; `write` writes its model."""
    return SimpleNamespace(
        parts=SimpleNamespace(save=lambda folder, weights: write(folder)),
        policy=SimpleNamespace(model=nn.Module(), named_weights=lambda: iter(())),
        optimizer=SimpleNamespace(zero_grad=lambda set_to_none: None, state={}, defaults={}),
        ranks=Ranks(torch.device("cpu"), ParallelConfig()),
    )


def save(out, step, keep_last=9, write=save_model, state=None) -> Path:
    config = RunConfig(out=str(out), keep_last=keep_last)
    return Checkpoints(without_weights(write), config).save(step, state or {"step": step})


def names(out) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def a_group() -> Group:
    triplet = Triplet("t7", "a.jpg", "p.jpg", "n.jpg", "Which bird?", "bird", "least auklet")
    scored = Response(
        role="positive",
        token_ids=(5, 7, 2),
        rollout_logprobs=(-0.5, -1.25, -0.1),
        finish_reason="stop",
        weight_version=3,
        text="<answer>least auklet</answer>",
        reward=0.9,
        advantage=-0.25,
        metrics={"accuracy": 1.0},
        old_logprobs=torch.tensor([-0.4, -1.0, -0.2]),
    )
    return Group("g7", triplet, (1, 2, 3), [scored, Response("anchor", (), (), "length", 2)])


def test_a_checkpoint_holds_model_state_and_a_checked_list_of_files(tmp_path):
    folder = save(tmp_path, 20)
    assert folder == tmp_path / "checkpoints" / "step_000020"
    assert names(tmp_path) == ["step_000020"]
    complete = json.loads((folder / "complete.json").read_text())
    files = {"config.json", "processor/size.json", "trainer_state.pt"}
    assert complete["step"] == 20 and set(complete["files"]) == files
    for name, entry in complete["files"].items():
        content = (folder / name).read_bytes()
        assert entry == {"size": len(content), "crc32": zlib.crc32(content)}
    assert load_state(folder)["step"] == 20


def test_groups_random_numbers_and_optimizer_come_back_as_they_were(tmp_path):
    param = Parameter(torch.randn(9).bfloat16())
    optimizer = build_optimizer([("w", param)], OptimConfig())
    param.grad = torch.randn(9).bfloat16()
    optimizer_step(optimizer, [param], 1e-3, 1.0)
    group = a_group()
    state = {
        "groups": [group],
        "optimizer": optimizer.state_dict(),
        "position": {"epoch": 2, "order": [4, 1, 3]},
    }
    folder = save(tmp_path, 1, state=state)
    drawn = (torch.rand(3), np.random.rand(3), random.random(), np.random.randn(), random.gauss())
    loaded = load_state(folder)

    set_rng_state(loaded["rng"])
    again = (torch.rand(3), np.random.rand(3), random.random(), np.random.randn(), random.gauss())
    assert torch.equal(again[0], drawn[0]) and np.array_equal(again[1], drawn[1])
    assert again[2:] == drawn[2:]

    assert loaded["position"] == {"epoch": 2, "order": [4, 1, 3]}
    (copy,) = loaded["groups"]
    old_logprobs = copy.responses[0].old_logprobs
    assert torch.equal(old_logprobs, torch.tensor([-0.4, -1.0, -0.2]))
    copy.responses[0].old_logprobs = group.responses[0].old_logprobs
    assert copy == group and copy.triplet is not group.triplet
    for name, value in optimizer.state_dict()["state"][0].items():
        assert torch.equal(loaded["optimizer"]["state"][0][name], value)
        assert loaded["optimizer"]["state"][0][name].dtype == value.dtype


def test_a_gaussian_kept_back_by_numpy_and_python_is_part_of_the_state():
    np.random.seed(0)
    random.seed(0)
    np.random.randn(), random.gauss()  # both now hold a second number
    state = rng_state()
    drawn = np.random.randn(), random.gauss()
    np.random.rand(50), random.random()
    set_rng_state(state)
    assert (np.random.randn(), random.gauss()) == drawn


def test_a_state_that_could_not_be_loaded_is_refused_when_it_is_saved(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(TypeError, match=r"pathlib.*allowed are plain values"):
        save(tmp_path, 2, state={"where": Path("x")})
    assert names(tmp_path) == ["step_000001"]


def test_those_written_longest_ago_are_removed_but_the_best_stays(tmp_path):
    config = RunConfig(out=str(tmp_path), keep_last=2, keep_best="accuracy")
    saver = Checkpoints(without_weights(), config)
    for step in (2, 4, 6, 8):
        saver.note({"accuracy": 1 / step})
        saver.save(step, {})
    assert names(tmp_path) == ["step_000002", "step_000006", "step_000008"]
    copy = tmp_path / "checkpoints" / "step_000006_mine"
    shutil.copytree(tmp_path / "checkpoints" / "step_000006", copy)
    save(tmp_path, 10, keep_last=1)
    assert names(tmp_path) == ["step_000006_mine", "step_000010"]
    with pytest.raises(ValueError, match="keep_last must be at least 1, got 0"):
        save(tmp_path, 12, keep_last=0)


def test_after_going_back_to_an_early_step_what_is_written_last_counts(tmp_path):
    for step in (10, 20, 12):
        save(tmp_path, step, keep_last=2)
    assert names(tmp_path) == ["step_000012", "step_000020"]
    assert find_checkpoint(tmp_path, "auto").name == "step_000012"


def test_the_same_step_again_gets_a_folder_of_its_own(tmp_path):
    first = save(tmp_path, 3)
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    second = save(tmp_path, 3, state={"step": "again"})
    assert names(tmp_path) == ["step_000003", "step_000003_2"] and second.name == "step_000003_2"
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    assert find_checkpoint(tmp_path, "auto") == second and load_state(second)["step"] == "again"
    third = save(tmp_path, 3, keep_last=2)
    assert names(tmp_path) == ["step_000003_2", "step_000003_3"]
    assert find_checkpoint(tmp_path, "auto") == third
    fourth = save(tmp_path, 3, keep_last=2)  # the first one's name is free
    assert names(tmp_path) == ["step_000003", "step_000003_3"]
    assert find_checkpoint(tmp_path, "auto") == fourth and fourth.name == "step_000003"


def test_the_best_is_kept_by_its_folder_not_by_its_step(tmp_path):
    config = RunConfig(out=str(tmp_path), keep_last=1, keep_best="accuracy")
    saver = Checkpoints(without_weights(), config)
    for step, accuracy in [(1, 0.5), (1, 0.7), (2, 0.1)]:
        saver.note({"accuracy": accuracy})
        folder = saver.save(step, {})
    assert names(tmp_path) == ["step_000001_2", "step_000002"]
    assert load_state(folder)["best"] == ("step_000001_2", 0.7)


def test_the_best_of_an_earlier_version_is_kept(tmp_path):
    """It stored the step in place of the folder's name."""
    config = RunConfig(out=str(tmp_path), keep_last=1, keep_best="accuracy")
    state = load_state(save(tmp_path, 1)) | {"best": (1, 0.5)}
    saver = Checkpoints(without_weights(), config)
    saver.restore(tmp_path, state)
    for step in (2, 3):
        saver.note({"accuracy": 0.4})
        saver.save(step, {})
    assert names(tmp_path) == ["step_000001", "step_000003"]


def test_one_that_an_earlier_version_had_set_aside_is_found(tmp_path):
    """It was killed between setting the old folder aside and renaming the new one."""
    folder = save(tmp_path, 7)
    aside = folder.rename(folder.with_name(".step_000007.replaced"))
    (folder.parent / ".step_000007.partial").mkdir()
    assert find_checkpoint(tmp_path, "auto") == aside
    save(tmp_path, 8)
    assert names(tmp_path) == [".step_000007.replaced", "step_000008"]
    save(tmp_path, 9, keep_last=2)
    assert names(tmp_path) == ["step_000008", "step_000009"]


def truncate_weights(folder):
    (folder / "config.json").write_text("{")


def change_state(folder):
    content = bytearray((folder / "trainer_state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "trainer_state.pt").write_bytes(content)


def remove_file(folder):
    (folder / "processor" / "size.json").unlink()


def remove_list(folder):
    (folder / "complete.json").unlink()


def truncate_list(folder):
    text = (folder / "complete.json").read_text()
    (folder / "complete.json").write_text(text[: len(text) // 2])


@pytest.mark.parametrize(
    "damage, problem",
    [
        (truncate_weights, "config.json has 1 bytes instead of 22"),
        (change_state, "the checksum of trainer_state.pt does not match"),
        (remove_file, "processor/size.json is missing"),
        (remove_list, "it has no complete.json"),
        (truncate_list, "its complete.json cannot be read"),
    ],
)
@pytest.mark.filterwarnings("ignore:checkpoint")
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(tmp_path, damage, problem):
    first, second = save(tmp_path, 5), save(tmp_path, 10)
    assert find_checkpoint(tmp_path, "auto") == second
    assert find_checkpoint(tmp_path, str(first)) == first
    damage(second)
    with pytest.warns(UserWarning, match=rf"step_000010 is passed over: {problem}"):
        assert find_checkpoint(tmp_path, "auto") == first
    with pytest.raises(ValueError, match=rf"cannot resume from .*step_000010: {problem}"):
        find_checkpoint(tmp_path, second)
    save(tmp_path, 15, keep_last=1)  # goes on beside the damaged one
    assert find_checkpoint(tmp_path, "auto").name == "step_000015"


def test_nothing_to_resume_from(tmp_path):
    assert find_checkpoint(tmp_path, "auto") is None
    with pytest.raises(ValueError, match="cannot resume from .*step_000001: there is no such"):
        find_checkpoint(tmp_path, tmp_path / "checkpoints" / "step_000001")
    with pytest.raises(ValueError, match="holds no trainer_state.pt"):
        load_state(tmp_path)


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    first = save(tmp_path, 1)

    def full(folder):
        (folder / "config.json").write_text("{}")
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_in_rust(folder):
        raise RuntimeError("Error while serializing: I/O error: No space left (os error 28)")

    for save_full in (full, full_in_rust):
        with pytest.raises(OSError, match=r"step_000002 could not be written.*No space") as caught:
            save(tmp_path, 2, 1, save_full)
        assert caught.value.errno == errno.ENOSPC
        assert names(tmp_path) == ["step_000001"]
    assert find_checkpoint(tmp_path, "auto") == first


def test_an_error_of_the_models_own_is_passed_on(tmp_path):
    def broken(folder):
        raise KeyError("lm_head")

    with pytest.raises(KeyError, match="lm_head"):
        save(tmp_path, 2, 1, broken)
    assert names(tmp_path) == []


def test_an_interrupted_write_is_cleared_by_the_next_one(tmp_path):
    first = save(tmp_path, 1)

    def interrupted(folder):
        save_model(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, 1, interrupted)
    assert names(tmp_path) == [".step_000002.partial", "step_000001"]
    assert find_checkpoint(tmp_path, "auto") == first
    save(tmp_path, 3)
    assert names(tmp_path) == ["step_000001", "step_000003"]


def test_an_interrupted_write_is_cleared_by_the_next_run(tmp_path):
    first = save(tmp_path, 1)
    for left in (".step_000002.partial", ".sharded.partial"):  # the second: an earlier version's
        shutil.copytree(first, first.parent / left)
    Checkpoints(without_weights(), RunConfig(out=str(tmp_path)))
    assert names(tmp_path) == ["step_000001"]


@pytest.mark.parametrize(
    "renames, found, left",
    [
        (0, 7, [".step_000007_2.partial", "step_000007"]),
        (1, "new", ["step_000007", "step_000007_2"]),
    ],
    ids=["before it has its name", "before the old one is removed"],
)
def test_killed_while_saving_a_step_again(tmp_path, monkeypatch, renames, found, left):
    save(tmp_path, 7)
    done, rename = [], Path.rename

    def killed_after(path, target):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(path)
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed_after)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 7, 1, state={"step": "new"})
    assert names(tmp_path) == left
    assert load_state(find_checkpoint(tmp_path, "auto"))["step"] == found
    save(tmp_path, 8, keep_last=1)
    assert names(tmp_path) == ["step_000008"]


def test_a_removed_one_is_never_half_there(tmp_path, monkeypatch):
    """An interrupted removal leaves no damaged checkpoint behind."""
    save(tmp_path, 1)

    def killed(path):
        (path / "complete.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, keep_last=1)
    assert names(tmp_path) == [".step_000001.partial", "step_000002"]
    save(tmp_path, 3)
    assert names(tmp_path) == ["step_000002", "step_000003"]


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


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_states_come_back_from_several_files(tmp_path, monkeypatch, lora_rank):
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 30_000)
    run, config = trained(lora_rank), RunConfig(out=str(tmp_path))
    folder = Checkpoints(run, config).save(1, {"steps_done": 1})
    assert len(list((folder / "sharded").iterdir())) > 2
    fresh, state = trained(lora_rank), load_state(folder)
    step(fresh)  # its states differ now
    Checkpoints(fresh, config).restore(folder, state)
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
    may_write, write = threading.Event(), Checkpoints._write

    def late(*arguments):
        assert may_write.wait(300)
        return write(*arguments)

    monkeypatch.setattr(Checkpoints, "_write", late)
    saver, groups = Checkpoints(run, config), ["a group"]
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
    monkeypatch.setattr(checkpoint, "FILE_BYTES", limit if limit < 500_000 else 200_000)
    run = trained()
    saver = Checkpoints(run, RunConfig(out=str(tmp_path), async_save=in_background, keep_last=1))
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
    assert names(tmp_path) == ["step_000003"]
    saver.close()


def test_the_best_is_kept_also_after_a_restart(tmp_path):
    run = trained()
    config = RunConfig(out=str(tmp_path), keep_last=1, keep_best="accuracy")
    saver = Checkpoints(run, config)
    for number, accuracies in enumerate([(0.1, 0.3), (0.5, 0.4), (0.9, -0.9)], start=1):
        for accuracy in accuracies:
            saver.note({"accuracy": accuracy, "reward": 9.0})
        folder = saver.save(number, {})
    assert names(tmp_path) == ["step_000002", "step_000003"]
    saver = Checkpoints(run, config)
    saver.restore(folder, load_state(folder))
    saver.note({"accuracy": 0.44})
    saver.save(4, {})
    assert names(tmp_path) == ["step_000002", "step_000004"]
    saver.note({"accuracy": 0.46})
    saver.save(5, {})
    assert names(tmp_path) == ["step_000005"]


def test_a_figure_that_is_not_there_is_named(tmp_path):
    saver = Checkpoints(trained(), RunConfig(out=str(tmp_path), keep_best="acuracy"))
    with pytest.raises(ValueError, match=r"keep_best is 'acuracy'.*accuracy, reward"):
        saver.note({"accuracy": 0.1, "reward": 0.2})


def test_states_of_other_parameters_are_named(tmp_path):
    run, config = trained(4), RunConfig(out=str(tmp_path))
    folder = Checkpoints(run, config).save(1, {})
    with pytest.raises(ValueError, match=r"step_000001 holds \S+lora_A\S+ \[4, \d+\], which"):
        Checkpoints(trained(), config).restore(folder, load_state(folder))
