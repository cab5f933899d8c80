"""Training on several processes (gloo): the numbers of one process, whatever their count."""

from __future__ import annotations

import base64
import json
import os
import pickle
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks_support import ONE_THREAD, launch, make_workspace
from safetensors.torch import load_file
from support import LENGTH

from tercet.core.config import ParallelConfig
from tercet.train.cli.interrupt import Interrupted
from tercet.train.learner.ranks import Ranks, deal, picklable
from tercet.train.logs.group_files import read_groups, step_files
from tercet.train.run.checkpoint import find_checkpoint


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("workspace")
    make_workspace(root)
    return root


def train(workspace: Path, out: str, ranks: int, *more: str) -> str:
    """Run to the end; returns what was said. One restart is allowed, as users are told to: gloo
    crashed a rank once in a few hundred runs here."""
    done = subprocess.run(
        launch(out, ranks, *more, restarts=1),
        cwd=workspace,
        env=ONE_THREAD,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def figures(
    workspace: Path, out: str, timed=("seconds_", "tokens_per_s", "peak_mem_gib", "mismatch_")
) -> list[dict]:
    rows = [json.loads(line) for line in (workspace / out / "metrics.jsonl").open()]
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


def weights(workspace: Path, out: str, step: int) -> dict[str, torch.Tensor]:
    return load_file(workspace / out / "checkpoints" / f"step_{step:06d}" / "model.safetensors")


def assert_same(workspace: Path, one: str, other: str, steps: int, policy="policy") -> None:
    for row, twin in zip(figures(workspace, one), figures(workspace, other), strict=True):
        for name, value in row.items():
            assert value == pytest.approx(twin[name], rel=1e-4, abs=1e-6), name
    first = load_file(workspace / policy / "model.safetensors")
    ours, theirs = weights(workspace, one, steps), weights(workspace, other, steps)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        moved = (weight - first[name]).abs().max()
        assert (weight - theirs[name]).abs().max() <= 1e-3 * moved + 1e-7, name


def assert_same_groups(workspace: Path, one: str, other: str) -> None:
    """What rank 0 writes of the first step holds the log-probs that the others computed."""
    ours, theirs = (
        read_groups(step_files(workspace / out / "groups")[1])[0] for out in (one, other)
    )
    assert [line["id"] for line in ours] == [line["id"] for line in theirs] and len(ours) == 5
    for line, twin in zip(ours, theirs, strict=True):
        for found, expected in zip(line["responses"], twin["responses"], strict=True):
            assert found["tokens"] == expected["tokens"]
            for name in ("logprobs", "neg_logprobs"):
                values, wanted = (
                    np.frombuffer(base64.b64decode(r[name]), "<f2") for r in (found, expected)
                )
                assert np.abs(values - wanted).max() < 0.02 and len(values) == len(found["tokens"])


@pytest.fixture(scope="module")
def alone(workspace) -> str:
    train(workspace, "alone", 1, "--run.steps=2", "--run.save_every=1")
    return "alone"


@pytest.mark.parametrize(
    "ranks, more",
    [
        (2, ()),
        (4, ("--parallel.replicas=2",)),
        (2, ("--parallel.branches=one_at_a_time", "--model.gradient_checkpointing=true")),
        (2, ("--parallel.offload=true", "--run.async_save=true", "--run.save_every=1")),
        (1, ("--parallel.offload=true", "--model.compile=true", "--run.threads=1")),
    ],
)
def test_several_ranks_take_the_steps_of_one(workspace, alone, ranks, more):
    """Two mini-batches of 3 and 2 groups: with four ranks some have nothing to do."""
    out = f"ranks{ranks}{len(more)}"
    said = train(workspace, out, ranks, "--run.steps=2", *more)
    assert "whole copy of the policy" in said
    assert_same(workspace, out, alone, 2)
    assert_same_groups(workspace, out, alone)


def test_qwen3_vl_on_two_ranks_takes_the_step_of_one(workspace):
    """DeepStack's features of the vision blocks pass between the parts that FSDP shards."""
    for ranks in (1, 2):
        train(workspace, f"qwen3_{ranks}", ranks, "--run.steps=1", "--model.path=qwen3_vl")
    assert_same(workspace, "qwen3_2", "qwen3_1", 1, "qwen3_vl")
    first, trained = (
        load_file(workspace / "qwen3_vl" / "model.safetensors"),
        weights(workspace, "qwen3_2", 1),
    )
    assert any(not torch.equal(first[name], trained[name]) for name in first if "deepstack" in name)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "more",
    [
        ("--model.dtype=bfloat16",),
        ("--model.dtype=bfloat16", "--model.compile=true", "--model.gradient_checkpointing=true"),
        ("--parallel.mixed_precision=true", "--parallel.offload=true", "--run.async_save=true"),
        ("--parallel.mixed_precision=true", "--model.lora_rank=4"),
    ],
)
def test_on_a_gpu_sampler_and_trainer_agree(workspace, more):
    """Options that a CPU cannot show whole; log-probs in bfloat16 differ by what it resolves."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    out = f"gpu{len(more)}{more[-1][-9:]}"
    said = train(workspace, out, 1, "--run.steps=2", "--run.device=auto", *more)
    assert "attention: flash attention\n" in said or "attention: flash-attn\n" in said
    rows = figures(workspace, out, timed=("seconds_",))
    assert all(0 < row["mismatch_max"] < 0.2 and row["skipped_steps"] == 0 for row in rows)


def test_a_run_goes_on_with_another_number_of_ranks(workspace, alone):
    train(workspace, "resumed", 2, "--run.steps=1")
    train(workspace, "resumed", 1, "--run.steps=2", "--resume", "auto")
    assert_same(workspace, "resumed", alone, 2)


def test_lora_on_two_ranks_and_on_with_one(workspace):
    """The base stays as it is, the export holds what was added to it."""
    lora = ("--model.lora_rank=4", "--model.lora_alpha=8", "--optim.eps=1e-2")
    train(workspace, "lora1", 1, "--run.steps=2", *lora)
    train(workspace, "lora2", 2, "--run.steps=1", *lora)
    train(workspace, "lora2", 1, "--run.steps=2", "--resume", "auto", *lora)
    assert_same(workspace, "lora2", "lora1", 2)
    first, trained = (
        load_file(workspace / "policy" / "model.safetensors"),
        weights(workspace, "lora1", 2),
    )
    moved = {name for name in first if not torch.equal(first[name], trained[name])}
    assert moved == {name for name in first if "_proj.weight" in name and "visual" not in name}


def test_mixed_precision_on_two_ranks(workspace):
    """float32 weights, computed with in bfloat16: no further from float32 than one process is."""
    options, mixed = ("--run.steps=1", "--optim.lr=1e-3"), "--parallel.mixed_precision=true"
    train(workspace, "exact", 1, *options)
    for ranks in (1, 2):
        train(workspace, f"mixed{ranks}", ranks, *options, mixed)
    first = load_file(workspace / "policy" / "model.safetensors")
    exact, one, two = (weights(workspace, out, 1) for out in ("exact", "mixed1", "mixed2"))
    rounded = 0
    for name, weight in exact.items():
        assert one[name].dtype == torch.float32
        rounding, found = ((x[name] - weight).norm() for x in (one, two))
        ulp = torch.finfo(torch.float32).eps * weight.abs().max()  # one element may round otherwise
        rounded += bool(rounding > ulp)
        assert rounding < 0.1 * (weight - first[name]).norm(), name
        assert found <= 2 * rounding + ulp, name
    assert rounded > len(exact) / 2  # it was computed in bfloat16


def test_a_run_goes_on_after_a_rank_was_killed(workspace, alone):
    """torchrun restarts all ranks, which go on from the newest checkpoint."""
    (workspace / "killing.py").write_text(
        "import os, pathlib, signal\n"
        "def length(rows):\n"
        "    metrics = pathlib.Path('killed/metrics.jsonl')\n"
        "    if metrics.read_text() and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "        os.kill(os.getppid(), signal.SIGKILL)\n"
        "    return [{'overall': row['response_length'] / 10} for row in rows]\n"
    )
    more = ["--run.steps=2", "--run.save_every=1", "--rollout.reward=killing:length"]
    train(workspace, "killed", 2, *more)
    assert_same(workspace, "killed", alone, 2)


def test_a_rank_without_memory_makes_all_restart_with_half_the_budget(workspace, alone):
    (workspace / "cramped.py").write_text(
        LENGTH + "import os, torch\n"
        "from tercet.train.learner.policy import Policy\n"
        "def no_room(*arguments):\n"
        "    raise torch.OutOfMemoryError('no room')\n"
        "if os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "    Policy.accumulate = no_room\n"
    )
    more = ["--parallel.micro_batch_tokens=1300", "--rollout.reward=cramped:length"]
    said = train(workspace, "cramped", 2, "--run.steps=2", *more)
    assert "parallel.micro_batch_tokens = 1300: a restart goes on with 650" in said
    assert_same(workspace, "cramped", alone, 2)


def test_a_rank_without_disk_space_ends_all_of_them(workspace):
    """The one before is as it was, and the error names the one that could not be written."""
    (workspace / "full.py").write_text(
        LENGTH + "import os, resource\n"
        "if os.environ['RANK'] == '1' and os.path.exists('full/checkpoints'):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
    )
    train(workspace, "full", 2, "--run.steps=1", "--rollout.reward=full:length")
    command = launch("full", 2, "--run.steps=2", "--resume=auto", "--rollout.reward=full:length")
    done = subprocess.run(
        command, cwd=workspace, env=ONE_THREAD, capture_output=True, text=True, timeout=900
    )
    assert done.returncode != 0
    assert "step_000002 could not be written, earlier ones are as they were" in done.stderr
    assert find_checkpoint(workspace / "full", "auto").name == "step_000001"


@pytest.mark.parametrize("to", ["torchrun", "all", "ranks"])
def test_a_stop_is_one_line_and_a_checkpoint(workspace, to):
    """SIGTERM to torchrun, Ctrl-C (SIGINT to all), and a scheduler's signal to the ranks alone:
    torchrun adds a traceback of its own where it got the signal, else it ends without an error."""
    out = f"stopped_{to}"
    metrics = workspace / out / "metrics.jsonl"
    with subprocess.Popen(
        launch(out, 2, "--run.steps=1000", restarts=1),
        cwd=workspace,
        env=ONE_THREAD,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as run:
        deadline = time.monotonic() + 600
        while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
            assert run.poll() is None
            time.sleep(0.2)
        if to == "torchrun":
            run.terminate()
        elif to == "all":
            os.killpg(run.pid, signal.SIGINT)
        else:
            for rank in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split():
                os.kill(int(rank), signal.SIGINT)
        said, _ = run.communicate(timeout=300)
    (line,) = (line for line in said.splitlines() if "stopped by" in line)
    name = "SIGTERM" if to == "torchrun" else "SIGINT"
    assert re.fullmatch(
        rf"tapo.py: stopped by {name}: checkpoint after \d+ steps: {out}/checkpoints/step_\d+; "
        "--resume auto goes on from it",
        line,
    )
    assert (run.returncode == 0) == ("Traceback" not in said) == (to == "ranks"), said
    assert len(list((workspace / out / "checkpoints").glob("step_*"))) == 1
    if to == "torchrun":
        train(workspace, out, 1, "--run.steps=1", "--resume", "auto")  # it is whole


def test_one_gradient_that_is_not_finite_is_skipped_on_all_ranks(workspace):
    """One of rank 1's; the line is JSON without the loss, the run goes on."""
    (workspace / "infinite.py").write_text(
        LENGTH + "import os\n"
        "from tercet.train.learner.policy import Policy\n"
        "accumulate, calls = Policy.accumulate, []\n"
        "def broken(self, *arguments):\n"
        "    calls.append(1)\n"
        "    value, metrics = accumulate(self, *arguments)\n"
        "    if len(calls) == 1 and os.environ['RANK'] == '1':\n"
        "        grads = [p.grad for p in self.parameters() if p.grad is not None]\n"
        "        grads[0].fill_(float('nan'))\n"
        "        value = value * float('nan')\n"
        "    return value, metrics\n"
        "Policy.accumulate = broken\n"
    )
    more = ["--rollout.reward=infinite:length", "--optim.groups_per_minibatch=5"]
    train(workspace, "infinite", 2, "--run.steps=2", *more)
    one, two = figures(workspace, "infinite")
    assert one["skipped_steps"] == 1 and {"loss", "grad_norm"} & set(one) == set()
    assert two["skipped_steps"] == 0 and {"loss", "grad_norm"} <= set(two)


