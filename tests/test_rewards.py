"""Rewards against values by hand, and how reward functions are found, called and checked."""

import asyncio
import math
import random
import re
import threading
import time
import unicodedata
from collections import Counter

import numpy as np
import pytest
import torch

from tercet.core.names import names_in
from tercet.core.rewards import (
    call_reward,
    fine_r1,
    fine_r1_reward,
    fine_r1_strict,
    is_correct,
    keep_group,
    load_reward,
    read_apart,
)
from tercet.train.evaluation.metrics import (
    closed_world_correct,
    open_world_included,
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


@pytest.mark.parametrize(
    ("response", "accuracy", "form"),
    [
        ("<think>a</think><answer>Auklet</answer>", 1, 1),
        (" <think>a</think> <answer> Auklet </answer> \n", 1, 1),
        ("<answer>Auklet</answer>", 1, 0),
        ("so: <answer>Auklet</answer>", 1, 0),
        ("<think>a</think><answer>Auklet</answer> gull", 0, 0),
        ("<think>a</think><answer>Auklet</answer></answer>", 0, 0),
        ("<think>a</think><answer>Auklet</answer>b</answer>c</answer>", 0, 0),
        ("<think>a</think><answer>Auklet</answer><answer>Auklet</answer>", 0, 0),
        ("<think>a</think><answer>gull</answer><answer>Auklet</answer>", 0, 0),
        ("<think><answer>Auklet</answer></think><answer>Auklet</answer>", 0, 0),
        ("<think>a</think><answer><answer>Auklet</answer>", 0, 0),
        ("<think>a</think><answer>Auklet", 0, 0),
        ("<think>a</think><answer>Auklet</answer", 0, 0),
    ],
)
def test_strict_wants_one_answer_and_nothing_after_it(response, accuracy, form):
    (result,) = fine_r1_strict(rows(response))
    assert (result["accuracy"], result["format"]) == (accuracy, form)
    assert result["overall"] == pytest.approx(0.9 * accuracy + 0.1 * form)


def test_the_released_reward_lets_a_response_go_on():
    """It is kept to the letter: the first answer and the last tag count."""
    (result,) = fine_r1(rows("<think>a</think><answer>Auklet</answer>b</answer>"))
    assert (result["accuracy"], result["format"]) == (1, 1)


def test_strict_refuses_a_truth_it_does_not_know():
    with pytest.raises(ValueError, match="'tern' is not a known name"):
        fine_r1_strict(rows("<answer>tern</answer>", truth="tern"))


OLD_FORMAT = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
OLD_ANSWER = re.compile("<answer>(.*?)</answer>", re.DOTALL)
PIECES = ["<answer>", "</answer>", "<think>", "</think>", *"<>/ \n_", "auklet", "Gull", "s"]


def released(response: str, truth: str) -> tuple[float, float]:
    """Accuracy and format as the released code has them, with expressions that are quadratic."""
    response = re.sub(r"\s*([<>/])\s*", r"\1", response)
    answer = OLD_ANSWER.search(response)
    hit = answer is not None and truth.lower() in answer.group(1).strip().lower()
    return float(hit), float(OLD_FORMAT.fullmatch(response) is not None)


def test_fine_r1_is_that_of_the_released_code():
    draw = random.Random(0)
    found = Counter()
    for _ in range(20_000):
        inner = ["".join(draw.choices(PIECES, k=draw.randrange(4))) for _ in range(4)]
        text = "".join(inner)
        if draw.random() < 0.5:
            text = "<think>{}</think>{}<answer>{}</answer>{}".format(*inner)
        expected = released(text, "auklet")
        result = fine_r1_reward(text, "auklet")
        assert (result["accuracy"], result["format"]) == expected, text
        found[expected] += 1
    assert len(found) == 4 and min(found.values()) > 100, found


LONG = {
    "fine_r1": lambda text: fine_r1_reward(text, "auklet"),
    "strict": lambda text: fine_r1_strict(rows(f"<answer>{text}</answer>")),
    "closed": lambda text: closed_world_correct(text, "auklet"),
    "included": lambda text: open_world_included(text, "auklet", cars=False),
}
UNITS = ["<think>", "</think>", "<answer>", "</answer>", "<think></think>", "</think> "]
UNITS += [*" <>/7a'’", "</", " <", "< answer >", "auklet", "auklet ", "\u0316\u0300", "小"]


@pytest.mark.parametrize("unit", UNITS, ids=ascii)
def test_reading_takes_time_in_proportion_to_the_length(unit):
    """Ten times the text takes about ten times as long, a hundred times where it is quadratic."""
    for name, read in LONG.items():
        seconds = []
        for size in (100_000, 1_000_000):
            text = unit * (size // len(unit))
            started = time.process_time()
            read(text)
            seconds.append(time.process_time() - started)
        assert seconds[1] < max(30 * seconds[0], 0.3), (name, seconds)


def test_many_names_take_time_in_proportion_to_their_number():
    text, seconds = "an auk, or name 17x of them all " * 1000, []
    for count in (200, 2000):
        names = [*(f"name {n}" for n in range(count)), "auk"]
        names_in(text, names)  # sorts the names, once
        started = time.process_time()
        assert names_in(text, names) == ["auk"]
        seconds.append(time.process_time() - started)
    assert seconds[1] < max(30 * seconds[0], 0.3)


def test_fine_r1_is_apart_from_the_normal_form_where_names_are_not_plain():
    nfd = unicodedata.normalize("NFD", "Citroën C4")
    names = ["auk", "Citroën C4", nfd, "Brewer’s Blackbird", "Weißstorch", "S4_Sedan", "7\u20112"]
    line = read_apart("fine_r1", names)
    assert line.startswith("reward fine_r1 compares letter by letter") and "5 names" in line
    assert r"'Citroe\u0308n C4', 'Brewer\u2019s Blackbird'" in line
    assert read_apart("fine_r1", names[:2]) == read_apart("fine_r1_strict", names) == ""
    (row,) = rows("<answer>Citroën C4</answer>", truth=nfd, names=(nfd, "S5"))
    assert (fine_r1([row])[0]["accuracy"], fine_r1_strict([row])[0]["accuracy"]) == (0, 1)


def test_built_in_names():
    assert load_reward("fine_r1") is fine_r1
    assert load_reward("fine_r1_strict") is fine_r1_strict
    for spec in ("fine_r2", ":f", "math:", ""):
        with pytest.raises(ValueError, match="must be fine_r1, fine_r1_strict or module:function"):
            load_reward(spec)


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
        ([{"overall": 1.0, 3: 1.0}] * 2, "response 0: a metric's name must be a text, got 3"),
        ([{"overall": 1.0, "a\nb": 1.0}] * 2, "a metric's name must be a text, got 'a\\nb'"),
        ([{"overall": 1.0, "\ud800": 1.0}] * 2, "a metric's name must be a text, got '\\ud800'"),
        ([{"overall": 1.0, " ": 1.0}] * 2, "a metric's name must be a text, got ' '"),
        ([{"overall": b"1.0"}] * 2, "'overall' must be a finite number, got b'1.0'"),
        ([{"overall": "9" * 10_000}] * 2, "'overall' must be a finite number, got '999"),
        ([{"overall": 10**400}] * 2, "'overall' must be a number, got 1000"),
    ],
)
def test_bad_results_name_group_and_function(value, message):
    with pytest.raises(ValueError, match="bad_reward") as caught:
        call(returns(value), rows("a", "b"))
    assert message in str(caught.value) and "group g7" in str(caught.value)


