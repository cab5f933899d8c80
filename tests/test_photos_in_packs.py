"""Packs of prompts with several photos, with one and with none, against plain transformers."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import tiny
from test_lora import learn
from test_policy import without_float32_islands
from text_rank import micro_batches
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText

from tercet.core.config import ModelConfig, ParallelConfig, TapoOptimConfig
from tercet.core.data.vision import PromptEncoder
from tercet.core.models import FAMILIES, family_of, freeze
from tercet.core.packing import plain_batch
from tercet.core.prompts import chat_ids
from tercet.core.types import EncodedPrompt, to_device
from tercet.train.learner.lora import add_lora
from tercet.train.learner.merged import Export
from tercet.train.learner.optim import build_optimizer, optimizer_step
from tercet.train.learner.policy import Policy
from tercet.train.learner.ranks import Ranks

pytestmark = pytest.mark.core
ANSWERS = [(20, 21, 22, 23, 24), (), (30,), (40, 41, 42)]


def make_prompts(parts, photos) -> list[EncodedPrompt]:
    """On two photos, on none, on one, on three with words between them."""
    encoder = PromptEncoder(parts)
    texts = [
        ("<image><image>Are these one bird?", photos[:2]),
        ("Name one bird, please.", []),
        ("<image>What bird is this?", photos[2:]),
        ("<image>this, <image>that or <image>?", photos[::-1]),
    ]
    ids = [
        tuple(chat_ids(parts.tokenizer, [{"role": "user", "content": text}], len(keys)))
        for text, keys in texts
    ]
    given = zip(ids, (keys for _, keys in texts), strict=True)
    return [encoder(of_prompt, tuple(keys)) for of_prompt, keys in given]


def plain_logprobs(model, prompt: EncodedPrompt, tokens: tuple[int, ...]) -> torch.Tensor:
    """Log-probs of one response behind its prompt; transformers numbers the positions itself."""
    ids = torch.cat([prompt.input_ids, torch.tensor(tokens, dtype=torch.int64)])[None]
    images = {}
    if prompt.images:
        images = {
            "pixel_values": torch.cat([image.pixel_values for image in prompt.images]),
            "image_grid_thw": torch.cat([image.grid_thw for image in prompt.images]),
        }
    is_image = (ids == model.config.image_token_id).int()
    output = model(input_ids=ids, mm_token_type_ids=is_image, use_cache=False, **images)
    model.model.rope_deltas = None  # else transformers 5.17 uses them for the next text
    logprobs = output.logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logprobs.gather(-1, ids[0, len(prompt) :, None])[:, 0]


@pytest.mark.parametrize("chosen", [(0, 1, 2, 3), (3, 0), (1,), (1, 2, 1)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_logprobs_and_gradients_are_those_of_sequences_one_by_one(
    monkeypatch, parts, photos, chosen, checkpointing
):
    parts.model.double()
    plain = copy.deepcopy(parts.model)
    without_float32_islands(monkeypatch, plain)
    prompts = [make_prompts(parts, photos)[i] for i in chosen]
    policy = Policy(parts, chunk_rows=5)
    if checkpointing:
        parts.model.gradient_checkpointing_enable({"use_reentrant": False})
        parts.model.train()
    batch = plain_batch([(prompt, ANSWERS) for prompt in prompts], 7.0)
    found = policy(batch.update, "logprobs", labels=batch.labels)
    wanted = torch.cat([plain_logprobs(plain, p, a) for p in prompts for a in ANSWERS if a])
    assert (found - wanted).abs().max() <= 1e-9
    assert found.min() < -6  # an error of the head would show
    policy(batch, "cross_entropy")[0].backward()
    (-wanted.sum() / 7).backward()
    checked = 0
    for name, parameter in parts.model.named_parameters():
        other = plain.get_parameter(name).grad
        if other is None:
            assert parameter.grad is None, name
            continue
        assert (parameter.grad - other).norm() <= 1e-9 * other.norm() + 1e-13, name
        checked += 1
    assert checked == len(list(plain.parameters())) or chosen == (1,)


EVERY_LAYER = r".*(language_model\.layers\.\d+\..*_proj|merger.*\.(mlp\.[02]|linear_fc[12]))"
TRAINED = {
    "additions": {"lora_rank": 3, "lora_targets": EVERY_LAYER},  # mergers of DeepStack among them
    "mergers": {"freeze_vision": True},
    "tower": {"freeze_merger": True},
}


@pytest.mark.parametrize("what", TRAINED)
def test_a_part_is_trained_as_by_sequences_one_by_one(monkeypatch, parts, photos, tmp_path, what):
    """Its gradients are equal, the rest stays to the bit, and the export is the same policy."""
    config, model = ModelConfig(**TRAINED[what]), parts.model.double()
    freeze(model, vision=config.freeze_vision, merger=config.freeze_merger)
    if config.lora_rank:
        add_lora(model, config)
        learn(model, 0.05)
    plain, start = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    without_float32_islands(monkeypatch, plain)
    policy, prompts = Policy(parts), make_prompts(parts, photos)
    batch = plain_batch([(prompt, ANSWERS) for prompt in prompts], 7.0)
    policy(batch, "cross_entropy")[0].backward()
    wanted = [plain_logprobs(plain, p, a) for p in prompts for a in ANSWERS if a]
    (-torch.cat(wanted).sum() / 7).backward()
    for name, parameter in model.named_parameters():
        other = plain.get_parameter(name).grad
        assert (parameter.grad is None) == (other is None) == (not parameter.requires_grad), name
        if other is not None:
            assert (parameter.grad - other).norm() <= 1e-9 * other.norm() + 1e-13, name
    optimizer = build_optimizer(model.named_parameters(), TapoOptimConfig(lr=1e-2))
    optimizer_step(optimizer, [p for p in model.parameters() if p.requires_grad], 1e-2, 1.0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start[name]) != parameter.requires_grad, name
    ranks = Ranks(torch.device("cpu"), ParallelConfig())
    Export.take(policy, ranks, copy=False).save(parts, tmp_path)
    loaded, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path, dtype=torch.float64, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    exported = torch.cat([plain_logprobs(loaded, p, a) for p in prompts for a in ANSWERS if a])
    trained = policy(batch.update, "logprobs", labels=batch.labels)
    assert (exported - trained).abs().max() <= 1e-9
    assert (torch.cat(wanted) - trained).abs().max() > 1e-3


class SquareTensors(TorchDispatchMode):
    """Notes what makes a tensor whose last two sides are queries by keys."""

    def __init__(self, tokens: int):
        super().__init__()
        self.tokens, self.found = tokens, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-2:] == (self.tokens,) * 2:
                self.found.append(function)
        return out


@pytest.mark.parametrize("texts_only", [False, True])
def test_no_mask_is_built(parts, photos, texts_only):
    """Nothing of T x T elements, forward and backward; a mask of transformers' own is seen."""
    prompts = [p for p in make_prompts(parts, photos) if not (texts_only and p.images)]
    policy = Policy(parts)
    batch = plain_batch([(prompt, ANSWERS) for prompt in prompts], 7.0)
    assert batch.update.num_tokens not in (64, 192)  # sides of weights
    with SquareTensors(batch.update.num_tokens) as masks:
        policy(batch, "cross_entropy")[0].backward()
    assert masks.found == []
    family = family_of(parts.model.config)
    given = family.text_inputs(parts.model, batch.update)
    assert given["position_ids"].shape == (3, 1, batch.update.num_tokens)
    fourth = torch.cat([given["position_ids"][:1], given["position_ids"]])
    with SquareTensors(batch.update.num_tokens) as masks, torch.no_grad():
        more = given | {"position_ids": fourth, "attention_mask": None}
        parts.model.model.language_model(**more, segments=batch.update.segments, use_cache=False)
    assert masks.found