def test_a_photo_that_one_rank_cannot_read_ends_all_with_a_checkpoint(workspace):
    """The groups of its mini-batch are set aside; a run with other photos goes on."""
    (workspace / "unread.py").write_text(
        LENGTH + "import os, pathlib\n"
        "from tercet.core.data.vision import PromptEncoder\n"
        "levels = PromptEncoder.levels\n"
        "def unread(self, key):\n"
        "    if os.environ['RANK'] == '1' and pathlib.Path('unread/metrics.jsonl').read_text():\n"
        "        raise ValueError(f'{key}: gone')\n"
        "    return levels(self, key)\n"
        "PromptEncoder.levels = unread\n"
    )
    command = launch("unread", 2, "--run.steps=2", "--rollout.reward=unread:length")
    done = subprocess.run(
        command, cwd=workspace, env=ONE_THREAD, capture_output=True, text=True, timeout=200
    )
    assert done.returncode != 0 and ".png: gone" in done.stderr
    assert "checkpoint after 1 steps: unread/checkpoints/step_000001, without " in done.stdout
    assert json.loads((workspace / "unread/failed/step_000002/groups.json").read_text())
    train(workspace, "unread", 1, "--run.steps=2", "--resume", "auto")
    assert len(figures(workspace, "unread")) == 2


