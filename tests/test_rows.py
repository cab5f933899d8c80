"""The kernels' row operators beside their PyTorch twins, where the fused loss does not reach."""

from __future__ import annotations

import pytest
import torch
from head_cases import INTERPRETED, gpu

from tercet.kernels import rows

pytestmark = pytest.mark.core

KERNELS = pytest.param(
    "cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 or a GPU")
)
DEVICES = [KERNELS, pytest.param("cuda", marks=[pytest.mark.gpu, gpu])]


def chunk(count, vocabulary, device):
    noise = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(count, vocabulary, generator=noise)
    labels = torch.randint(0, vocabulary, (count,), generator=noise)
    pulls = torch.randn(2, count, generator=noise)
    return logits.to(device), labels.to(device), pulls.to(device)


def test_the_choice_of_operators():
    like = torch.empty(1)
    name = "tercet.kernels.rows_triton" if INTERPRETED else "tercet.kernels.rows"
    assert rows.operators(like).__name__ == name
    assert rows.operators(like.double()).__name__ == "tercet.kernels.rows"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocabulary", [1, 2047, 2048, 2049, 5000])
def test_row_logprobs(vocabulary, device):
    logits, labels, _ = chunk(5, vocabulary, device)
    found = rows.operators(logits).row_logprobs(logits, labels, 0.7)
    for one, other in zip(found, rows.row_logprobs(logits.double(), labels, 0.7), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_row_logprobs_of_what_is_not_a_number(device):
    logits, labels, _ = chunk(4, 300, device)
    labels[0], labels[1] = 300, -100
    logits[2, 7] = float("nan")
    found = rows.operators(logits).row_logprobs(logits, labels, 1.0)[0]
    assert found.isnan().tolist() == [True, True, True, False]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [257, 2048, 10_000])
def test_logits_grad_lies_in_the_logits(vocabulary, dtype, with_entropy, device):
    """Narrower results stand in front of each row, whole, behind tiles read before."""
    logits, labels, pulls = chunk(5, vocabulary, device)
    _, lse, entropy = rows.row_logprobs(logits, labels, 0.7)
    given = (labels, lse, entropy, pulls[0], pulls[1] if with_entropy else None, 0.7)
    wide = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in given]
    want = rows.logits_grad_(logits.double(), *wide, torch.float64)
    memory = logits.data_ptr()
    found = rows.operators(logits).logits_grad_(logits, *given, dtype)
    assert found.dtype == dtype and found.data_ptr() == memory and found.shape == want.shape
    # The interpreter cuts float32 to bfloat16 where a GPU rounds.
    rounding = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(found.double(), want, rtol=rounding, atol=1e-6)
