"""Parts of rewards against values by hand, and their weighted sums."""

from __future__ import annotations

import asyncio

import pytest

from tercet.core.config import TapoConfig
from tercet.core.rewards import (
    PARTS,
    call_reward,
    classification,
    direct_answer,
    format_attribute,
    keep_group,
)
from tercet.core.rollout_config import RolloutConfig
from tercet.core.weighted_reward import PartFailed, WeightedReward
from tercet.rollout.rewarding import load_reward

pytestmark = pytest.mark.core

T, A, W = "<think>a</think>", "<attribute>b</attribute>", "<answer>c</answer>"


@pytest.mark.parametrize(
    ("response", "value"),
    [
        (T + A + W, 1),
        (f" {T}\n\n{A} \t{W}\n", 1),
        ("<think></think><attribute></attribute><answer></answer>", 1),
        ("<think>x < y > z / w</think><attribute>\n</attribute><answer>\n</answer>", 1),
        (T + W + A, 0),
        (A + T + W, 0),
        (T + W, 0),
        (T + A, 0),
        ("", 0),
        (T + A + W + W, 0),
        (T + T + A + W, 0),
        (T + A + W + "</answer>", 0),
        (T + A + "<answer>c", 0),
        ("so " + T + A + W, 0),
        (T + "so" + A + W, 0),
        (T + A + "so" + W, 0),
        (T + A + W + " so", 0),
        ("<think>" + A + W + "</think>", 0),
        ("<think>a<attribute></think>b</attribute>" + W, 0),
        ("< think>a</think>" + A + W, 0),
        ("<THINK>a</THINK>" + A + W, 0),
    ],
)
def test_format_attribute(response, value):
    found = format_attribute(response)
    assert found == value and type(found) is float


@pytest.mark.parametrize(
    ("response", "letter", "value"),
    [
        ("<answer>Least Auklet</answer>", None, 1),
        ("<think>gull</think> <answer>\n least_auklet \n</answer> so", None, 1),
        ("<answer>LEAST   auklet</answer>", None, 1),
        ("<answer>a least auklet</answer>", None, 0),
        ("<answer>least auklets</answer>", None, 0),
        ("<answer>gull</answer>", None, 0),
        ("<answer></answer>", None, 0),
        ("least auklet", None, 0),
        ("<answer>least auklet", None, 0),
        ("<answer>least auklet</answer><answer>least auklet</answer>", None, 0),
        ("<answer>least auklet</answer></answer>", None, 0),
        ("<answer>B</answer>", None, 0),
        ("<answer>B</answer>", "B", 1),
        ("<answer> b </answer>", "B", 1),
        ("<answer>A</answer>", "B", 0),
        ("<answer>least auklet</answer>", "B", 1),
        ("<answer>B. Least_Auklet</answer>", "B", 1),
        ("<answer>A. least auklet</answer>", "B", 0),
        ("<answer>B. gull</answer>", "B", 0),
        ("<answer>A B</answer>", "B", 0),
        ("B", "B", 0),
    ],
)
def test_classification(response, letter, value):
    found = classification(response, "least auklet", letter)
    assert found == value and type(found) is float
    assert classification(response, "Least__Auklet", letter) == value


def test_the_direct_answer_is_the_whole_response():
    assert direct_answer(" Least_Auklet\n", "least auklet") == 1
    assert direct_answer("b", "least auklet", "B") == 1
    assert direct_answer("It is a least auklet", "least auklet") == 0
    assert direct_answer("<answer>least auklet</answer>", "least auklet") == 0


def test_an_empty_truth_is_refused():
    for function in (classification, direct_answer):
        for response in ("<answer>gull</answer>", "gull", ""):
            with pytest.raises(ValueError, match="must not be empty, got ' '"):
                function(response, " ")


NAMES = ("auklet", "gull")


def rows(*responses, truth="auklet", letter=None):
    row = {"ground_truth": truth, "names": NAMES, "group_id": "g7", "letter": letter}
    return [{"response": response, **row} for response in responses]


def results(weights, batch, **options):
    return asyncio.run(call_reward(WeightedReward(weights, **options), batch))


def test_overall_is_the_weighted_sum_and_one_part_is_the_accuracy():
    third = 1 / 3
    weights = {"format_attribute": third, "classification": third, "format": third}
    batch = rows(T + A + "<answer>Auklet</answer>", "<answer>A</answer>", T + W, letter="A")
    found = results(weights, batch)
    assert [f["overall"] for f in found] == pytest.approx([2 / 3, 1 / 3, 1 / 3], abs=1e-15)
    assert [f["accuracy"] for f in found] == [1, 1, 0]
    assert [f["classification"] for f in found] == [1, 1, 0]
    assert [f["format"] for f in found] == [0, 0, 1]
    assert keep_group(found)


def test_fine_r1_as_weights():
    batch = rows(T + "<answer>an auklet</answer>", "<answer>auklet</answer>x", W, "")
    found = results({"format": 0.1, "accuracy": 0.9}, batch)
    assert [f["overall"] for f in found] == pytest.approx([1.0, 0.9, 0, 0], abs=1e-15)
    strict = results({"format_strict": 0.1, "accuracy_strict": 0.9}, batch)
    assert [f["overall"] for f in strict] == pytest.approx([1.0, 0, 0, 0], abs=1e-15)


