"""Whole runs on real photographs at their real aspect ratios, with tiny and real language models.

No such policy names a bird, so the reward is the response's length and groups are kept unjudged.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sglang_support import FLAGS, PYTHON, avoid_image_tokens, processes_in
from support import LENGTH, tiny
from transformers import AutoModelForImageTextToText, AutoTokenizer

from tercet.bench.real_parts import download, real_language_model
from tercet.core.types import PolicyParts
from tercet.train.cli.arguments import overridden

pytestmark = pytest.mark.photos

ROOT = Path(__file__).resolve().parents[1]


def train(photos: Path, policy: Path, work: Path, *more: str) -> str:
    """`torchrun train/tapo.py` as the README shows it; returns what it printed."""
    (work / "lengths.py").write_text(LENGTH)
    torchrun = Path(sys.executable).with_name("torchrun")
    usual = [
        *["--data.path", str(photos), "--model.path", str(policy), "--run.out", "run"],
        *["--rollout.reward", "lengths:length", "--rollout.on_exhausted", "keep_last_round"],
        *["--rollout.max_rounds", "1", "--rollout.groups_per_step", "4", "--run.save_every", "1"],
        *["--rollout.n_anchor", "2", "--rollout.n_positive", "2", "--run.keep_last", "9"],
        *["--rollout.max_response_tokens", "12", "--optim.groups_per_minibatch", "2"],
        *["--optim.lr", "1e-4", "--run.device", "cpu"],
    ]
    script = [str(torchrun), "--nproc-per-node", "1", str(ROOT / "train" / "tapo.py")]
    done = subprocess.run(
        [*script, *overridden(usual, more)],
        cwd=work,
        env=os.environ | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def check(work: Path, policy: Path, steps: int) -> None:
    """Every step had a gradient and changed weights; the end loads in transformers."""
    rows = [json.loads(line) for line in (work / "run" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert all(row["grad_norm"] > 0 and row["kl"] > 0 for row in rows)
    folders = [policy, *sorted((work / "run" / "checkpoints").iterdir())]
    assert len(folders) == steps + 1
    for before, after in zip(folders[:-1], folders[1:], strict=True):
        one, other = (load_file(folder / "model.safetensors") for folder in (before, after))
        changed = [name for name in one if not torch.equal(one[name], other[name])]
        assert any(name.startswith("visual.") for name in changed)
        assert any(name.startswith("model.") for name in changed)
    model = AutoModelForImageTextToText.from_pretrained(folders[-1])
    assert len(AutoTokenizer.from_pretrained(folders[-1])) == model.config.text_config.vocab_size


def test_tiny_policy_trains_and_resumes_on_real_photos(real_photos, tmp_path):
    policy = tmp_path / "policy"
    tiny().save(policy)
    train(real_photos, policy, tmp_path, "--run.steps", "2")
    assert "step_000003" in train(
        real_photos, policy, tmp_path, "--run.steps", "3", "--resume", "auto"
    )
    check(tmp_path, policy, 3)
    manifest = json.loads((tmp_path / "run" / "triplets.json").read_text())
    assert len(manifest["anchors"]) > 50


@pytest.mark.sglang
@pytest.mark.skipif(not PYTHON, reason="no SGLang server: run make test-sglang")
def test_real_photos_are_sampled_on_a_server(real_photos, tmp_path):
    """The server sees the very pixels and prompts that the trainer scores."""
    parts = tiny()
    avoid_image_tokens(parts)
    parts.save(tmp_path / "policy")
    more = ["--rollout.engine", "sglang", "--rollout.sglang_python", PYTHON]
    more += ["--rollout.sglang_args", " ".join(FLAGS), "--run.steps", "3"]
    train(real_photos, tmp_path / "policy", tmp_path, *more)
    check(tmp_path, tmp_path / "policy", 3)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert all(0 < row["mismatch_max"] < 1e-4 for row in rows)
    assert processes_in(tmp_path / "run" / "sglang" / "server_0") == []


@pytest.fixture(scope="module")
def real_parts() -> tuple[PolicyParts, torch.nn.Module]:
    try:
        folder = download()
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"no real language model: {error}")
    return real_language_model(folder)


def test_the_frame_leaves_the_real_language_model_as_it_is(real_parts):
    parts, language = real_parts
    ids = torch.tensor([parts.tokenizer.encode("The robin is a small bird with a red breast.")])
    with torch.no_grad():
        framed = parts.model(input_ids=ids).logits[..., : language.config.vocab_size]
        assert torch.equal(framed, language(input_ids=ids).logits)


@pytest.mark.slow
def test_real_language_model_trains_on_real_photos(real_photos, real_parts, tmp_path):
    policy = tmp_path / "policy"
    real_parts[0].save(policy)
    train(real_photos, policy, tmp_path, "--run.steps", "3", "--rollout.groups_per_step", "2")
    check(tmp_path, policy, 3)
