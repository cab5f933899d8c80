"""Log-probs and entropy of the head without [R, V], against float64, in values and gradients.

On a CPU the PyTorch operators run, with TRITON_INTERPRET=1 and on a GPU the kernels.
"""

from __future__ import annotations

import pytest
import torch
from head_cases import DEVICES, INTERPRETED, assert_accurate, error, gpu

from tercet.kernels.linear_logprobs import linear_logprobs
from tercet.kernels.reference import linear_logprobs_reference

pytestmark = pytest.mark.core

ROWS = [1, 63, 127] if INTERPRETED else [1, 63, 127, 507, 5000]


def head(rows, vocabulary, dtype, device="cpu", dim=32, seed=0):
    noise = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, dim, generator=noise, dtype=torch.float64)
    weight = torch.randn(vocabulary, dim, generator=noise, dtype=torch.float64) * 2 / dim**0.5
    labels = torch.randint(0, vocabulary, (rows,), generator=noise)
    pulls = torch.randn(2, rows, generator=noise, dtype=torch.float64)
    return (x.to(device) for x in (hidden.to(dtype), weight.to(dtype), labels, pulls))


def plain(hidden, weight, labels, temperature):
    """Logits in the weight's own dtype."""
    log_softmax = ((hidden @ weight.T).float() / temperature).log_softmax(-1)
    logprobs = log_softmax.gather(1, labels[:, None]).squeeze(1)
    return logprobs, -(log_softmax.exp() * log_softmax).sum(-1)


def scored(function, hidden, weight, labels, pulls, *arguments, **options):
    """Log-probs, entropy and both gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    outputs = function(*leaves, labels, *arguments, **options)
    sum((pull * x).sum() for pull, x in zip(pulls, outputs, strict=True)).backward()
    return [x.detach() for x in outputs] + [x.grad for x in leaves]


def compare(rows, vocabulary, dtype, device, temperature, **options):
    hidden, weight, labels, pulls = head(rows, vocabulary, dtype, device)
    ours = scored(linear_logprobs, hidden, weight, labels, pulls, temperature, **options)
    wide = (hidden.double(), weight.double())
    exact = scored(linear_logprobs_reference, *wide, labels, pulls, temperature)
    theirs = scored(plain, hidden, weight, labels, pulls, temperature)
    assert ours[0].dtype == ours[1].dtype == torch.promote_types(dtype, torch.float32)
    assert ours[2].dtype == ours[3].dtype == dtype
    for name, *values in zip(
        ("logprobs", "entropy", "d hidden", "d weight"), ours, theirs, exact, strict=True
    ):
        assert_accurate(name, *values)
    return ours, exact


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocabulary", [257, 1000, 4099])
@pytest.mark.parametrize("rows", ROWS)
def test_every_ragged_shape(rows, vocabulary, device):
    ours, exact = compare(rows, vocabulary, torch.float32, device, 0.7)
    for value, want in zip(ours, exact, strict=True):
        assert (value - want).norm() <= 1e-5 * want.norm() + 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype(dtype, temperature, device):
    ours, exact = compare(63, 1000, dtype, device, temperature)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert error(ours[0], exact[0]) <= tolerance * exact[0].abs().max()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocabulary", [151_936, 152_064])
def test_true_vocabularies(vocabulary, device):
    compare(16 if INTERPRETED else 127, vocabulary, torch.float32, device, 1.0)


@pytest.mark.parametrize("chunk_rows", [1, 7, 62, 63, 64])
def test_chunks_do_not_matter(chunk_rows):
    arguments = list(head(63, 257, torch.float64))
    ours = scored(linear_logprobs, *arguments, 0.7, chunk_rows=chunk_rows)
    whole = scored(linear_logprobs, *arguments, 0.7, chunk_rows=1000)
    for one, other in zip(ours, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_with_and_without_gradient_have_the_same_bits():
    hidden, weight, labels, _ = head(63, 1000, torch.float32)
    with torch.no_grad():
        without = linear_logprobs(hidden, weight, labels, 0.7)
    given = linear_logprobs(hidden.requires_grad_(), weight, labels, 0.7)
    assert all(torch.equal(a, b) for a, b in zip(without, given, strict=True))
    assert not without[0].requires_grad and given[0].requires_grad


def test_one_output_alone_and_frozen_inputs():
    hidden, weight, labels, pulls = head(9, 257, torch.float64)
    for i in range(2):
        mine, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
        (pulls[i] * linear_logprobs(mine, weight, labels)[i]).sum().backward()
        (pulls[i] * linear_logprobs_reference(theirs, weight, labels)[i]).sum().backward()
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-14)
    assert weight.grad is None


def test_gradcheck():
    hidden, weight, labels, _ = head(7, 19, torch.float64, dim=5)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logprobs(h, w, labels, 0.7, chunk_rows=3), leaves
    )


def test_strided_inputs():
    hidden, weight, labels, pulls = head(12, 257, torch.float32)
    strided = hidden.T.contiguous().T, weight.T.contiguous().T, labels.repeat_interleave(2)[::2]
    assert not any(x.is_contiguous() for x in strided)
    for one, other in zip(
        scored(linear_logprobs, *strided, pulls),
        scored(linear_logprobs, hidden, weight, labels, pulls),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_no_rows():
    hidden, weight, labels, pulls = head(0, 257, torch.float32)
    logprobs, entropy, d_hidden, d_weight = scored(linear_logprobs, hidden, weight, labels, pulls)
    assert logprobs.shape == entropy.shape == (0,) and d_hidden.shape == (0, 32)
    assert torch.equal(d_weight, torch.zeros_like(weight))


def test_large_logits_stay_finite():
    """A row whose label has all the mass, and one whose label has none of it."""
    hidden = torch.tensor([[300.0], [300.0]])
    weight = torch.tensor([[1.0], [-1.0], [0.0]])
    logprobs, entropy = linear_logprobs(hidden, weight, torch.tensor([0, 1]))
    assert logprobs.tolist() == [0.0, -600.0] and entropy.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden": torch.zeros(3, 5)}, "hidden must be"),
        ({"hidden": torch.zeros(3)}, "hidden must be"),
        ({"weight": torch.zeros(7, 4, dtype=torch.float64)}, "share a float dtype"),
        ({"labels": torch.zeros(3, dtype=torch.int32)}, "labels must be int64"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, "labels must be int64"),
        ({"labels": torch.tensor([0, 7, 0])}, r"\[0, 7\), got 7 in row 1"),
        ({"labels": torch.tensor([0, 0, -100])}, r"got -100 in row 2"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"chunk_rows": 0}, "chunk_rows must be at least 1"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(7, 4),
        "labels": torch.zeros(3, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        linear_logprobs(**(arguments | change))


@pytest.mark.gpu
@gpu
def test_more_logits_than_32_bits_count():
    hidden, weight, labels, pulls = head(15_000, 151_936, torch.bfloat16, "cuda", dim=64)
    values = linear_logprobs(hidden, weight, labels, chunk_rows=15_000)[0]
    some = torch.tensor([0, 14_134, 14_135, 14_999], device="cuda")
    wide = (hidden[some].double(), weight.double(), labels[some])
    assert error(values[some], linear_logprobs_reference(*wide)[0]) < 1e-4


@pytest.mark.gpu
@gpu
def test_a_label_outside_is_nan_on_a_gpu():
    hidden, weight, labels, _ = head(5, 257, torch.float32, "cuda")
    labels[2], labels[3] = 257, -100
    assert linear_logprobs(hidden, weight, labels)[0].isnan().tolist() == [0, 0, 1, 1, 0]
