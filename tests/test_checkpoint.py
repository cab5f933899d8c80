import errno
import json
import random
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from tercet.core.config import OptimConfig
from tercet.core.types import Group, Response, Triplet
from tercet.train.learner.checkpoint import (
    find_checkpoint,
    load_state,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from tercet.train.learner.optim import build_optimizer, optimizer_step

pytestmark = pytest.mark.core


def save_model(folder):
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    (folder / "processor").mkdir()
    (folder / "processor" / "size.json").write_text("{}")


def save(out, step, keep_last=9, **options):
    return save_checkpoint(out, step, save_model, {"step": step}, keep_last, **options)


def names(out):
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def a_group():
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
    assert load_state(folder) == {"step": 20}


def test_groups_random_numbers_and_optimizer_come_back_as_they_were(tmp_path):
    param = Parameter(torch.randn(9).bfloat16())
    optimizer = build_optimizer([("w", param)], OptimConfig())
    param.grad = torch.randn(9).bfloat16()
    optimizer_step(optimizer, [param], 1e-3, 1.0)
    group = a_group()
    state = {
        "groups": [group],
        "rng": rng_state(),
        "optimizer": optimizer.state_dict(),
        "position": {"epoch": 2, "order": [4, 1, 3]},
    }
    drawn = (torch.rand(3), np.random.rand(3), random.random(), np.random.randn(), random.gauss())
    loaded = load_state(save_checkpoint(tmp_path, 1, save_model, state, 1))

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
        save_checkpoint(tmp_path, 2, save_model, {"where": Path("x")}, 2)
    assert names(tmp_path) == ["step_000001"]


def test_those_written_longest_ago_are_removed_but_the_best_stays(tmp_path):
    for step in (2, 4, 6, 8):
        save(tmp_path, step, keep_last=2, best=2)
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


def test_the_same_step_is_replaced(tmp_path):
    save(tmp_path, 3)
    folder = save_checkpoint(tmp_path, 3, save_model, {"step": "again"}, 1)
    assert load_state(folder) == {"step": "again"}
    assert names(tmp_path) == ["step_000003"]


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
            save_checkpoint(tmp_path, 2, save_full, {}, 1)
        assert caught.value.errno == errno.ENOSPC
        assert names(tmp_path) == ["step_000001"]
    assert find_checkpoint(tmp_path, "auto") == first


def test_an_error_of_the_models_own_is_passed_on(tmp_path):
    def broken(folder):
        raise KeyError("lm_head")

    with pytest.raises(KeyError, match="lm_head"):
        save_checkpoint(tmp_path, 2, broken, {}, 1)
    assert names(tmp_path) == []


def test_an_interrupted_write_is_cleared_by_the_next_one(tmp_path):
    first = save(tmp_path, 1)

    def interrupted(folder):
        save_model(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, interrupted, {}, 1)
    assert names(tmp_path) == [".step_000002.partial", "step_000001"]
    assert find_checkpoint(tmp_path, "auto") == first
    save(tmp_path, 3)
    assert names(tmp_path) == ["step_000001", "step_000003"]


@pytest.mark.parametrize("renames", [0, 1])
def test_killed_while_replacing_a_step_the_old_one_is_found(tmp_path, monkeypatch, renames):
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
            save_checkpoint(tmp_path, 7, save_model, {"step": "new"}, 1)
    assert load_state(find_checkpoint(tmp_path, "auto")) == {"step": 7}
    save(tmp_path, 8)
    assert names(tmp_path) == ["step_000007", "step_000008"]
    assert load_state(tmp_path / "checkpoints" / "step_000007") == {"step": 7}
