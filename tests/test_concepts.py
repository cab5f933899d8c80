"""Concept selection against its formula, computed term by term."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from tercet.core import concepts
from tercet.core.concepts import concept_scores, select_concepts

pytestmark = pytest.mark.core


def unit(*shape: int, seed: int) -> torch.Tensor:
    numbers = torch.randn(*shape, dtype=torch.float64, generator=torch.manual_seed(seed))
    return torch.nn.functional.normalize(numbers, dim=-1)


def by_terms(descriptions, wanted, others, temperature) -> list[float]:
    """The formula in plain Python; math.exp(1 / 0.1) is far from overflow."""

    def product(x, y) -> float:
        return math.exp(sum(p * q for p, q in zip(x, y, strict=True)) / temperature)

    scores = []
    for b in wanted.tolist():
        away = math.fsum(product(b, c) for c in others.tolist())
        near = [product(a, b) for a in descriptions.tolist()]
        scores.append(math.fsum(math.log(n / (n + away)) for n in near))
    return scores


@pytest.mark.parametrize("m, n, rows", [(1, 1, 1), (3, 7, 5), (10, 63, 127), (2, 5, 0), (4, 1, 9)])
@pytest.mark.parametrize("temperature", [0.1, 0.01, 1.0])
def test_scores_are_the_formula(m, n, rows, temperature):
    a, b, c = unit(m, 16, seed=1), unit(n, 16, seed=2), unit(rows, 16, seed=3)
    found = concept_scores(a, b, c, temperature)
    assert found.dtype == torch.float64 and found.shape == (n,)
    expected = torch.tensor(by_terms(a, b, c, temperature), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_default_temperature_is_a_tenth():
    a, b, c = unit(3, 8, seed=1), unit(4, 8, seed=2), unit(5, 8, seed=3)
    assert torch.equal(concept_scores(a, b, c), concept_scores(a, b, c, 0.1))


def test_without_others_every_concept_scores_nothing():
    found = concept_scores(unit(3, 8, seed=1), unit(2, 8, seed=2), torch.zeros(0, 8))
    assert found.tolist() == [0.0, 0.0]


def test_extreme_products_neither_overflow_nor_vanish():
    """At 0.001 the products reach e^1000: log(e^1000 / (e^1000 + e^-1000)) is -e^-2000, so 0."""
    a = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    assert concept_scores(a, a, -a, 0.001).tolist() == [0.0]
    assert concept_scores(-a, a, a, 0.001).tolist() == [-2000.0]


def test_the_sum_over_others_is_streamed(monkeypatch):
    """In blocks, in any order, and never l x n numbers at once."""
    a, b, c = unit(3, 8, seed=1), unit(20, 8, seed=2), unit(500, 8, seed=3)
    whole = concept_scores(a, b, c)
    monkeypatch.setattr(concepts, "BLOCK", 60)
    seen = []
    plain = torch.Tensor.logsumexp

    def counted(self, *args, **kwargs):
        seen.append(self.numel())
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "logsumexp", counted)
    torch.testing.assert_close(concept_scores(a, b, c), whole, rtol=1e-13, atol=0)
    torch.testing.assert_close(concept_scores(a, b, c.flip(0)), whole, rtol=1e-13, atol=0)
    assert max(seen) == 60 and len(seen) == 2 * 167


def test_float32_is_computed_in_float64():
    a, b, c = (unit(4, 8, seed=s).float() for s in (1, 2, 3))
    found = concept_scores(a, b, c)
    assert torch.equal(found, concept_scores(a.double(), b.double(), c.double()))


def test_numpy_arrays_are_read_too():
    a, b, c = unit(2, 4, seed=1), unit(3, 4, seed=2), unit(5, 4, seed=3)
    assert torch.equal(concept_scores(a.numpy(), b.numpy(), c.numpy()), concept_scores(a, b, c))


@pytest.mark.parametrize(
    "a, b, c, temperature, named",
    [
        (torch.ones(2, 3), torch.ones(2, 4), torch.ones(1, 4), 0.1, r"descriptions .* \[2, 3\]"),
        (torch.ones(4), torch.ones(2, 4), torch.ones(1, 4), 0.1, "descriptions must be"),
        (torch.ones(2, 4), torch.ones(2, 4), torch.ones(0, 3), 0.1, "others must be"),
        (torch.ones(2, 4), torch.ones(2, 4), torch.full((1, 4), torch.nan), 0.1, "others .*finite"),
        (torch.ones(2, 4), torch.ones(2, 4), torch.ones(1, 4), 0.0, "temperature must be above 0"),
        (torch.ones(2, 4), torch.ones(2, 4), torch.ones(1, 4), math.nan, "temperature"),
    ],
)
def test_bad_input_is_named(a, b, c, temperature, named):
    with pytest.raises(ValueError, match=named):
        concept_scores(a, b, c, temperature)


def test_concepts_above_the_spread_are_kept_best_first():
    texts = list("abcdefghij")
    scores = [-9.0, -1.0, -9.5, -2.0, -8.0, -0.5, -1.5, -9.0, -7.0, -8.5]
    bound = statistics.mean(scores) + 0.4 * statistics.stdev(scores)
    expected = [t for s, t in sorted(zip(scores, texts, strict=True), reverse=True) if s > bound]
    assert select_concepts(texts, torch.tensor(scores)) == expected == list("fbgd")
    assert select_concepts(texts, scores, spread=1.0, least=1) == list("fbg")


def test_the_standard_deviation_is_the_unbiased_one():
    """Of 0, 0, 1: mean 1/3, deviation 0.577 (biased: 0.471); 1 lies 1.155 of them above."""
    assert select_concepts("abc", [0.0, 0.0, 1.0], spread=1.15, least=0) == ["c"]
    assert select_concepts("abc", [0.0, 0.0, 1.0], spread=1.16, least=0) == []


@pytest.mark.parametrize(
    "scores, kept",
    [([], ""), ([1.0], "a"), ([1.0, 2.0], "ba"), ([1.0] * 5, "abc"), ([0.0, 5.0, 0.0, 0.0], "bac")],
)
def test_at_least_three_where_there_are_three(scores, kept):
    assert select_concepts("abcde"[: len(scores)], scores) == list(kept)


@pytest.mark.parametrize("scores", [[1.0], [1.0, math.nan], [[1.0, 2.0]]])
def test_scores_that_do_not_fit_are_refused(scores):
    with pytest.raises(ValueError, match="2 texts need as many finite scores"):
        select_concepts(["a", "b"], scores)
