"""Evaluation metrics against verdicts by hand."""

import math

import pytest

from tercet.train.evaluation.metrics import (
    closed_world_correct,
    closed_world_exact,
    open_world_exact,
    open_world_included,
    relative_similarity,
    released_answer,
    released_word,
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
        ("anything", "Hummer 2010", True, True),  # as released: nothing is left of two words
        ("", "Hummer", True, True),
        ("<answer>\n</answer>acura rl", "Acura  RL Sedan 2012", True, True),
    ],
)
def test_open_world_inclusion(output, truth, cars, included):
    assert open_world_included(output, truth, cars) is included


OPTIONS = ("wren", "winter wren", "blue tit", "great_tit")


@pytest.mark.parametrize(
    "answer, letters, truth",
    [
        ("It is a Wren.", False, "wren"),
        ("winter wren", False, "winter wren"),  # in which "wren" does not count
        ("Winter_wren or wren", False, None),
        ("a great tit", False, "great_tit"),
        ("wren, not blue tit", False, None),
        ("tit", False, None),
        ("", False, None),
        ("B", False, None),
        ("B", True, "winter wren"),
        ("(C)", True, "blue tit"),
        ("D. great tit", True, "great_tit"),
        ("D. blue tit", True, None),
        ("A. or B.", True, None),
        ("A wren", True, "wren"),
        ("A blue tit", True, "blue tit"),  # an article is no letter
        ("E.", True, None),
    ],
)
def test_closed_world_strictly(answer, letters, truth):
    output = f"<think>blue tit?</think><answer>{answer}</answer>"
    right = [closed_world_exact(output, option, OPTIONS, letters) for option in OPTIONS]
    assert right == [option == truth for option in OPTIONS]
    assert not closed_world_exact(answer, "wren", OPTIONS, letters)


@pytest.mark.parametrize(
    "path, word",
    [
        ("fgvc_aircraft/data/images/1.jpg", "aircraft"),
        ("bird_200/images/1.jpg", "object"),
        ("birds/cars/1.jpg", "bird"),
        ("stanford-cars/flower/1.jpg", "car"),
        ("flower102/jpg/1.jpg", "flower"),
        ("dogs_120/Images/1.jpg", "object"),
        ("car/1.jpg", "object"),
    ],
)
def test_the_released_word_is_found_in_the_path(path, word):
    assert released_word(path) == word


def test_the_released_answer_is_the_whole_output_where_nothing_is_between_tags():
    assert released_answer("x <answer> wren\n</answer>") == "wren"
    assert released_answer(" wren <answer> </answer>") == " wren <answer> </answer>"
    assert released_answer("wren </answer><answer>") == "wren </answer><answer>"
    assert released_answer("<answer>a</answer>b</answer>c") == "a</answer>b"


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


def test_relative_similarity_of_arrays():
    found = relative_similarity([1.0, 0.8, 0.9, 0.3], [0.6, 0.6, 1.0, 1 - 1e-12])
    assert found.tolist() == pytest.approx([1, 0.5, 0, 0], abs=1e-15)


def test_what_cannot_be_scored():
    with pytest.raises(ValueError, match="must be numbers, got NaN"):
        relative_similarity(math.nan, 0.5)
    with pytest.raises(ValueError, match="must not be empty, got '_'"):
        closed_world_correct("<answer>a</answer>", "_")
    with pytest.raises(ValueError, match="'tern' is not a known name"):
        open_world_exact("<answer>tern</answer>", "tern", NAMES)
