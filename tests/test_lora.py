"""LoRA: what is trained, and that the merged weights are the same policy."""

from __future__ import annotations

import pytest
import torch
from support import tiny

from tercet.core.config import ModelConfig
from tercet.core.models import load_policy
from tercet.train.learner.lora import add_lora, whole_weights

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
        ({"lora_rank": 4, "lora_targets": "nothing"}, "model.lora_targets 'nothing'"),
        ({"lora_rank": 4, "lora_targets": ".*norm1"}, "model.lora_targets '.\\*norm1'"),
        ({"lora_rank": -1}, "model.lora_rank must be at least 0"),
        ({"lora_rank": 4, "lora_alpha": 0}, "model.lora_alpha positive, got 4 and 0"),
    ],
)
def test_bad_options_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        add_lora(tiny().model, ModelConfig(**options))
