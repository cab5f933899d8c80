"""Rewards against values by hand, and how reward functions are found, called and checked."""

import asyncio
import math
import sys
import threading

import numpy as np
import pytest
import torch

from tercet.core.rewards import (
    call_reward,
    fine_r1,
    fine_r1_reward,
    fine_r1_strict,
    is_correct,
    keep_group,
    load_reward,
)

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    "response, accuracy, form",
    [
        ("<think>small</think><answer>Least Auklet</answer>", 1, 1),
        ("<think>small</think>\n\n<answer>a least auklet</answer>", 1, 1),
        ("< think >small< / think > < answer > least auklet < / answer >", 1, 1),
        ("  <think>a\nb</think> <answer>gull</answer>\n", 0, 1),
        ("<think></think><answer></answer>", 0, 1),
        ("Well. <think>small</think><answer>least auklet</answer>", 1, 0),
        ("<think>small</think><answer>least auklet</answer> Done.", 1, 0),
        ("<think>small</think>so<answer>least auklet</answer>", 1, 0),
        ("<answer>least auklet</answer>", 1, 0),
        ("<answer>least\nauklet</answer>", 0, 0),
        ("<answer>least auklets or gulls</answer>", 1, 0),
        ("<think>x</think><answer>gull</answer><answer>least auklet</answer>", 0, 1),
        ("<answer>least auklet</answer><answer>gull</answer>", 1, 0),
        ("<think>least auklet</think> least auklet", 0, 0),
        ("<think>x</think><answer>least auklet", 0, 0),
        ("", 0, 0),
    ],
)
def test_fine_r1_reward(response, accuracy, form):
    result = fine_r1_reward(response, "least auklet")
    assert result == {
        "overall": pytest.approx(0.9 * accuracy + 0.1 * form, abs=1e-15),
        "format": form,
        "accuracy": accuracy,
    }


def test_white_space_around_a_slash_is_no_obstacle():
    for truth in ("Ram C/V Van", "Ram C / V Van "):
        assert fine_r1_reward("<answer>a ram c/ v van</answer>", truth)["accuracy"] == 1


def test_an_empty_truth_is_refused():
    with pytest.raises(ValueError, match="must not be empty, got ' '"):
        fine_r1_reward("<answer>gull</answer>", " ")


NAMES = ("auklet", "crested_auklet", "gull", "Ram C/V Van")


def rows(*responses, truth="auklet", **fields):
    base = {"ground_truth": truth, "names": NAMES, "group_id": "g7"} | fields
    return [{"response": response, **base} for response in responses]


@pytest.mark.parametrize(
    "answer, truth, loose, strict, several",
    [
        ("an Auklet", "auklet", 1, 1, 0),
        ("crested auklet", "auklet", 1, 0, 0),
        ("crested auklet", "crested auklet", 1, 1, 0),
        ("Crested_Auklet", "crested_auklet", 1, 1, 0),
        ("auklet, gull", "auklet", 1, 0, 1),
        ("gull", "auklet", 0, 0, 0),
        ("auklets", "auklet", 1, 0, 0),
        ("a bird", "auklet", 0, 0, 0),
        ("ram c / v van", "Ram C/V Van", 1, 1, 0),
    ],
)
def test_batch_rewards(answer, truth, loose, strict, several):
    batch = rows(
        f"<think>gull or auklet</think><answer>{answer}</answer>", f"{answer}", truth=truth
    )
    for function, accuracy in ((fine_r1, loose), (fine_r1_strict, strict)):
        tagged, bare = function(batch)
        assert tagged == {
            "overall": pytest.approx(0.9 * accuracy + 0.1),
            "format": 1,
            "accuracy": accuracy,
            "several_names": several,
        }
        assert bare == {"overall": 0, "format": 0, "accuracy": 0, "several_names": 0}


def test_strict_refuses_a_truth_it_does_not_know():
    with pytest.raises(ValueError, match="'tern' is not a known name"):
        fine_r1_strict(rows("<answer>tern</answer>", truth="tern"))


def test_built_in_names():
    assert load_reward("fine_r1") is fine_r1
    assert load_reward("fine_r1_strict") is fine_r1_strict
    assert load_reward("math:hypot") is math.hypot


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current directory whose modules are forgotten after the test."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_functions_of_the_current_directory(folder):
    (folder / "my_reward.py").write_text("def length(rows): return [{'overall': 4.0}]\n")
    (folder / "my_pack").mkdir()
    (folder / "my_pack" / "__init__.py").write_text("")
    (folder / "my_pack" / "base.py").write_text("VALUE = 5.0\n")
    (folder / "my_pack" / "deep.py").write_text(
        "from .base import VALUE\ndef f(rows): return [{'overall': VALUE}]\n"
    )
    path = list(sys.path)
    assert load_reward("my_reward:length")([{}]) == [{"overall": 4.0}]
    assert load_reward("my_pack.deep:f")([{}]) == [{"overall": 5.0}]
    assert load_reward("my_reward:length") is load_reward("my_reward:length")
    assert sys.path == path


