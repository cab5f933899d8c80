"""Which visual concepts say most about one photo: the information-bottleneck selection of stage 1.

With a of A, the embeddings of this photo's descriptions, and c of C, those of all other photos'
descriptions (all of unit length), a candidate concept b scores (Shi et al. 2025, arXiv 2502.14044)

    score(b) = sum_a log( e^(a.b/t) / (e^(a.b/t) + sum_c e^(b.c/t)) ),   t = 0.1

It is close to 0 for a concept that the photo's descriptions are near and the others are far from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 1 << 20
"""Most numbers of a block of `others`, and of its products with the concepts."""


def concept_scores(
    descriptions: Tensor, concepts: Tensor, others: Tensor, temperature: float = 0.1
) -> Tensor:
    """Score candidate concepts of one photo; the sum over `others` never holds l x n numbers.

    Args:
        descriptions: [m, D] embeddings of this photo's descriptions.
        concepts: [n, D] embeddings of the candidates.
        others: [l, D] embeddings of all other photos' descriptions; with l = 0 every score is 0.
        temperature: above 0.

    Returns:
        [n] float64.

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite, a bad temperature.
    """
    named = {"descriptions": descriptions, "concepts": concepts, "others": others}
    found = {name: torch.as_tensor(value) for name, value in named.items()}
    width = found["concepts"].shape[-1] if found["concepts"].ndim else 0
    for name, value in found.items():
        if value.ndim != 2 or value.shape[1] != width:
            raise ValueError(f"{name} must be [rows, {width}], got {list(value.shape)}")
        if not value.isfinite().all():
            raise ValueError(f"{name} must be finite numbers")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be above 0, got {temperature}")
    wanted = found["concepts"].double() / temperature  # [n, D]
    away = wanted.new_full((len(wanted),), -torch.inf)  # [n] log of the sum over others
    for block in found["others"].split(max(1, BLOCK // max(1, width, len(wanted)))):
        products = block.double() @ wanted.T  # [block, n]
        away = torch.logaddexp(away, products.logsumexp(dim=0))
    near = found["descriptions"].double() @ wanted.T  # [m, n]
    return -torch.logaddexp(near.new_zeros(()), away - near).sum(dim=0)


def select_concepts(
    texts: Sequence[str], scores: Tensor, spread: float = 0.4, least: int = 3
) -> list[str]:
    """The concepts that score above mean + spread x standard deviation (unbiased), best first.

    Args:
        texts: the n candidates; of equal scores the earlier one comes first.
        scores: [n], as `concept_scores` gives them.
        spread: standard deviations above the mean.
        least: where fewer are kept, that many of the best are returned, or all n if there are
            fewer.

    Raises:
        ValueError: another number of scores than texts, or one that is not finite.
    """
    scores = torch.as_tensor(scores, dtype=torch.float64)
    if scores.shape != (len(texts),) or not scores.isfinite().all():
        raise ValueError(f"{len(texts)} texts need as many finite scores, got {scores.tolist()}")
    order = scores.argsort(descending=True, stable=True).tolist()
    above = 0
    if len(texts) > 1:
        above = int((scores > scores.mean() + spread * scores.std()).sum())
    return [texts[index] for index in order[: max(above, least)]]
