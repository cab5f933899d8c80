"""LoRA: what is trained, and that the merged weights are the same policy."""

from __future__ import annotations

import asyncio
import copy
import json

import pytest
import torch
from peft import PeftModel
from support import tiny

from tercet.core.config import ModelConfig, ParallelConfig, SftConfig, TapoConfig
from tercet.core.data.vision import PromptEncoder
from tercet.core.models import freeze, load_policy
from tercet.core.rollout_config import RolloutConfig
from tercet.core.types import Request
from tercet.rollout.engine import Sampling
from tercet.rollout.local import LocalEngine
from tercet.train.learner import lora
from tercet.train.learner.lora import add_lora, added_weights, whole_weights
from tercet.train.learner.merged import Export, lora_figures, merge_error
from tercet.train.learner.policy import Policy
from tercet.train.learner.ranks import Ranks
from tercet.train.run.assemble import build_policy, sampled_parts

pytestmark = pytest.mark.core


def with_lora(dtype: torch.dtype, **options) -> torch.nn.Module:
    """A policy with additions that change it."""
    model = tiny().model.to(dtype)
    add_lora(model, ModelConfig(lora_rank=3, lora_alpha=12, **options))
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
    return model


@pytest.mark.parametrize("targets", [None, r".*(qkv|down_proj)"])  # the second: vision too
def test_merged_weights_are_the_same_policy(tmp_path, targets):
    """transformers reads them and computes what the policy with its additions computes."""
    model = with_lora(torch.float64, **({"lora_targets": targets} if targets else {}))
    ids = torch.arange(9, 40)[None]
    patches, grid = torch.randn(48, 1176, dtype=torch.float64), torch.tensor([[1, 4, 12]])
    parts = tiny()
    parts.model.double()
    weights = dict(whole_weights(model))
    assert list(weights) == [name for name, _ in parts.model.named_parameters()]
    parts.save(tmp_path / "merged", weights)
    loaded = load_policy(ModelConfig(path=str(tmp_path / "merged"))).model
    assert loaded.dtype == torch.float64
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, loaded(ids).logits, rtol=0, atol=1e-10)
        ours, theirs = (m.model.visual(patches, grid).pooler_output for m in (model, loaded))
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)
        base = parts.model(ids).logits
        assert not torch.allclose(base, loaded(ids).logits, rtol=0, atol=1e-2)


