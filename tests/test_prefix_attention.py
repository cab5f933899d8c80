"""Shared-prefix attention, forward and backward, against softmax over an explicit mask."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tercet.core.packing import pack
from tercet.core.types import EncodedPrompt, Segments
from tercet.kernels import prefix_attention as kernel
from tercet.kernels.prefix_attention import prefix_attention
from tercet.kernels.reference import prefix_attention_reference

pytestmark = pytest.mark.core

RAGGED = [(7, [5, 1, 0, 9]), (1, [4]), (4, [0]), (63, [1, 2, 127]), (2, [])]
"""Prompt lengths with the lengths of their responses."""
SHAPES = {
    "ragged": RAGGED,
    "one response": [(316, [350])],
    "equal": [(16, [8] * 5)] * 3,
    "prompts alone": [(3, []), (5, [])],
}


def layout(prompts: list[tuple[int, list[int]]]) -> tuple[Segments, Tensor]:
    """Segments as packing makes them, and who sees whom, counted by hand."""
    packed = pack(
        [
            (
                EncodedPrompt(torch.arange(n), torch.arange(n).expand(3, -1), n, ()),
                [[9] * (m + 1) if m else [] for m in responses],
            )
            for n, responses in prompts
        ]
    )
    seen = torch.zeros(packed.num_tokens, packed.num_tokens, dtype=torch.bool)
    start = 0
    for n, responses in prompts:
        place = start + n
        seen[start:place, start:place] = torch.ones(n, n, dtype=torch.bool).tril()
        for m in responses:
            seen[place : place + m, start : start + n] = True
            seen[place : place + m, place : place + m] = torch.ones(m, m, dtype=torch.bool).tril()
            place += m
        start = place
    return packed.segments, seen


def explicit(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v)


def draw(length: int, key_heads: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length + key_heads)
    shapes = [(length, heads, 16) for heads in (4, key_heads, key_heads)]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def with_gradients(function, tensors: list[Tensor], *rest) -> list[Tensor]:
    out = function(*tensors, *rest)
    torch.manual_seed(3)
    upstream = torch.randn(out.shape, dtype=torch.float64).to(out)
    return [out, *torch.autograd.grad(out, tensors, upstream)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_float64_equals_the_explicit_softmax(shape, key_heads):
    segments, seen = layout(SHAPES[shape])
    tensors = draw(len(seen), key_heads, torch.float64)
    ours = with_gradients(prefix_attention, tensors, segments, 0.3)
    expected = with_gradients(explicit, tensors, seen, 0.3)
    dense = with_gradients(prefix_attention_reference, tensors, segments, 0.3)
    for one, other, third in zip(ours, expected, dense, strict=True):
        assert (one - other).abs().max() < 1e-12
        assert (third - other).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_plain_attention(dtype):
    segments, seen = layout(RAGGED)
    tensors = draw(len(seen), 2, dtype)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    ours = with_gradients(prefix_attention, tensors, segments, 0.3)
    plain = with_gradients(explicit, tensors, seen, 0.3)
    expected = with_gradients(explicit, exact, seen, 0.3)
    for one, other, truth in zip(ours, plain, expected, strict=True):
        allowed = 2 * (other - truth).abs().max() + 1e-4 * truth.abs().max()
        assert (one - truth).abs().max() <= allowed


def test_the_same_bits_every_time():
    segments, _ = layout(RAGGED)
    tensors = draw(int(segments.cu_seqlens[-1]), 2, torch.float32)
    first = with_gradients(prefix_attention, tensors, segments, 0.3)
    for again in (with_gradients(prefix_attention, tensors, segments, 0.3) for _ in range(3)):
        assert all(map(torch.equal, first, again))


def test_large_scores_stay_finite():
    segments, seen = layout(RAGGED)
    tensors = [(40 * t).detach().requires_grad_() for t in draw(len(seen), 2, torch.float64)]
    ours = with_gradients(prefix_attention, tensors, segments, 1.0)
    expected = with_gradients(explicit, tensors, seen, 1.0)
    for one, other in zip(ours, expected, strict=True):
        assert torch.isfinite(one).all()
        assert (one - other).abs().max() <= 1e-9 * other.abs().max()


@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_decoding_equals_the_explicit_softmax_and_repeats_no_key(monkeypatch, key_heads):
    """Rows of one new token each, padded on the left, as transformers calls it."""
    length, padding, met = 9, (0, 3, 8), []
    rows = [draw(length, key_heads, torch.float64) for _ in padding]
    q, k, v = (torch.stack(part).transpose(1, 2).detach() for part in zip(*rows, strict=True))
    valid = torch.arange(length) >= torch.tensor(padding)[:, None]
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, *given, **options):
        met.append(key.shape)
        return attend(query, key, *given, **options)

    monkeypatch.setattr(kernel, "scaled_dot_product_attention", watched)
    module = SimpleNamespace(num_key_value_groups=4 // key_heads)
    ours, _ = kernel._attention(module, q[:, :, -1:], k, v, valid[:, None, None], scaling=0.3)
    for n, row in enumerate(rows):
        expected = explicit(*row, valid[n].expand(length, -1), 0.3)[-1]
        assert (ours[n, 0] - expected).abs().max() < 1e-12
    assert met == ([] if key_heads == 4 else [k.shape])  # with as many key heads it is theirs