@pytest.mark.core
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_costs_are_dealt_evenly(ranks):
    costs = [5.0, 1.0, 9.0, 2.0, 2.0, 7.0, 1.0]
    dealt = deal(costs, ranks)
    assert sorted(i for part in dealt for i in part) == list(range(7)) and len(dealt) == ranks
    loads = [sum(costs[i] for i in part) for part in dealt]
    assert max(loads) <= max(9.0, sum(costs) / ranks + min(9.0, 2.0))
    assert all(part == sorted(part) for part in dealt)


@pytest.mark.core
def test_replicas_must_divide_the_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="replicas is 2; it must divide the 3 processes"):
        Ranks(torch.device("cpu"), ParallelConfig(replicas=2))


def test_stage_1_on_two_ranks_takes_the_steps_of_one(workspace):
    """Three samples of different length a step: one rank has one of them."""
    photos = sorted((workspace / "photos").rglob("*.png"))
    records = [
        {
            "messages": [
                {"role": "user", "content": "<image>What bird is this?"},
                {"role": "assistant", "content": "<answer>red bird</answer>" * (1 + n % 3)},
            ],
            "images": [str(photo)],
        }
        for n, photo in enumerate(photos)
    ]
    (workspace / "stage1.json").write_text(json.dumps(records))
    sft = """--data.path=stage1.json --model.path=policy --run.device=cpu --run.steps=2
        --optim.samples_per_step=3 --optim.lr=0.1 --optim.eps=1.0 --optim.warmup_steps=0
        --optim.max_tokens=400 --parallel.micro_batch_tokens=400""".split()
    for ranks in (1, 2):
        command = launch(f"sft{ranks}", ranks, script="sft.py", options=sft)
        done = subprocess.run(
            command, cwd=workspace, env=ONE_THREAD, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert_same(workspace, "sft2", "sft1", 2)


@pytest.mark.core
def test_exceptions_travel_between_ranks():
    """As themselves where they can, else under their name."""

    class Odd(Exception):
        def __init__(self, one, two):
            super().__init__(f"{one} and {two}")

    stopped = pickle.loads(pickle.dumps(Interrupted(signal.SIGTERM)))
    assert stopped.exit_code == 143 and str(stopped) == "stopped by SIGTERM"
    assert picklable(stopped) is stopped
    found = picklable(Odd(1, 2))
    assert type(found) is RuntimeError and str(found) == "Odd: 1 and 2"


@pytest.mark.core
def test_a_process_alone_needs_no_group():
    ranks = Ranks(torch.device("cpu"), ParallelConfig())
    assert ranks.share(lambda: 3) == 3 and ranks.most(4) == 4 and ranks.exchange(5) == [5]
    assert ranks.is_first and ranks.mesh is None and ranks.on_all(lambda: 6) == 6
    with pytest.raises(ValueError, match="alone"):
        ranks.share(lambda: (_ for _ in ()).throw(ValueError("alone")))
