"""Stage 1: the loss equals plain transformers', it learns, it resumes bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support import tiny

from tercet.core.config import ModelConfig, SftConfig
from tercet.core.data.records import SftSample, read_sft
from tercet.core.models import load_policy
from tercet.train import sft
from tercet.train.learner.arguments import overridden
from tercet.train.learner.command_line import parse
from tercet.train.learner.policy import Policy

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 200, 30)}


@pytest.fixture(scope="module")
def stage1(tmp_path_factory) -> Path:
    """Six records about photos of one colour, and a tiny policy."""
    root = tmp_path_factory.mktemp("stage1")
    records = []
    for n, (name, colour) in enumerate([*COLOURS.items()] * 2):
        noise = np.random.default_rng(n).integers(-20, 20, (60 + 9 * n, 80, 3))
        pixels = (np.array(colour) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"{n}.png")
        said = f"<think>The colour is {name}.</think><answer>{name}{' bird' * n}</answer>"
        messages = [
            {"role": "system", "content": "You think first."},
            {"role": "user", "content": "<image>What bird is this?"},
            {"role": "assistant", "content": said},
        ]
        records.append({"messages": messages, "images": [f"{n}.png"]})
    (root / "stage1.json").write_text(json.dumps(records))
    tiny().save(root / "policy")
    return root


def train(root: Path, out: Path, *more: str, resume: str | None = None) -> Path:
    usual = [
        f"--data.path={root / 'stage1.json'}",
        f"--model.path={root / 'policy'}",
        f"--run.out={out}",
        "--run.device=cpu",
        "--optim.samples_per_step=6",
        "--optim.max_tokens=400",
        "--optim.warmup_steps=0",
        "--run.steps=3",
    ]
    config, _, resolved = parse(SftConfig, overridden(usual, more), "")
    return sft.train(config, resolved, resume)


def first_loss(out: Path) -> float:
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["cross_entropy"]


def test_first_loss_equals_plain_transformers(stage1, tmp_path):
    train(stage1, tmp_path, "--run.steps=1", "--parallel.micro_batch_tokens=400")
    parts = load_policy(ModelConfig(path=str(stage1 / "policy")))
    losses = []
    for sample in read_sft(stage1 / "stage1.json")[0]:
        turns = [
            {"role": "system", "content": sample.messages[0][1]},
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": "What bird is this?"}],
            },
        ]
        text = parts.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        photo = parts.image_processor(images=Image.open(sample.images[0]), return_tensors="pt")
        pads = int(photo["image_grid_thw"].prod()) // 4
        text = text.replace("<|image_pad|>", "<|image_pad|>" * pads)
        prompt = parts.tokenizer(text, add_special_tokens=False).input_ids
        said = sample.messages[2][1] + "<|im_end|>"
        target = parts.tokenizer(said, add_special_tokens=False).input_ids
        ids = torch.tensor([prompt + target])
        with torch.no_grad():
            logits = parts.model(
                input_ids=ids,
                mm_token_type_ids=(ids == parts.banned_ids[0]).int(),
                **photo,
            ).logits[0, len(prompt) - 1 : -1]
        losses += torch.nn.functional.cross_entropy(
            logits, torch.tensor(target), reduction="none"
        ).tolist()
    assert first_loss(tmp_path) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


SAID = "<think>Red.</think><answer>wren</answer>"


def tokens_of(answer: str, parts=None) -> sft.Example:
    turns = (("user", "What?"), ("assistant", answer))
    return sft.tokenize(SftSample("7", turns, ()), parts or tiny(), None)


@pytest.mark.core
@pytest.mark.parametrize("ends", [[0, 2], 0, [2, 0], None])
@pytest.mark.parametrize("more", ["", "<|im_end|>", "<|im_end|>\n", "<|im_end|><|im_end|> \n"])
def test_targets_end_with_the_templates_end_of_turn_once(ends, more):
    parts = tiny()
    parts.model.generation_config.eos_token_id = ends
    example = tokens_of(SAID + more, parts)
    assert parts.tokenizer.decode(example.target_ids) == SAID + "<|im_end|>"
    assert example == tokens_of(SAID)


@pytest.mark.core
@pytest.mark.parametrize("token", ["<|im_end|>", "<|endoftext|>", "<|image_pad|>", "<|video_pad|>"])
def test_tokens_that_no_answer_holds_are_named(token):
    with pytest.raises(ValueError, match=r"^sample '7': its answer must not hold <\|\w+\|>$"):
        tokens_of(f"a {token} b")


def test_vision_stays_frozen_unless_told(stage1, tmp_path):
    before = load_file(stage1 / "policy" / "model.safetensors")
    for name, flags in {
        "frozen": [],
        "trained": ["--model.freeze_vision=false", "--model.freeze_merger=false"],
    }.items():
        saved = train(stage1, tmp_path / name, "--optim.lr=1e-3", "--run.steps=1", *flags)
        after = load_file(saved / "model.safetensors")
        moved = {key.startswith("visual.") for key in before if not before[key].equal(after[key])}
        assert moved == ({False} if name == "frozen" else {True, False})


def test_it_learns_and_resumes_bit_for_bit(stage1, tmp_path):
    more = ["--optim.lr=3e-3", "--optim.schedule=constant", "--run.steps=12", "--run.save_every=6"]
    more += ["--run.keep_last=5", "--model.freeze_vision=false"]
    whole = train(stage1, tmp_path / "whole", *more)
    rows = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["cross_entropy"] < 0.6 * json.loads(rows[0])["cross_entropy"]
    train(stage1, tmp_path / "parts", *more)
    (tmp_path / "parts" / "checkpoints" / "step_000012").rename(tmp_path / "late")
    resumed = train(stage1, tmp_path / "parts", *more, resume="auto")
    assert resumed.name == whole.name == "step_000012"
    for name, value in load_file(whole / "model.safetensors").items():
        assert torch.equal(value, load_file(resumed / "model.safetensors")[name]), name


def test_other_records_do_not_go_on_at_the_old_position(stage1, tmp_path):
    """Reformatted ones, and ones that have moved with their photos, do."""
    data = tmp_path / "data"
    shutil.copytree(stage1, data)
    out, path = tmp_path / "run", f"--data.path={data / 'stage1.json'}"
    train(stage1, out, path, "--run.steps=1")
    records = json.loads((data / "stage1.json").read_text())
    (data / "stage1.json").write_text(json.dumps(records, indent=3))
    moved = shutil.move(data, tmp_path / "moved")
    path = f"--data.path={moved / 'stage1.json'}"
    assert train(stage1, out, path, "--run.steps=2", resume="auto").name == "step_000002"
    (moved / "stage1.json").write_text(json.dumps(records[:4] + records[:1]))
    with pytest.raises(ValueError, match="what data.path .*stage1.json holds changed since it"):
        train(stage1, out, path, resume="auto")
    (moved / "stage1.json").write_text(json.dumps(records))
    Image.new("RGB", (80, 60)).save(moved / "1.png")
    with pytest.raises(ValueError, match="photos that it trains on changed since it began"):
        train(stage1, out, path, resume="auto")
    with pytest.raises(ValueError, match="optim.samples_per_step 6 -> 3 would make it another run"):
        train(stage1, out, "--optim.samples_per_step=3", resume="auto")


def test_out_of_memory_begins_the_step_again(stage1, tmp_path, monkeypatch):
    more = ["--optim.lr=1e-2", "--optim.eps=1.0", "--optim.max_tokens=200"]
    budget = "--parallel.micro_batch_tokens=900"
    whole = train(stage1, tmp_path / "roomy", *more, budget)
    forward, sizes = Policy.forward, []

    def limited(self, batch, *arguments, **options):
        if batch.update.num_tokens > 400:
            raise torch.OutOfMemoryError("no room")
        sizes.append(batch.update.num_tokens)
        return forward(self, batch, *arguments, **options)

    monkeypatch.setattr(Policy, "forward", limited)
    saved = train(stage1, tmp_path / "cramped", *more, budget)
    assert len(sizes) > 3 and (tmp_path / "cramped" / "micro_batch_tokens").read_text() == "225"
    first = load_file(stage1 / "policy" / "model.safetensors")
    weights = load_file(saved / "model.safetensors")
    for name, value in load_file(whole / "model.safetensors").items():
        moved = (value - first[name]).abs().max()
        assert (value - weights[name]).abs().max() <= 1e-3 * moved + 1e-8, name


def test_a_sample_over_the_limit_is_named(stage1, tmp_path):
    with pytest.raises(ValueError, match=r"sample .*tokens; optim.max_tokens is 20"):
        train(stage1, tmp_path, "--optim.max_tokens=20")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]  # nothing was begun


def test_bad_photos_stop_or_are_left_out(stage1, tmp_path):
    records = json.loads((stage1 / "stage1.json").read_text())
    records.append(records[0] | {"images": ["missing.png"]})
    (stage1 / "with_missing.json").write_text(json.dumps(records))
    path = f"--data.path={stage1 / 'with_missing.json'}"
    with pytest.raises(ValueError, match="missing.png"):
        train(stage1, tmp_path, path)
    train(stage1, tmp_path, path, "--data.on_bad_image=skip", "--run.steps=1")
    assert first_loss(tmp_path) > 0