def test_a_weight_of_0_only_measures():
    (found,) = results({"format": 0.0, "classification": 2.0}, rows(T + W, truth="c"))
    assert found == {"overall": 2.0, "format": 1.0, "classification": 1.0, "accuracy": 1.0}


def test_the_part_that_says_correct_can_be_chosen():
    batch = rows(T + W, "<answer>auklet</answer>")
    assert [f["accuracy"] for f in results({"format": 1, "accuracy": 1}, batch)] == [0, 1]
    chosen = results({"format": 1, "accuracy": 1}, batch, correct="format")
    assert [f["accuracy"] for f in chosen] == [1, 0]
    assert all("accuracy" not in f for f in results({"format": 1.0}, batch))


def fails(batch):
    raise PartFailed("no")


async def later(batch):
    await asyncio.sleep(0)
    return [0.5] * len(batch)


def test_a_part_that_fails_is_left_out_of_its_group_and_counted():
    batch = rows("<answer>auklet</answer>", "<answer>gull</answer>")
    weights = {"classification": 0.2, "later": 0.2, "broken": 0.6}
    found = results(weights, batch, more={"later": later, "broken": fails})
    # (0.2 v + 0.2 0.5) 1.0 / 0.4
    assert [f["overall"] for f in found] == pytest.approx([0.75, 0.25], abs=1e-15)
    assert [f["broken_left_out"] for f in found] == [1.0, 1.0]
    assert [f["later_left_out"] for f in found] == [0.0, 0.0]
    assert all("broken" not in f for f in found)


def test_a_group_without_any_part_teaches_nothing():
    found = results({"format": 0.0, "broken": 1.0}, rows(T + W, W), more={"broken": fails})
    assert [f["overall"] for f in found] == [0.0, 0.0]
    assert not keep_group(found)


def test_a_function_of_ones_own_is_a_part(tmp_path, monkeypatch):
    (tmp_path / "parts.py").write_text(
        "def short(rows):\n    return [{'overall': 1 / (1 + len(r['response']))} for r in rows]\n"
    )
    monkeypatch.chdir(tmp_path)
    reward = WeightedReward({"parts:short": 3.0, "format": 1.0})
    try:
        found = asyncio.run(call_reward(reward, rows("abc", "")))
    finally:
        reward.close()
    assert [f["overall"] for f in found] == pytest.approx([0.75, 3.0], abs=1e-15)
    assert [f["parts:short"] for f in found] == [0.25, 1.0]


@pytest.mark.parametrize(
    ("weights", "options", "said"),
    [
        ({"formats": 1.0}, {}, "a part must be accuracy, .* or module:function, got 'formats'"),
        ({"format": -0.5}, {}, "the weight of format must be at least 0, got -0.5"),
        ({"format": float("nan")}, {}, "the weight of format must be at least 0, got nan"),
        ({"format": 0.0}, {}, "the weights must not sum to 0, got {'format': 0.0}"),
        ({}, {}, "the weights must not sum to 0, got {}"),
        ({"format": 1.0}, {"correct": "accuracy"}, "correct_part must be one of format, got 'acc"),
        ({"nowhere:f": 1.0}, {}, "importing module 'nowhere'"),
    ],
)
def test_weights_without_meaning_are_named(weights, options, said):
    with pytest.raises(ValueError, match=said):
        WeightedReward(weights, **options)


def test_every_part_gives_a_number_a_row():
    for name, part in PARTS.items():
        values = part(rows("<answer>auklet</answer>", ""))
        assert len(values) == 2 and set(values) <= {0.0, 1.0}, name


def test_the_right_genus_has_half_the_credit(tmp_path):
    """By a CSV; a name is right alone, and so is a genus."""
    names = ("red admiral", "painted lady", "brimstone", "common blue", "adonis blue")
    csv = tmp_path / "genera.csv"
    csv.write_text(
        "sub_category,genus\nRed_Admiral,Vanessa\npainted lady,Vanessa\nbrimstone,Gonepteryx\n"
    )
    answers = {
        "<answer>Red Admiral</answer>": 1.0,
        "<answer>a painted_lady</answer>": 0.5,
        "<answer>some kind of vanessa</answer>": 0.5,
        "<answer>brimstone</answer>": 0.0,
        "<answer>red admiral or painted lady</answer>": 0.0,
        "<answer>vanessa, or a brimstone</answer>": 0.0,
        "<answer>adonis blue</answer>": 0.0,  # of no genus in the file
        "<answer>red admiral</answer> and more": 0.0,
        "red admiral": 0.0,
    }
    config = TapoConfig(rollout=RolloutConfig(reward={"hierarchical": 2.0}))
    with pytest.raises(ValueError, match="hierarchical needs data.genus, a CSV of sub_category,ge"):
        load_reward(config)
    config.data.genus = str(csv)
    about = {"ground_truth": "red admiral", "names": names}
    found = asyncio.run(load_reward(config)([about | {"response": r} for r in answers]))
    assert [f["overall"] for f in found] == [2 * value for value in answers.values()]
    assert "accuracy" not in found[0] and "hierarchical_left_out" not in found[0]
    blue = {
        "ground_truth": "common blue",
        "names": names,
        "response": "<answer>adonis blue</answer>",
    }
    assert asyncio.run(load_reward(config)([blue]))[0]["overall"] == 0.0
