"""Stage 1: the loss equals plain transformers', it learns, it resumes bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support import tiny
from transformers import Trainer, get_cosine_schedule_with_warmup

from tercet.core.config import ModelConfig, SftConfig
from tercet.core.data.records import SftSample, read_sft
from tercet.core.data.vision import PromptEncoder
from tercet.core.draws import EndlessOrder
from tercet.core.models import load_policy
from tercet.core.types import PolicyParts
from tercet.train import sft
from tercet.train.cli.arguments import overridden
from tercet.train.cli.command_line import parse
from tercet.train.learner.examples import Example, tokenize
from tercet.train.learner.policy import Policy
from tercet.train.logs.metrics import read_metrics

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


def plain_losses(parts: PolicyParts, sample: SftSample, photo: str = "") -> torch.Tensor:
    """Cross-entropy of each target token by transformers alone, with its photo or another."""
    turns = [
        {"role": "system", "content": sample.messages[0][1]},
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "What bird is this?"}],
        },
    ]
    text = parts.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    seen = parts.image_processor(images=Image.open(photo or sample.images[0]), return_tensors="pt")
    pads = int(seen["image_grid_thw"].prod()) // 4
    text = text.replace("<|image_pad|>", "<|image_pad|>" * pads)
    prompt = parts.tokenizer(text, add_special_tokens=False).input_ids
    said = sample.messages[2][1] + "<|im_end|>"
    target = parts.tokenizer(said, add_special_tokens=False).input_ids
    ids = torch.tensor([prompt + target])
    logits = parts.model(
        input_ids=ids, mm_token_type_ids=(ids == parts.banned_ids[0]).int(), **seen
    ).logits[0, len(prompt) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="none")


def test_losses_and_rates_equal_a_plain_transformers_loop(stage1, tmp_path):
    """20 steps in float32: batches of 4 and then 2 an epoch, frozen vision, transformers' schedule,
    and AdamW without decay of norms and biases."""
    more = "--optim.samples_per_step=4 --optim.warmup_steps=6 --optim.lr=3e-3 --run.steps=20"
    theirs = "--optim.rates=transformers --optim.decay_norms_and_biases=false"
    train(stage1, tmp_path, *more.split(), *theirs.split(), "--parallel.micro_batch_tokens=400")
    lines = read_metrics(tmp_path / "metrics.jsonl")
    parts = load_policy(ModelConfig(path=str(stage1 / "policy")))
    parts.model.model.visual.requires_grad_(False)
    decayed = set(Trainer.get_decay_parameter_names(None, parts.model))
    groups = [{"params": [], "weight_decay": 0.1}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in parts.model.named_parameters():
        if parameter.requires_grad:
            groups[name not in decayed]["params"].append(parameter)
    assert all(group["params"] for group in groups)
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.999), eps=1e-8)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 6, 20)
    samples, order = read_sft(stage1 / "stage1.json")[0], EndlessOrder(6, 0)
    for step, line in enumerate(lines):
        epoch, second = divmod(step, 2)
        places = range(6 * epoch + 4 * second, 6 * epoch + (6 if second else 4))
        losses = torch.cat([plain_losses(parts, samples[order[place]]) for place in places])
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(parts.model.parameters(), 1.0)
        assert line["cross_entropy"] == pytest.approx(float(losses.mean()), abs=1e-4), step
        assert line["lr"] == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step(), scheduler.step(), optimizer.zero_grad()
    assert lines[-1]["cross_entropy"] < 0.5 * lines[0]["cross_entropy"] and len(lines) == 20


def test_held_out_records_are_measured_with_their_own_and_with_others_photos(stage1, tmp_path):
    held = ["--data.held_out=0.4", "--run.eval_every=2", "--optim.samples_per_step=3"]
    saved = train(stage1, tmp_path, *held, "--run.steps=3", "--run.keep_last=5")
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert ["held_out_ce" in line for line in lines] == [False, True, True]
    parts = load_policy(ModelConfig(path=str(saved)))
    samples = read_sft(stage1 / "stage1.json")[0]
    one, other = sorted(np.random.default_rng([0, 6]).permutation(6)[:2].tolist())
    own, permuted = [], []
    with torch.no_grad():
        for n, m in ((one, other), (other, one)):
            own.append(plain_losses(parts, samples[n]))
            permuted.append(plain_losses(parts, samples[n], samples[m].images[0]))
    assert lines[2]["held_out_ce"] == pytest.approx(float(torch.cat(own).mean()), rel=1e-5)
    assert lines[2]["permuted_ce"] == pytest.approx(float(torch.cat(permuted).mean()), rel=1e-5)
    trained = train(stage1, tmp_path, *held, "--run.steps=4", resume="auto")
    assert trained.name == "step_000004"
    with pytest.raises(ValueError, match="data.held_out 0.4 -> 0.2 would make it another run"):
        train(stage1, tmp_path, "--data.held_out=0.2", *held[1:], resume="auto")
    with pytest.raises(ValueError, match="data.held_out 0.99 leaves no record of 6 to train on"):
        train(stage1, tmp_path / "none", "--data.held_out=0.99")


def test_steps_are_counted_as_transformers_trainer_counts_them():
    """404 records in batches of 4 on 4 GPUs, accumulated 4 times: 7 steps an epoch, not 6.3."""
    run = SimpleNamespace(config=SftConfig(), examples=list(range(404)), per_epoch=7)
    run.order = EndlessOrder(404, 0)
    seen = []
    for run.steps_done in range(70):
        seen.append(sft.SftRun._chosen(run))
    assert [len(chosen) for chosen in seen[:8]] == [64] * 6 + [20, 64]
    for epoch in range(10):
        drawn = sum(seen[7 * epoch : 7 * epoch + 7], [])
        assert sorted(drawn) == list(range(404))


SAID = "<think>Red.</think><answer>wren</answer>"


def tokens_of(answer: str, parts=None) -> Example:
    turns = (("user", "What?"), ("assistant", answer))
    return tokenize(SftSample("7", turns, ()), parts or tiny(), None)


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
def test_a_thinking_models_prompt_begins_the_answer():
    """Its chat template ends the prompt with `<think>`, which the target does not repeat."""
    parts = tiny("qwen3_vl")
    plain = tokens_of(SAID, parts)
    parts.tokenizer.chat_template = parts.tokenizer.chat_template.replace(
        "<|im_start|>assistant\\n", "<|im_start|>assistant\\n<think>\\n"
    )
    for answer in (SAID, SAID.replace("<think>", "<think>\n")):
        example = tokens_of(answer, parts)
        prompt, target = map(parts.tokenizer.decode, (example.prompt_ids, example.target_ids))
        assert prompt == parts.tokenizer.decode(plain.prompt_ids) + "<think>\n"
        assert target == "Red.</think><answer>wren</answer><|im_end|>"


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


@pytest.mark.parametrize("name", ["sft_3b", "sft_7b"])
def test_recipes_are_the_released_settings(stage1, tmp_path, name):
    """On a tiny policy; only paths and the device are overridden."""
    recipe = Path(sft.__file__).parent / "recipes" / f"{name}.yaml"
    argv = [f"--config={recipe}", f"--data.path={stage1 / 'stage1.json'}", "--run.device=cpu"]
    argv += [f"--model.path={stage1 / 'policy'}", f"--run.out={tmp_path}", "--run.epochs=2"]
    config, _, resolved = parse(SftConfig, argv, "")
    optim, model = config.optim, config.model
    assert (optim.lr, optim.schedule, optim.warmup_steps) == (5e-6, "cosine", 6)
    assert (optim.weight_decay, optim.samples_per_step, optim.max_tokens) == (0.1, 64, 4096)
    assert (model.max_pixels, model.dtype, model.freeze_vision) == (768**2, "bfloat16", True)
    sft.train(config, resolved)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["lr"] for line in lines] == [0.0, pytest.approx(5e-6 / 6)]


def test_samples_over_the_limit_are_left_out_or_an_error(stage1, tmp_path, capsys):
    error = "--data.on_long=error"
    with pytest.raises(ValueError, match="optim.max_tokens is 20 .samples are never"):
        train(stage1, tmp_path, "--optim.max_tokens=20", error)
    with pytest.raises(ValueError, match="all 6 records are too long: sample 'stage1/0' has"):
        train(stage1, tmp_path, "--optim.max_tokens=20")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]  # nothing was begun
    parts = tiny()
    examples = [tokenize(s, parts, None) for s in read_sft(stage1 / "stage1.json")[0]]
    encoder = PromptEncoder(parts)
    lengths = [encoder.length(e.prompt_ids, e.images) + len(e.target_ids) for e in examples]
    limit = sorted(lengths)[3]
    train(stage1, tmp_path, f"--optim.max_tokens={limit}", "--run.steps=1")
    said = capsys.readouterr().out
    kept = sum(length <= limit for length in lengths)
    assert 0 < kept < 6
    assert f"{kept} records to train on, 0 held out, {6 - kept} left out; 1 steps" in said
    for n, length in enumerate(lengths):
        assert (f"left out: sample 'stage1/{n}' has {length} tokens" in said) == (length > limit)
    with pytest.raises(ValueError, match="which records fit optim.max_tokens changed since it beg"):
        train(stage1, tmp_path, f"--optim.max_tokens={limit - 1}", resume="auto")


def test_bad_photos_stop_or_are_left_out(stage1, tmp_path):
    records = json.loads((stage1 / "stage1.json").read_text())
    records.append(records[0] | {"images": ["missing.png"]})
    (stage1 / "with_missing.json").write_text(json.dumps(records))
    path = f"--data.path={stage1 / 'with_missing.json'}"
    with pytest.raises(ValueError, match="missing.png"):
        train(stage1, tmp_path, path)
    train(stage1, tmp_path, path, "--data.on_bad_image=skip", "--run.steps=1")
    assert first_loss(tmp_path) > 0