def test_functions_that_cannot_be_loaded(folder):
    (folder / "broken_reward.py").write_text("import no_such_module_here\n")
    (folder / "my_reward.py").write_text("limit = 3\n")
    (folder / "bare_folder").mkdir()
    (folder / "bare_folder" / "inner.py").write_text("def f(rows): return []\n")
    for spec, message in [
        ("fine_r2", "must be fine_r1, fine_r1_strict or module:function, got 'fine_r2'"),
        (":f", "must be fine_r1"),
        ("math:", "must be fine_r1"),
        ("no_such_reward:f", "No module named 'no_such_reward'"),
        ("broken_reward:f", "No module named 'no_such_module_here'"),
        ("bare_folder.inner:f", "No module named 'bare_folder'"),
        ("my_reward:missing", r"my_reward\.py has no function 'missing'"),
        ("my_reward:limit", r"my_reward\.py has no function 'limit'"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_reward(spec)
    assert "broken_reward" not in sys.modules and "bare_folder" not in sys.modules


def call(function, batch):
    return asyncio.run(call_reward(function, batch))


def test_plain_and_coroutine_functions_are_called_alike():
    async def later(batch):
        await asyncio.sleep(0)
        return fine_r1(batch)

    class Judge:
        async def __call__(self, batch):
            return fine_r1(batch)

    batch = rows("<answer>auklet</answer>", "gull")
    want = fine_r1(batch)
    assert [result["accuracy"] for result in want] == [1, 0]
    assert call(fine_r1, batch) == call(later, batch) == call(Judge(), batch) == want


def test_numbers_become_floats():
    def mixed(batch):
        return ({"overall": np.float32(0.5), "accuracy": True, "length": torch.tensor(3)},)

    (result,) = call(mixed, rows("x"))
    assert result == {"overall": 0.5, "accuracy": 1.0, "length": 3.0}
    assert all(type(value) is float for value in result.values())


def test_a_plain_function_leaves_the_event_loop_free():
    """The function waits for an event that only the running loop can set."""
    released = threading.Event()

    def patient(batch):
        assert released.wait(60)  # for ever, where it holds up the event loop
        return [{"overall": 1.0}]

    async def both():
        async def release():
            released.set()

        return await asyncio.gather(call_reward(patient, rows("x")), release())

    assert asyncio.run(both())[0] == [{"overall": 1.0}]


def returns(value):
    def bad_reward(batch):
        return value

    return bad_reward


@pytest.mark.parametrize(
    "value, message",
    [
        (None, "must return a list of 2 results, got NoneType"),
        ([{"overall": 1.0}], "must return a list of 2 results, got 1"),
        ([{"overall": 1.0}, {"accuracy": 1.0}], "response 1: a result must be a dict with `ov"),
        ([{"overall": 1.0}, 1.0], "response 1: a result must be a dict with `overall`, got 1.0"),
        ([{"overall": math.nan}, {"overall": 1.0}], "response 0: 'overall' must be a finite num"),
        ([{"overall": 1.0, "x": math.inf}, {"overall": 1}], "response 0: 'x' must be a finite"),
        ([{"overall": "1.0"}, {"overall": 1.0}], "'overall' must be a finite number, got '1.0'"),
        ([{"overall": None}, {"overall": 1.0}], "'overall' must be a number, got None"),
        ([{"overall": torch.zeros(2)}, {"overall": 1.0}], "'overall' must be a number, got tensor"),
        ([{"overall": 1.0, "accuracy": 1}, {"overall": 1.0}], "`accuracy` must be in all of its"),
    ],
)
def test_bad_results_name_group_and_function(value, message):
    with pytest.raises(ValueError, match="bad_reward") as caught:
        call(returns(value), rows("a", "b"))
    assert message in str(caught.value) and "group g7" in str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("oops"), KeyError("oops"), StopIteration("oops")])
def test_functions_that_raise_are_named(error):
    def raising_reward(batch):
        raise error

    async def raising_coroutine(batch):
        await asyncio.sleep(0)
        raise RuntimeError("oops")

    for function in (raising_reward, raising_coroutine):
        with pytest.raises(ValueError, match=f"{function.__name__}', group g7: it raised .*oops"):
            asyncio.run(asyncio.wait_for(call_reward(function, rows("a")), timeout=60))


@pytest.mark.parametrize(
    "results, kept",
    [
        ([{"overall": 1, "accuracy": 1}, {"overall": 0, "accuracy": 0}], True),
        ([{"overall": 1, "accuracy": 1}, {"overall": 0.9, "accuracy": 1}], False),
        ([{"overall": 0.1, "accuracy": 0}, {"overall": 0, "accuracy": 0}], False),
        ([{"overall": 0, "accuracy": 0.5}, {"overall": 0, "accuracy": 0.51}], True),
        ([{"overall": 0, "accuracy": 0.5}, {"overall": 1, "accuracy": 0.2}], False),
        ([{"overall": 1}, {"overall": 1}], False),
        ([{"overall": 1}, {"overall": 2}], True),
        ([], False),
    ],
)
def test_keep_group(results, kept):
    assert keep_group(results) is kept


def test_is_correct_is_above_one_half():
    assert [is_correct({"accuracy": value}) for value in (0, 0.5, 0.501, 1)] == [0, 0, 1, 1]
