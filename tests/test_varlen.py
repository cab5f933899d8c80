"""Variable-length attention: every backend against explicit softmax, and the vision tower on it."""

from __future__ import annotations

import copy
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from support import tiny
from test_prefix_attention import RAGGED, draw, explicit, layout, with_gradients
from torch import Tensor

from tercet.core.data.vision import PromptEncoder
from tercet.core.models import FAMILIES
from tercet.core.types import to_device
from tercet.kernels.prefix_attention import prefix_attention
from tercet.kernels.varlen import (
    CPU,
    FLASH,
    VISION_NAME,
    Bounds,
    Varlen,
    backend_of,
    package_backend,
)

pytestmark = pytest.mark.core

QUERIES = [5, 0, 1, 63, 20]
KEYS = [7, 3, 1, 9, 127]
SCALE = 0.3


def make_bounds(queries: list[int], keys: list[int], device: str = "cpu") -> Bounds:
    ends = [torch.tensor([0, *n]).cumsum(0).int().to(device) for n in (queries, keys)]
    return Bounds(*ends, max(queries), max(keys))


def plain_scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    scores = torch.einsum("ihd,jhd->ihj", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1))
    if causal:
        hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(1)[:, None]
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores * scale


def plain_forward(q, k, v, bounds: Bounds, causal: bool, scale: float):
    """What a flash kernel computes, written out."""
    out, lse = torch.zeros_like(q), q.new_zeros(q.shape[:2])
    a, b = bounds.cu_seqlens_q.tolist(), bounds.cu_seqlens_k.tolist()
    for i in range(len(a) - 1):
        of_q, of_k = slice(a[i], a[i + 1]), slice(b[i], b[i + 1])
        scores = plain_scores(q[of_q], k[of_k], causal, scale)
        values = v[of_k].repeat_interleave(q.shape[1] // v.shape[1], 1)
        lse[of_q] = scores.logsumexp(-1)
        out[of_q] = torch.einsum("ihj,jhd->ihd", scores.softmax(-1), values)
    return out, lse


def plain_backward(grad, q, k, v, out, lse, bounds: Bounds, causal: bool, scale: float):
    """Its backward pass: probabilities from the given log-sum-exp, row terms from the given out."""
    groups = q.shape[1] // k.shape[1]
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    a, b = bounds.cu_seqlens_q.tolist(), bounds.cu_seqlens_k.tolist()
    for i in range(len(a) - 1):
        of_q, of_k = slice(a[i], a[i + 1]), slice(b[i], b[i + 1])
        p = (plain_scores(q[of_q], k[of_k], causal, scale) - lse[of_q][..., None]).exp()
        keys, values = (x[of_k].repeat_interleave(groups, 1) for x in (k, v))
        dp = torch.einsum("ihd,jhd->ihj", grad[of_q], values)
        ds = p * (dp - (grad[of_q] * out[of_q]).sum(-1, keepdim=True)) * scale
        dq[of_q] = torch.einsum("ihj,jhd->ihd", ds, keys)
        for total, part in (
            (dk, torch.einsum("ihj,ihd->jhd", ds, q[of_q])),
            (dv, torch.einsum("ihj,ihd->jhd", p, grad[of_q])),
        ):
            total[of_k] = part.unflatten(1, (-1, groups)).sum(2)
    return dq, dk, dv


PLAIN = Varlen("plain", plain_forward, plain_backward)


@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_the_merge_is_exact_whatever_computes_its_parts(key_heads):
    """The forward's merge, and that its backward gives each part the merged out and lse."""
    segments, seen = layout(RAGGED)
    tensors = draw(len(seen), key_heads, torch.float64)
    ours = with_gradients(prefix_attention, tensors, segments, SCALE, PLAIN)
    expected = with_gradients(explicit, tensors, seen, SCALE)
    for one, other in zip(ours, expected, strict=True):
        assert (one - other).abs().max() < 1e-12


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_the_cpu_backend_is_flash_attention_written_out(causal, key_heads):
    """Also with out and lse of a larger attention: here lse is 0.5 more than the call's own."""
    bounds = make_bounds(QUERIES, QUERIES if causal else KEYS)
    q, k, v, grad = (
        draw(sum(n), heads, torch.float64)[1].detach()
        for n, heads in ((QUERIES, 4), (KEYS, key_heads), (KEYS, key_heads), (QUERIES, 4))
    )
    if causal:
        k, v = k[: len(q)], v[: len(q)]
    v, grad = v.flip(0), grad.flip(0)
    out, lse = CPU.forward(q, k, v, bounds, causal, SCALE)
    for found, want in zip((out, lse), plain_forward(q, k, v, bounds, causal, SCALE), strict=True):
        assert (found - want).abs().max() < 1e-12
    rest = (q, k, v, 0.7 * out, lse + 0.5, bounds, causal, SCALE)
    for found, want in zip(CPU.backward(grad, *rest), plain_backward(grad, *rest), strict=True):
        assert (found - want).abs().max() < 1e-12


def test_the_flash_attn_package_is_called_as_it_wants_to_be(monkeypatch):
    """A stand-in with the signatures of flash-attn 2.8, log-sum-exp heads first."""

    def _flash_attn_varlen_forward(
        q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, softmax_scale, causal, window_size_left=-1
    ):
        assert dropout_p == 0 and window_size_left == -1
        bounds = Bounds(cu_q, cu_k, max_q, max_k)
        out, lse = plain_forward(q, k, v, bounds, causal, softmax_scale)
        return out, lse.T.contiguous(), None, None

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_q, cu_k, max_q, max_k, *rest
    ):
        dropout_p, scale, causal, left, right, softcap, alibi_slopes, deterministic = rest
        assert (dropout_p, left, right, softcap, alibi_slopes) == (0, -1, -1, 0, None)
        assert not deterministic and softmax_lse.shape == out.shape[1::-1]
        bounds = Bounds(cu_q, cu_k, max_q, max_k)
        found = plain_backward(dout, q, k, v, out, softmax_lse.T, bounds, causal, scale)
        for into, gradient in zip((dq, dk, dv), found, strict=True):
            assert into.is_contiguous()
            into.copy_(gradient)

    package = ModuleType("flash_attn")
    package.flash_attn_interface = SimpleNamespace(
        _flash_attn_varlen_forward=_flash_attn_varlen_forward,
        _flash_attn_varlen_backward=_flash_attn_varlen_backward,
    )
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    package_backend.cache_clear()
    segments, seen = layout(RAGGED)
    tensors = draw(len(seen), 2, torch.float64)
    ours = with_gradients(prefix_attention, tensors, segments, SCALE, package_backend())
    package_backend.cache_clear()
    for one, other in zip(ours, with_gradients(explicit, tensors, seen, SCALE), strict=True):
        assert (one - other).abs().max() < 1e-12


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("key_heads", [4, 1])
@pytest.mark.parametrize("which", ["torch", "package"])
def test_flash_attention_errs_at_most_twice_as_much_as_plain(dtype, key_heads, which):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    backend = FLASH if which == "torch" else package_backend()
    if backend is None:
        pytest.skip("needs flash-attn")
    segments, seen = layout(RAGGED)
    tensors = [t.detach() for t in draw(len(seen), key_heads, dtype)]
    exact = [t.double().requires_grad_() for t in tensors]
    tensors = [t.cuda().requires_grad_() for t in tensors]
    assert backend_of(tensors[0]) is (package_backend() or FLASH)
    ours = with_gradients(prefix_attention, tensors, to_device(segments, "cuda"), SCALE, backend)
    plain = with_gradients(explicit, tensors, seen.cuda(), SCALE)
    for one, other, truth in zip(
        ours, plain, with_gradients(explicit, exact, seen, SCALE), strict=True
    ):
        allowed = 2 * (other.cpu() - truth).abs().max() + 1e-4 * truth.abs().max()
        assert (one.cpu() - truth).abs().max() <= allowed


def test_backends_by_device_and_dtype():
    assert backend_of(torch.empty(1)) is CPU
    assert backend_of(torch.empty(1, device="meta", dtype=torch.bfloat16)) is None


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_vision_tower_sees_the_same_in_one_call(architecture, photos):
    """Windows of photos of several sizes, forward and backward, beside transformers' SDPA."""
    parts = tiny(architecture)
    encoder = PromptEncoder(parts)
    prompts = [encoder((parts.banned_ids[0],), (photo,)) for photo in photos]
    images = [image for prompt in prompts for image in prompt.images]
    pixels = torch.cat([image.pixel_values for image in images])
    grids = torch.cat([image.grid_thw for image in images])
    other = copy.deepcopy(parts.model)
    other.set_attn_implementation({"vision_config": VISION_NAME})
    found = []
    for model in (parts.model, other):
        features = torch.cat(model.model.get_image_features(pixels, grids).pooler_output)
        features.square().sum().backward()
        grads = [p.grad for p in model.model.visual.parameters()]
        found.append([features.detach(), *(g for g in grads if g is not None)])
    assert len(found[0]) == len(found[1]) > 10
    for one, two in zip(*found, strict=True):
        assert (one - two).abs().max() <= 1e-5 * one.abs().max() + 1e-6
