"""Evaluation metrics against verdicts by hand."""

import math

import pytest

from tercet.train.evaluation.metrics import (
    closed_world_correct,
    open_world_exact,
    open_world_included,
    relative_similarity,
)

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    "output, truth, correct",
    [
        ("<think>x</think> <answer>Least Auklet</answer>", "least_auklet", True),
        ("<answer>least_auklet</answer>", "Least Auklet", True),
        ("<answer>the least auklet, I say</answer>", "least auklet", True),
        ("<answer>crested auklet</answer>", "least auklet", False),
        ("least auklet", "least auklet", False),
        ("<answer></answer> least auklet", "least auklet", False),
        ("<answer>gull</answer> no: <answer>least auklet</answer>", "least auklet", True),
        ("<answer>gull</answer> or a least auklet", "least auklet", False),
        ("<answer>737-300</answer>", "737-30", True),
    ],
)
def test_closed_world(output, truth, correct):
    assert closed_world_correct(output, truth) is correct


@pytest.mark.parametrize(
    "output, truth, cars, included",
    [
        ("<answer>A Least Auklet.</answer>", "least_auklet", False, True),
        ("<answer>least_auklet</answer>", "least_auklet", False, False),
        ("a least auklet", "Least Auklet", False, True),
        ("least auklet <answer> </answer>", "least auklet", False, True),
        ("least auklet <answer>gull</answer>", "least auklet", False, False),
        ("<answer>Acura RL</answer>", "Acura RL Sedan 2012", True, True),
        ("<answer>Acura RL</answer>", "Acura_RL_Sedan_2012", True, True),
        ("<answer>Acura RL</answer>", "Acura RL Sedan 2012", False, False),
        ("<answer>Acura TL</answer>", "Acura RL Sedan 2012", True, False),
    ],
)
def test_open_world_inclusion(output, truth, cars, included):
    assert open_world_included(output, truth, cars) is included


NAMES = ["auklet", "crested auklet", "least auklet", "gull"]


@pytest.mark.parametrize(
    "output, truth, exact",
    [
        ("<answer>a Crested_Auklet</answer>", "crested auklet", True),
        ("<answer>crested auklet</answer>", "auklet", False),
        ("<answer>crested auklet or gull</answer>", "crested auklet", False),
        ("<answer>gull</answer><answer>auklet</answer>", "gull", False),
        ("<think>auklet?</think><answer>gull</answer>", "gull", True),
        ("gull", "gull", False),
        ("<answer></answer>gull", "gull", False),
    ],
)
def test_open_world_exact(output, truth, exact):
    assert open_world_exact(output, truth, NAMES) is exact


@pytest.mark.parametrize(
    "s_pred, s_super, similarity",
    [(1.0, 0.6, 1.0), (0.6, 0.6, 0.0), (0.8, 0.6, 0.5), (0.5, 0.6, 0.0), (0.5, -1.0, 0.75)],
)
def test_relative_similarity(s_pred, s_super, similarity):
    assert relative_similarity(s_pred, s_super) == pytest.approx(similarity, abs=1e-15)


def test_what_cannot_be_scored():
    with pytest.raises(ValueError, match="a number below 1, got 1.0 and 1.0"):
        relative_similarity(1.0, 1.0)
    with pytest.raises(ValueError, match="got nan and 0.5"):
        relative_similarity(math.nan, 0.5)
    with pytest.raises(ValueError, match="must not be empty, got '_'"):
        closed_world_correct("<answer>a</answer>", "_")
    with pytest.raises(ValueError, match="more than body and year, got 'Sedan 2012'"):
        open_world_included("<answer>a</answer>", "Sedan 2012", cars=True)
    with pytest.raises(ValueError, match="'tern' is not a known name"):
        open_world_exact("<answer>tern</answer>", "tern", NAMES)
