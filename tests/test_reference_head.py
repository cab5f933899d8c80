"""Log-probs and entropy of the head against row-by-row Python floats, closed forms, gradcheck."""

import math

import pytest
import torch

from tercet.kernels.reference import linear_logprobs_reference

pytestmark = pytest.mark.core


def head(rows=7, dim=5, vocab=11, dtype=torch.float64, seed=0):
    noise = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, dim, generator=noise, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocab, dim, generator=noise, dtype=torch.float64).to(dtype)
    return hidden, weight, torch.randint(0, vocab, (rows,), generator=noise)


def softmax_rows(hidden, weight, temperature):
    """Probabilities row by row in Python floats."""
    probabilities = []
    for row in hidden.double().tolist():
        scores = [
            sum(h * w for h, w in zip(row, column, strict=True)) / temperature
            for column in weight.double().tolist()
        ]
        largest = max(scores)
        powers = [math.exp(score - largest) for score in scores]
        probabilities.append([power / sum(powers) for power in powers])
    return torch.tensor(probabilities, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_logprobs_and_entropy_values(temperature):
    hidden, weight, labels = head()
    logprobs, entropy = linear_logprobs_reference(hidden, weight, labels, temperature)
    p = softmax_rows(hidden, weight, temperature)
    torch.testing.assert_close(logprobs, p[range(7), labels].log(), rtol=1e-12, atol=0)
    torch.testing.assert_close(entropy, -(p * p.log()).sum(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_logits_are_float32(dtype):
    hidden, weight, labels = head(rows=63, dim=32, vocab=127, dtype=dtype)
    logprobs, entropy = linear_logprobs_reference(hidden, weight, labels)
    exact = linear_logprobs_reference(hidden.double(), weight.double(), labels)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), exact[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), exact[1], rtol=1e-5, atol=1e-5)


def test_gradients_of_the_head():
    """d loss / d logits = c (onehot - softmax) / temperature; and the entropy by gradcheck."""
    hidden, weight, labels = head()
    temperature, c = 0.7, torch.linspace(-1, 2, 7, dtype=torch.float64)
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprobs, _ = linear_logprobs_reference(*leaves, labels, temperature)
    (c * logprobs).sum().backward()
    onehot = torch.eye(11, dtype=torch.float64)[labels]
    d_logits = c[:, None] * (onehot - softmax_rows(hidden, weight, temperature)) / temperature
    torch.testing.assert_close(leaves[0].grad, d_logits @ weight, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(leaves[1].grad, d_logits.T @ hidden, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logprobs_reference(h, w, labels, temperature), leaves
    )


def test_large_logits_stay_finite():
    hidden, weight, labels = head(dtype=torch.float32)
    leaf = (hidden * 1e6).requires_grad_()
    logprobs, entropy = linear_logprobs_reference(leaf, weight, labels)
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.isfinite().all() and leaf.grad.isfinite().all()
    torch.testing.assert_close(entropy, torch.zeros(7), atol=1e-6, rtol=0)


def test_head_without_rows():
    hidden, weight, labels = head(rows=0)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    logprobs, entropy = linear_logprobs_reference(*leaves, labels)
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.shape == entropy.shape == (0,)
    assert torch.equal(weight.grad, torch.zeros(11, 5, dtype=torch.float64))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": torch.tensor([0, 11])}, r"labels must lie in \[0, 11\), got 11 in row 1"),
        ({"labels": torch.tensor([-100, 0])}, "got -100 in row 0"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels"),
        ({"labels": torch.zeros(2)}, "labels must be int64"),
        ({"hidden": torch.zeros(2, 4)}, "hidden must be"),
        ({"hidden": torch.zeros(2, 5, dtype=torch.int64)}, "float dtype"),
        ({"weight": torch.zeros(11, 5, dtype=torch.float64)}, "share a float dtype"),
        ({"weight": torch.zeros(11, 5, device="meta")}, "one device"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
    ],
)
def test_bad_arguments_of_the_head(change, message):
    arguments = {
        "hidden": torch.zeros(2, 5),
        "weight": torch.zeros(11, 5),
        "labels": torch.zeros(2, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        linear_logprobs_reference(**(arguments | change))
