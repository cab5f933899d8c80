"""Sampler against trainer: figures and weights by hand, and in a training step."""

from __future__ import annotations

import math

import pytest
import torch

from tercet.core.config import LossConfig
from tercet.core.mismatch import importance_weights, mismatch_figures
from tercet.core.types import Group, Response, Triplet

pytestmark = pytest.mark.core


def response(rollout: list[float], old: list[float] | None) -> Response:
    logprobs = None if old is None else torch.tensor(old)
    tokens = tuple(range(len(rollout)))
    return Response("anchor", tokens, tuple(rollout), "stop", 0, old_logprobs=logprobs)


def group(responses: list[Response]) -> Group:
    return Group("g", Triplet("t", "a", "p", "n", "What?", "bird", "wren"), (1,), responses)


def test_figures_by_hand():
    first = [response([-1.0, -2.0], [-1.0, -1.5]), response([-9.0], [-8.0])]
    first[1].role = "positive"
    second = [response([-3.0], [-3.2]), response([-1.0], None), response([-9.0], [-8.0])]
    second[2].weight_version = 1
    found = mismatch_figures([group(first), group(second)], weight_version=0)
    d = [0.0, 0.5, -0.2]
    assert found["mismatch_mean"] == pytest.approx(0.7 / 3, abs=1e-6)
    assert found["mismatch_max"] == pytest.approx(0.5, abs=1e-6)
    k3 = sum(math.exp(x) - 1 - x for x in d) / 3
    assert found["mismatch_kl"] == pytest.approx(k3, abs=1e-6)
    assert found["mismatch_over"] == pytest.approx(2 / 3)


def test_nothing_scored_gives_no_figures():
    assert mismatch_figures([], 0) == {} == mismatch_figures([group([response([-1.0], None)])], 0)


def test_importance_weights_are_truncated_ratios():
    found = importance_weights(response([-1.0, -2.0, -1.0], [-1.0, -0.5, -2.0]), cap=2.0)
    torch.testing.assert_close(found, torch.tensor([1.0, 2.0, math.exp(-1)]))


def test_a_cap_must_be_positive():
    with pytest.raises(ValueError, match="loss.is_cap must be positive, or None for off, got 0"):
        LossConfig(is_cap=0.0)