def test_only_additions_to_the_language_model_are_trained():
    model = with_lora(torch.bfloat16)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2  # A and B, seven matrices, two layers
    assert all(".language_model.layers." in name and ".lora_" in name for name in trained)
    assert {parameter.dtype for parameter in trained.values()} == {torch.bfloat16}
    layer = model.model.language_model.layers[0].mlp.up_proj
    added = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double() * 4
    exact = layer.base_layer.weight.double() + added
    merged = dict(whole_weights(model))["model.language_model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(merged, exact.bfloat16())  # rounded once


@pytest.mark.parametrize(
    "options, named",
    [
        (
            {"lora_targets": "nothing"},
            "lora_targets 'nothing' matches no layer's whole name; a name",
        ),
        (
            {"lora_targets": "all-linear"},
            "model.lora_targets 'all-linear' matches no layer's whole",
        ),
        ({"lora_targets": "q_proj"}, "model.lora_targets 'q_proj' matches no layer's whole name"),
        ({"lora_targets": "("}, r"model.lora_targets '\(' is no regular expression"),
        ({"lora_targets": "(.*)*(.*)*(.*)*_proj!"}, "not matched within 0.2 s: a repeat within"),
        ({"lora_targets": ".*norm1"}, r"lora_targets '.\*norm1' matches .*norm1', .* no linear"),
        ({"lora_targets": ".*"}, "matches '', which is no linear layer"),
        ({"lora_targets": ".*embed_tokens"}, "no linear layer but Embedding"),
        ({"lora_targets": ".*patch_embed.proj"}, "no linear layer but Conv3d"),
        ({"lora_targets": "lm_head"}, "matches 'lm_head', the head, which takes no additions"),
        ({"lora_rank": -1}, "model.lora_rank must be at least 0"),
        ({"lora_rank": 4, "lora_alpha": 0}, "model.lora_alpha positive, got 4 and 0"),
    ],
)
def test_bad_options_are_named(options, named, monkeypatch):
    monkeypatch.setattr(lora, "MATCH_S", 0.2)
    with pytest.raises(ValueError, match=named):
        add_lora(tiny().model, ModelConfig(**({"lora_rank": 4} | options)))


def test_layers_of_a_frozen_tower_take_no_additions():
    model = tiny().model
    freeze(model, vision=True, merger=False)
    with pytest.raises(
        ValueError, match=r"matches 'model.visual.blocks.0.\S+', which model.freeze_"
    ):
        add_lora(model, ModelConfig(lora_rank=4, lora_targets=r".*(qkv|down_proj)"))
    add_lora(model, ModelConfig(lora_rank=4, lora_targets=r".*merger\.mlp\.[02]"))
    assert len(dict(added_weights(model))) == 2 * 2


# what rounding loses, and who gets what


def lora_config(kind=TapoConfig, **rollout):
    model = ModelConfig(lora_rank=4, lora_alpha=8, path="the/base")
    return kind(model=model, **({"rollout": RolloutConfig(**rollout)} if rollout else {}))


def learn(model: torch.nn.Module, size: float) -> None:
    """As a step would, add to every B."""
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += size * torch.randn(parameter.shape, generator=noise)


def lora_policy(dtype=torch.bfloat16, size=1e-5, config=None) -> tuple[Policy, Ranks]:
    ranks, parts = Ranks(torch.device("cpu"), ParallelConfig()), tiny()
    parts.model.to(dtype)
    policy = build_policy(parts, config or lora_config(engine="local"), ranks)
    learn(policy.model, size)
    return policy, ranks


@pytest.mark.parametrize(
    ("dtype", "size", "least", "most"),
    [
        (torch.bfloat16, 1e-5, 0.8, 1.1),
        (torch.bfloat16, 1e-2, 1e-3, 0.2),
        (torch.float32, 1e-5, 1e-6, 0.1),
    ],
)
def test_the_error_of_merging_is_that_of_the_merged_weights(dtype, size, least, most):
    policy, ranks = lora_policy(dtype, size)
    before, merged = dict(tiny().model.to(dtype).named_parameters()), dict(policy.named_weights())
    added = dict(added_weights(policy.model))
    lost = total = 0.0
    for name in added:
        if ".lora_A." in name:
            layer = name.partition(".lora_A.")[0]
            change = added[name.replace("_A.", "_B.")].double() @ added[name].double() * 2
            weight = merged[f"{layer}.weight"].double() - before[f"{layer}.weight"].double()
            lost += (weight - change).square().sum().item()
            total += change.square().sum().item()
    expected = (lost / total) ** 0.5
    assert merge_error(policy, ranks) == pytest.approx(expected, rel=2e-2)
    assert least < expected < most


def test_a_large_error_is_warned_of_and_logged(recwarn):
    policy, ranks = lora_policy(size=1e-5)
    assert lora_figures(policy, ranks)["lora_merge_error"] > 0.9
    assert "lora_merge_error is above 0.2" in str(recwarn.pop(UserWarning).message)
    policy, ranks = lora_policy(torch.float32, size=0.1)
    assert 0 < lora_figures(policy, ranks)["lora_merge_error"] < 1e-3
    policy, ranks = lora_policy(size=0.0)
    assert lora_figures(policy, ranks) == {"lora_merge_error": 0.0}
    assert lora_figures(Policy(tiny()), ranks) == {} and not len(recwarn)


def test_the_in_process_engine_samples_what_is_trained():
    """Merged and rounded, the weights would give other log-probs."""
    config = lora_config(engine="local")
    ranks, parts = Ranks(torch.device("cpu"), ParallelConfig()), tiny()
    parts.model.bfloat16()
    sampled = sampled_parts(parts, config, ranks)
    assert sampled is parts  # no copy
    engine = LocalEngine(sampled, PromptEncoder(sampled))
    policy = build_policy(parts, config, ranks)
    learn(policy.model, 2e-4)
    merged = tiny().model.bfloat16()
    merged.load_state_dict(dict(policy.named_weights()), strict=False)
    policy.model.double()  # computed without rounding from here on
    engine.update_weights(policy.sampled_weights(), 1)
    assert engine.weight_version == 1
    request = Request("r", "r", tuple(range(9, 30)), (), 4, 0, 0)

    async def collect():
        return [c async for c in engine.generate([request], Sampling(max_tokens=8))]

    gaps = {"trained": [], "merged": []}
    trained = copy.deepcopy(policy.model)
    trained.set_attn_implementation("sdpa")
    for completion in asyncio.run(collect()):
        sampled = torch.tensor(completion.rollout_logprobs, dtype=torch.float64)
        ids = torch.tensor([[*request.prompt_ids, *completion.token_ids]])
        for name, model in {"trained": trained, "merged": merged.double()}.items():
            with torch.no_grad():
                rows = model(ids).logits[0, len(request.prompt_ids) - 1 : -1]
            logprobs = rows.log_softmax(-1).gather(-1, ids[0, len(request.prompt_ids) :, None])
            gaps[name].append((logprobs[:, 0] - sampled).abs())
    means = {name: torch.cat(gap).mean() for name, gap in gaps.items()}
    assert means["trained"] < 1e-6 and means["merged"] > 1e-4


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """The same names, base and additions, with the same bits."""
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys() and any(".lora_" in name for name in ours)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_a_copy_that_samples_gets_the_additions(monkeypatch):
    config = lora_config(engine="local")
    ranks, parts = Ranks(torch.device("cpu"), ParallelConfig()), tiny()
    ranks.mesh = object()  # as if it were sharded
    state = torch.random.get_rng_state()
    sampled = sampled_parts(parts, config, ranks)
    assert torch.equal(torch.random.get_rng_state(), state) and sampled.model is not parts.model
    ranks.mesh = None
    policy = build_policy(parts, config, ranks)
    learn(policy.model, 1e-2)
    engine = LocalEngine(sampled, PromptEncoder(sampled))
    sent = dict(policy.sampled_weights())
    assert len(sent) == 2 * 7 * 2 and all(".lora_" in name for name in sent)
    engine.update_weights(iter(sent.items()), 1)
    assert_same_weights(sampled.model, policy.model)


@pytest.mark.parametrize("served", ["policy", "float32"])
def test_what_servers_get(served):
    policy, _ = lora_policy(config=lora_config(engine="sglang", served_dtype=served))
    sent, merged = dict(policy.sampled_weights()), dict(policy.named_weights())
    assert list(sent) == list(merged)
    name = "model.language_model.layers.0.mlp.up_proj"
    layer = policy.model.get_submodule(name)
    added = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float() * 2
    exact = layer.base_layer.weight.float() + added
    dtype = torch.float32 if served == "float32" else torch.bfloat16
    assert {weight.dtype for weight in sent.values()} == {dtype}
    assert torch.equal(sent[f"{name}.weight"], exact.to(dtype))
    moved = (sent[f"{name}.weight"] != layer.base_layer.weight).float().mean()
    assert moved > 0.9 if served == "float32" else moved < 0.2


def test_an_export_holds_the_adapter_its_base_and_what_merging_lost(tmp_path):
    base, folder = tiny(), tmp_path / "merged"
    base.model.bfloat16()
    base.save(tmp_path / "base")
    parts = load_policy(ModelConfig(path=str(tmp_path / "base")))
    ranks = Ranks(torch.device("cpu"), ParallelConfig())
    options = ModelConfig(lora_rank=4, lora_alpha=8, path=str(tmp_path / "base"))
    policy = build_policy(parts, SftConfig(model=options), ranks)
    learn(policy.model, 1e-5)
    export = Export.take(policy, ranks, copy=True)
    export.save(parts, folder)
    loaded = load_policy(ModelConfig(path=str(folder))).model  # the merged one
    assert torch.equal(
        loaded.model.language_model.layers[1].mlp.up_proj.weight,
        dict(policy.named_weights())["model.language_model.layers.1.mlp.up_proj.weight"],
    )
    text = (folder / "README.md").read_text()
    assert f"rounding: {merge_error(policy, ranks):.3g} (" in text and "to bfloat16" in text
    options = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert options["base_model_name_or_path"] == str(tmp_path / "base") and str(tmp_path) in text
    assert (options["r"], options["lora_alpha"], options["peft_type"]) == (4, 8, "LORA")
    plain = PeftModel.from_pretrained(
        load_policy(ModelConfig(path=str(tmp_path / "base"))).model, folder / "adapter"
    )
    assert_same_weights(plain.base_model.model, policy.model)
    with pytest.raises(ValueError, match="is a LoRA adapter"):
        load_policy(ModelConfig(path=str(folder / "adapter")))


@pytest.mark.parametrize("parts_written", ["both", "adapter", "merged"])
def test_the_adapter_on_its_base_gives_the_log_probs_of_the_merged_weights(tmp_path, parts_written):
    """In float32, read back by PEFT and by transformers; each is written where it is asked for."""
    tiny().save(tmp_path / "base")
    parts = load_policy(
        options := ModelConfig(lora_rank=4, lora_alpha=8, path=str(tmp_path / "base"))
    )
    ranks = Ranks(torch.device("cpu"), ParallelConfig())
    policy = build_policy(parts, SftConfig(model=options), ranks)
    learn(policy.model, 3e-2)
    Export.take(policy, ranks, False, parts_written).save(parts, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert ("adapter" in names, "model.safetensors" in names) == (
        parts_written != "merged",
        parts_written != "adapter",
    )
    ids = torch.arange(9, 40)[None]
    found = {}
    with torch.no_grad():
        found["trained"] = policy.model(ids).logits.log_softmax(-1)
        if "adapter" in names:
            base = load_policy(ModelConfig(path=str(tmp_path / "base"))).model
            found["PEFT"] = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")(ids)
        if "model.safetensors" in names:
            found["merged"] = load_policy(ModelConfig(path=str(tmp_path / "out"))).model(ids)
        else:
            with pytest.raises(ValueError, match="is a LoRA adapter: give the folder of a whole"):
                load_policy(ModelConfig(path=str(tmp_path / "out")))
        started = tiny().model(ids).logits.log_softmax(-1)
    assert not torch.allclose(found["trained"], started, atol=1e-2)
    for name in found.keys() - {"trained"}:
        logprobs = found[name].logits.log_softmax(-1)
        torch.testing.assert_close(logprobs, found["trained"], rtol=0, atol=2e-5)


def test_an_export_without_lora_is_the_policy_alone(tmp_path):
    policy = Policy(parts := tiny())
    Export.take(policy, Ranks(torch.device("cpu"), ParallelConfig()), copy=False).save(
        parts, tmp_path
    )
    assert not (tmp_path / "adapter").exists() and not (tmp_path / "README.md").exists()
    assert load_policy(ModelConfig(path=str(tmp_path))).model.dtype == torch.float32