def test_what_the_language_model_of_qwen3_vl_is_given(photos):
    parts = tiny("qwen3_vl")
    family, model, prompts = family_of(parts.model.config), parts.model, make_prompts(parts, photos)
    packed = plain_batch([(prompt, ANSWERS) for prompt in prompts], 7.0).update
    given = family.text_inputs(model, packed)
    assert given["attention_mask"] is None
    mask, layers = given["visual_pos_masks"], given["deepstack_visual_embeds"]
    pads = sum(int(image.grid_thw.prod()) // 4 for p in prompts for image in p.images)
    assert mask.dtype == torch.bool and mask.shape == (1, packed.num_tokens) and mask.sum() == pads
    assert [layer.shape for layer in layers] == [(pads, 64)] * 2
    # In pack order: the last photo's features are those it has alone.
    last = prompts[-1].images[-1]
    alone = model.model.get_image_features(last.pixel_values, last.grid_thw).deepstack_features
    for layer, one in zip(layers, alone, strict=True):
        one = one if isinstance(one, torch.Tensor) else one[0]
        torch.testing.assert_close(layer[-len(one) :], one, rtol=1e-4, atol=1e-5)
    text = plain_batch([(prompts[1], ANSWERS)], 7.0).update
    assert not {"visual_pos_masks", "deepstack_visual_embeds"} & set(
        family.text_inputs(model, text)
    )


def test_deepstack_matters(photos, monkeypatch):
    """Without it log-probs move far more than tests allow: they would see that it is missing."""
    parts = tiny("qwen3_vl")
    family, policy = family_of(parts.model.config), Policy(parts)
    batch = plain_batch([(prompt, ANSWERS) for prompt in make_prompts(parts, photos)], 7.0)
    whole = policy(batch.update, "logprobs", labels=batch.labels)
    inputs = family.text_inputs

    def without(model, packed):
        given = inputs(model, packed)
        return given | {"visual_pos_masks": None, "deepstack_visual_embeds": None}

    monkeypatch.setattr(family, "text_inputs", without)
    assert (policy(batch.update, "logprobs", labels=batch.labels) - whole).abs().max() > 0.05


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_rank_of_texts_beside_a_rank_of_photos(architecture, photos, tmp_path):
    """Neither hangs, and the gradients are those of one process that has both packs."""
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    script, parts = Path(__file__).with_name("text_rank.py"), tiny(architecture)
    parts.save(tmp_path / "policy")
    words = [script, tmp_path / "policy", *photos[:2], tmp_path / "grads.pt"]
    done = subprocess.run(
        [torchrun, "--standalone", "--nproc-per-node", "2", *map(str, words)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "grads.pt")
    policy = Policy(parts)
    for batch in micro_batches(parts, photos[:2]):
        policy(to_device(batch, "cpu"), "cross_entropy")[0].backward()
    assert all(p.grad is not None for p in parts.model.parameters())
    for name, parameter in parts.model.named_parameters():
        error = (found[name] - parameter.grad).norm()
        assert error <= 1e-5 * parameter.grad.norm() + 1e-7, name
