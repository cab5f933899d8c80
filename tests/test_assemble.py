"""Policies as options ask for them."""

from __future__ import annotations

import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from support import tiny
from torch._dynamo.utils import counters
from torch.nn import functional

from tercet.core.config import ModelConfig, ParallelConfig, SftConfig
from tercet.core.models import load_policy
from tercet.core.packing import plain_batch
from tercet.core.types import EncodedPrompt
from tercet.train.learner.ranks import Ranks
from tercet.train.run.assemble import build_policy, use_liger

ROWS = torch.arange(20, 30)


def loss_and_gradients(config: SftConfig, device: str = "cpu", change=lambda model: None):
    ranks, parts = Ranks(torch.device(device), config.parallel), tiny()
    change(parts.model.to(device))
    policy = build_policy(parts, config, ranks).train()
    prompt = EncodedPrompt(torch.arange(9, 20), torch.arange(11).expand(3, 11), 11, ())
    batch = plain_batch([(prompt, [ROWS[:4].tolist(), ROWS[4:].tolist()])], 10.0)
    loss, _ = policy(batch, "cross_entropy")
    loss.backward()
    grads = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def assert_same(loss, grads, other_loss, other_grads) -> None:
    assert torch.allclose(loss, other_loss, rtol=1e-5)
    assert grads.keys() == other_grads.keys()
    for name, grad in grads.items():
        assert (grad - other_grads[name]).norm() <= 1e-4 * grad.norm() + 1e-6, name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_compute_the_same(checkpointing):
    loss, grads = loss_and_gradients(SftConfig())
    torch._dynamo.reset()
    counters.clear()
    model = ModelConfig(compile=True, gradient_checkpointing=checkpointing)
    compiled_loss, compiled_grads = loss_and_gradients(SftConfig(model=model))
    assert counters["stats"]["unique_graphs"] >= 4  # two norms, MLP, around attention
    assert_same(loss, grads, compiled_loss, compiled_grads)


@pytest.mark.core
def test_a_policy_without_data_has_the_shapes_of_the_stored_one(tmp_path):
    tiny().save(tmp_path / "policy")
    model = ModelConfig(path=str(tmp_path / "policy"))
    whole, empty = load_policy(model), load_policy(model, "meta")
    assert all(parameter.is_meta for parameter in empty.model.parameters())
    shapes = [
        {n: (p.shape, p.dtype) for n, p in x.model.named_parameters()} for x in (whole, empty)
    ]
    assert shapes[0] == shapes[1] and whole.stop_ids == empty.stop_ids
    assert empty.model.lm_head.weight is empty.model.model.language_model.embed_tokens.weight
    ranks = Ranks(torch.device("cpu"), ParallelConfig())
    policies = [build_policy(parts, SftConfig(), ranks) for parts in (whole, empty)]
    assert {policy.attention for policy in policies} == {"flash attention for CPUs"}
    assert {policy.device for policy in policies} == {ranks.device}


@pytest.mark.core
def test_mixed_precision_needs_float32_parameters():
    parts = tiny()
    parts.model.bfloat16()
    config = SftConfig(parallel=ParallelConfig(mixed_precision=True))
    ranks = Ranks(torch.device("cpu"), ParallelConfig())
    ranks.mesh = object()
    with pytest.raises(ValueError, match="mixed_precision needs float32.*got torch.bfloat16"):
        build_policy(parts, config, ranks)


@pytest.mark.core
def test_liger_where_it_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", None)
    with pytest.raises(ValueError, match="model.liger needs the package liger-kernel"):
        use_liger(tiny().model)
    config = SftConfig(model=ModelConfig(liger=True))
    with pytest.raises(ValueError, match="model.liger needs a GPU"):
        build_policy(tiny(), config, Ranks(torch.device("cpu"), ParallelConfig()))


def test_liger_stands_in_norms_and_mlps(monkeypatch):
    """Its kernels need a GPU: here PyTorch's own functions take their place, and are counted."""
    calls = Counter()

    def liger_rms_norm(x, weight, eps):
        calls["norm"] += 1
        return functional.rms_norm(x, weight.shape, weight, eps)

    def liger_swiglu(gate, up):
        calls["swiglu"] += 1
        return functional.silu(gate) * up

    module = SimpleNamespace(liger_rms_norm=liger_rms_norm, liger_swiglu=liger_swiglu)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", module)
    loss, grads = loss_and_gradients(SftConfig())
    liger_loss, liger_grads = loss_and_gradients(SftConfig(), change=use_liger)
    assert calls == {"norm": 5, "swiglu": 2}  # two layers, and the last norm
    assert_same(loss, grads, liger_loss, liger_grads)


@pytest.mark.gpu
def test_liger_computes_the_same():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pytest.importorskip("liger_kernel")
    liger = SftConfig(model=ModelConfig(liger=True))
    assert_same(*loss_and_gradients(SftConfig(), "cuda"), *loss_and_gradients(liger, "cuda"))