class Silent(Exception):
    def __repr__(self):
        raise SystemExit


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("oops"),
        KeyError("oops"),
        StopIteration("oops"),
        SystemExit("oops"),
        KeyboardInterrupt("oops"),
        asyncio.CancelledError("oops"),
        TimeoutError("oops"),
        GeneratorExit("oops"),
        ValueError("oops\n" * 10_000),
    ],
    ids=lambda error: type(error).__name__,
)
def test_functions_that_raise_are_named(error):
    def raising_reward(batch):
        raise error

    async def raising_coroutine(batch):
        await asyncio.sleep(0)
        raise RuntimeError("oops") if isinstance(error, StopIteration | GeneratorExit) else error

    for function in (raising_reward, raising_coroutine):
        pattern = f"{function.__name__}', group g7: it raised .*oops"
        with pytest.raises(ValueError, match=pattern) as caught:
            call(function, rows("a"))
        assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


def test_an_exception_that_cannot_be_shown_is_named():
    def silent(batch):
        raise Silent

    with pytest.raises(ValueError, match="silent', group g7: it raised Silent$"):
        call(silent, rows("a"))


def test_a_coroutine_that_hangs_is_named():
    async def endless(batch):
        await asyncio.sleep(60)

    with pytest.raises(ValueError, match=r"endless', group g7: no result within 0.05 s \(rollout"):
        asyncio.run(call_reward(endless, rows("a"), 0.05))


def test_metrics_of_the_trainer_are_its_own():
    function = returns([{"overall": 1.0, "kept": 1.0}])
    with pytest.raises(ValueError, match="group g7: the trainer has a metric .* called 'kept'"):
        asyncio.run(call_reward(function, rows("a"), 5, lambda metric: metric == "kept"))


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
