"""The benchmark of whole steps: TRL and ours train one thing, and rows say what was measured."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny

from tercet.bench import whole_step, whole_step_case
from tercet.bench.whole_step_case import Fixed, PeakMemory, Taken, Work
from tercet.train import make_triplets

WORK = Work("tiny", groups=2, responses=4, tokens=12, lr=1e-3, micro_batch_tokens=1024)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random policy, and triplets of noise photos of different sizes."""
    root = tmp_path_factory.mktemp("whole step")  # a name with a space
    rng = np.random.default_rng(0)
    for name in ("red_bird", "blue_bird", "grey_bird", "pink_bird"):
        (root / "photos" / "bird" / name).mkdir(parents=True)
        for n in range(5):
            pixels = rng.integers(0, 255, (*rng.integers(40, 110, 2), 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "photos" / "bird" / name / f"{n}.png")
    tiny().save(root / "start")
    argv = f"--data.shots=3 --data.sft_shots=1 --out={root / 'triplets'}".split(" --")
    argv = ["make_triplets", argv[0], *(f"--{one}" for one in argv[1:])]
    argv += [f"--data.path={root / 'photos'}", f"--model.path={root / 'start'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        make_triplets.main()
    return root


@pytest.fixture(scope="module")
def trl(folder):
    pytest.importorskip("trl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        from tercet.bench import whole_step_trl

        yield whole_step_trl


def test_both_trainers_have_one_gradient(folder, trl, tmp_path):
    ours = whole_step_case.fixed_ours(WORK, folder, tmp_path / "ours")
    theirs = trl.fixed_trl(WORK, folder, tmp_path / "trl", 2)
    assert {len(ids) for ids in ours.prompt_ids} != {len(ours.prompt_ids[0])}  # they are padded
    found = whole_step.compare(ours, theirs)
    assert found["prompt_ids"] and found["pixels"] and not found["without_gradient"]
    assert found["grad_error"] < 1e-5 and whole_step.check(found) == ""
    assert found["update_error"] < 1e-3
    assert max(update.abs().max() for update in ours.updates.values()) > WORK.lr
    assert max(gradient.abs().max() for gradient in ours.gradients.values()) > 1e-3


def test_both_trainers_take_steps(folder, trl, tmp_path):
    taken = {
        "ours": whole_step_case.train_ours(WORK, folder, tmp_path / "ours", 2, 0),
        "trl": trl.train_trl(WORK, folder, tmp_path / "trl", 2, 0, 4),
    }
    for name, one in taken.items():
        assert len(one.seconds) == len(one.tokens) == len(one.rewards) == 2, name
        for step in zip(one.seconds, one.sampling, one.reward, one.update, strict=True):
            assert min(step) > 0 and sum(step[1:]) <= step[0], name
        assert min(one.cpu) > 0, name
        assert all(8 <= tokens <= 8 * 12 for tokens in one.tokens), name
        assert one.start_mib > 50 and one.peak_mib >= 0, name


def test_what_differs_is_said():
    weights = {"a": torch.ones(4), "b": torch.ones(2)}
    one = Fixed([[1, 2]], [torch.ones(2, 3)], weights, weights)
    same = whole_step.compare(one, one)
    assert whole_step.check(same) == "" and same["grad_error"] == same["update_error"] == 0
    moved = weights | {"a": torch.full((4,), 1.5)}
    steep, far = replace(one, gradients=moved), replace(one, updates=moved)
    assert whole_step.compare(steep, one)["grad_error"] == pytest.approx(0.5)
    assert whole_step.compare(far, one)["update_error"] == pytest.approx((1 / 6) ** 0.5)
    for other, what in (
        (steep, "over the gate of 0.0001: gradients differ by 0.5"),
        (far, "over the gate of 0.001: updates differ by 0.4"),
        (replace(one, gradients={"a": torch.ones(4)}), "only one gives a gradient to b"),
        (replace(one, pixels=[torch.zeros(2, 3)]), "pixels differ"),
        (replace(one, prompt_ids=[[1, 3]]), "prompt ids differ"),
    ):
        assert whole_step.check(whole_step.compare(other, one)) == what


def taken_with(seconds: float, peak: float) -> Taken:
    """A slow warm-up, and two steps that take as long as is said."""
    step = [9.0, seconds, seconds]
    shares = ([share * s for s in step] for share in (0.8, 0.5, 0.1, 0.3))
    return Taken(step, *shares, [1.0, 100.0, 140.0], [0.0, 0.5, 0.5], 300.0, peak)


def test_rows_are_of_the_steps_behind_the_warm_up(monkeypatch):
    found = {
        ("ours", 1024): taken_with(1.0, 50.0),
        ("trl", 1): taken_with(8.0, 100.0),
        ("trl", 8): taken_with(4.0, 200.0),
    }

    def run_child(options, method, micro_batch, steps, seed):
        assert steps == 3
        if (method, micro_batch) == ("trl", 4):
            raise RuntimeError("no room")
        return asdict(found[method, micro_batch])

    monkeypatch.setattr(whole_step, "run_child", run_child)
    options = SimpleNamespace(python="", micro_batches=[1, 4, 8], rounds=2, steps=2)
    ours, one, four, eight = whole_step.time_all(options, WORK, 1e-6)
    assert (ours.steps, ours.s_per_step, ours.step_tokens, ours.tokens_per_s) == (4, 1, 120, 120)
    phases = (ours.sampling_s, ours.reward_s, ours.update_s, ours.other_s)
    assert phases == pytest.approx((0.5, 0.1, 0.3, 0.1))
    assert (ours.ratio, ours.cpu_ratio, ours.memory_ratio) == (4.0, 4.0, 0.5)
    assert (ours.cpu_s_per_step, ours.tokens_per_cpu_s) == pytest.approx((0.8, 150))
    assert (one.ratio, eight.ratio, eight.memory_ratio) == (0.5, 1.0, 2.0)
    assert four.s_per_step is None and four.note == "RuntimeError: no room"
    assert "no room" in whole_step.show(four) and "4.00x" in whole_step.show(ours)


def test_rewards_are_compared_in_standard_errors():
    ours, theirs = (0.5, 0.6, 0.7), (0.4, 0.5, 0.6)
    rows = [whole_step.RewardRow("ours", "tiny", n, 40, 0.1, x) for n, x in enumerate(ours)]
    rows += [whole_step.RewardRow("trl", "tiny", n, 40, 0.1, x) for n, x in enumerate(theirs)]
    assert whole_step.standard_errors(rows) == pytest.approx(0.1 / (2 * 0.01 / 3) ** 0.5)


def test_peak_memory_is_above_the_start(tmp_path):
    status, reset = tmp_path / "status", tmp_path / "reset"
    status.write_text("Name:\tpython\nVmHWM:\t 9000 kB\nVmRSS:\t 2048 kB\n")
    memory = PeakMemory(str(status), str(reset))
    assert reset.read_text() == "5" and memory.start_mib == 2
    status.write_text("VmHWM:\t 5120 kB\nVmRSS:\t 2048 kB\n")
    assert memory.above_mib() == 3
