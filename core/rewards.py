"""Rewards: the built-in ones, the parts of weighted ones, and how a reward function is called.

A reward function maps the rows of whole groups to one dict of numbers per row; it may be a
coroutine function. A row holds `response` (special tokens removed), `response_length`,
`ground_truth`, `question`, `images`, `role`, `group_id`, `finish_reason`, `super_category`, `names`
(its known sub-categories), `options` (those that the prompt shows, if any) and `letter` (the true
one's letter where the prompt shows letters, else None). A result holds `overall` and, optionally,
`accuracy` and further metrics.

A function of the user's runs in a process of its own (core/reward_process.py). The built-in ones
run in this process: they read text in linear time and cannot hang.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from tercet.core.names import is_only_name, names_in, normal_form
from tercet.core.prompts import extract_answer, squeeze
from tercet.core.reward_calls import Results, RewardError, Rows, results_of
from tercet.core.reward_process import RewardProcess

_BEGINNING, _END = "<think>", "</answer>"
_MIDDLE = re.compile(r"</think>\s*<answer>")
_TAGS = ("<think>", "</think>", "<attribute>", "</attribute>", "<answer>", "</answer>")


def fine_r1_reward(response: str, truth: str) -> dict[str, float]:
    """The Fine-R1 reward: 0.9 accuracy + 0.1 format.

    White space around `<`, `>` and `/` is removed first. format is 1 when the whole response is
    `<think>...</think><answer>...</answer>`, accuracy when the true name occurs, ignoring case, in
    the first answer.

    Args:
        response: the response's text, special tokens removed.
        truth: the sub-category's name.

    Returns:
        `overall`, `format` and `accuracy`.

    Raises:
        ValueError: the true name is empty.
    """
    _check_truth(truth)
    response = squeeze(response)
    answer = extract_answer(response, "first")
    hit = answer is not None and _released_form(truth) in answer.lower()
    return _result(hit, _has_format(response))


def fine_r1(rows: Rows) -> Results:
    """`fine_r1_reward` of every row, with the metric `several_names`."""
    results = []
    for row in rows:
        answer = extract_answer(squeeze(row["response"]), "first") or ""
        result = fine_r1_reward(row["response"], row["ground_truth"])
        results.append({**result, "several_names": _several_names(answer, row)})
    return results


def fine_r1_strict(rows: Rows) -> Results:
    """Like `fine_r1`, but correct only if the true name is the only known name in the one answer.

    Names are compared in the normal form (see core.names). A response with text after its first
    `</answer>`, with a second answer, or without the end of its answer gets accuracy 0 and
    format 0.

    Raises:
        ValueError: a row's true name is not among its known names.
    """
    results = []
    for row in rows:
        response = squeeze(row["response"])
        answer = extract_answer(response, "first") or ""
        ended = _ends_with_one_answer(response)
        hit = is_only_name(answer, row["ground_truth"], row.get("names", ()))
        result = _result(ended and hit, ended and _has_format(response))
        results.append({**result, "several_names": _several_names(answer, row)})
    return results


def format_attribute(response: str) -> float:
    """R_fa of ReFine-RFT: whether a response is its three tagged parts and nothing else.

    Args:
        response: the response's text, special tokens removed.

    Returns:
        1.0 when the whole response is `<think>...</think>`, `<attribute>...</attribute>` and
        `<answer>...</answer>` in this order, with nothing but white space before, between and
        after them, and each of the six tags exactly once; else 0.0.
    """
    if any(response.count(tag) != 1 for tag in _TAGS):
        return 0.0
    starts = [response.index(tag) for tag in _TAGS]
    ends = [start + len(tag) for start, tag in zip(starts, _TAGS, strict=True)]
    outside = [
        response[: starts[0]],
        *(response[ends[n] : starts[n + 1]] for n in (1, 3)),
        response[ends[-1] :],
    ]
    return float(starts == sorted(starts) and not any(text.strip() for text in outside))


def classification(response: str, truth: str, letter: str | None = None) -> float:
    """R_cls of ReFine-RFT: whether the one answer is the label.

    Case, `_` and the amount of white space do not count (see `normal_form`).

    Args:
        response: the response's text, special tokens removed.
        truth: the sub-category's name.
        letter: of the true option, where the prompt showed letters: the letter alone, or the
            option as it was shown (`B. name`), counts as well.

    Returns:
        1.0 when the text of the only `<answer>...</answer>` equals the label; else 0.0. A response
        with several answers, or without one, gets 0.0.

    Raises:
        ValueError: the true name is empty.
    """
    if response.count("<answer>") != 1 or response.count(_END) != 1:
        _check_truth(truth)
        return 0.0
    return direct_answer(extract_answer(response, "first") or "", truth, letter)


def direct_answer(response: str, truth: str, letter: str | None = None) -> float:
    """Whether the whole response is the label: No-Thinking-RL's equality reward (2503.16188).

    Arguments, value and errors are those of `classification`; there are no tags.
    """
    _check_truth(truth)
    allowed = {normal_form(truth)}
    if letter is not None:
        allowed |= {normal_form(letter), normal_form(f"{letter}. {truth}")}
    return float(normal_form(response) in allowed)


def hierarchical(rows: Rows, genera: Mapping[str, str]) -> list[float]:
    """1 for the right name, 0.5 for the right genus, of each response that ends with one answer.

    Args:
        rows: of a group.
        genera: genus by sub-category's normal form (see `core.data.negatives.read_genera`).

    Returns:
        1.0 where the true name is the only known name in the answer; 0.5 where the only known name
        in it is another one of the same genus, or where it names the genus and no known name; else
        0.0.

    Raises:
        ValueError: a row's true name is not among its known names.
    """
    values = []
    for row in rows:
        response, names = squeeze(row["response"]), row["names"]
        answer = extract_answer(response, "first") or ""
        named, genus = names_in(answer, names), genera.get(normal_form(row["ground_truth"]))
        same_genus = [genera.get(normal_form(name)) == genus for name in named]
        is_kin = genus and (same_genus or [bool(names_in(answer, [genus]))]) == [True]
        value = 1.0 if is_only_name(answer, row["ground_truth"], names) else 0.5 * bool(is_kin)
        values.append(value * _ends_with_one_answer(response))
    return values


SPECIFICITY = {
    "more specific": 4,
    "specific": 4,
    "less specific": 3,
    "generic": 2,
    "abstain": 1,
    "wrong": 0,
}
"""What a verifier may say of an answer beside the true name (SpeciaRL, arXiv 2603.03197), and how
good each is."""


def best_of_rollouts(categories: Sequence[str | None]) -> list[float]:
    """SpeciaRL's reward: 1 for the answers of a group that are as specific as its best one.

    Args:
        categories: a verifier's of each response, of SPECIFICITY; None: it has no answer.

    Returns:
        1.0 where no other response of the group has a better category, and it is not `wrong`; else
        0.0.
    """
    found = [-1 if category is None else SPECIFICITY[category] for category in categories]
    best = max(1, *found)
    return [float(rank == best) for rank in found]


def _check_truth(truth: str) -> None:
    if not truth.strip():
        raise ValueError(f"the true name must not be empty, got {truth!r}")


def _released_form(name: str) -> str:
    """A name as the released reward searches for it."""
    return squeeze(name.strip()).lower()


def _several_names(answer: str, row: dict) -> float:
    return float(len(names_in(answer, row.get("names", ()))) > 1)


def _has_format(squeezed: str) -> bool:
    """Whether a text is `<think>...</think><answer>...</answer>`, white space between the two."""
    if not squeezed.startswith(_BEGINNING) or not squeezed.endswith(_END):
        return False
    return bool(_MIDDLE.search(squeezed, len(_BEGINNING), len(squeezed) - len(_END)))


def _ends_with_one_answer(squeezed: str) -> bool:
    """Whether a text holds one answer, and nothing after it."""
    tags = squeezed.count("<answer>"), squeezed.count(_END)
    return tags == (1, 1) and squeezed.endswith(_END)


def _result(hit: bool, has_format: bool) -> dict[str, float]:
    accuracy, form = float(hit), float(has_format)
    return {"overall": 0.9 * accuracy + 0.1 * form, "format": form, "accuracy": accuracy}


BUILT_IN: dict[str, Callable] = {"fine_r1": fine_r1, "fine_r1_strict": fine_r1_strict}


def _metric_of(function: Callable, metric: str) -> Callable[[Rows], list[float]]:
    """A part of a weighted reward: one metric of another reward."""
    return lambda rows: [result[metric] for result in function(rows)]


def _label_part(function: Callable) -> Callable[[Rows], list[float]]:
    """A part of a weighted reward: a comparison with the label, or with its letter."""
    return lambda rows: [
        function(row["response"], row["ground_truth"], row.get("letter")) for row in rows
    ]


PARTS: dict[str, Callable[[Rows], list[float]]] = {
    "accuracy": _metric_of(fine_r1, "accuracy"),
    "accuracy_strict": _metric_of(fine_r1_strict, "accuracy"),
    "format": _metric_of(fine_r1, "format"),
    "format_strict": _metric_of(fine_r1_strict, "format"),
    "format_attribute": lambda rows: [format_attribute(row["response"]) for row in rows],
    "classification": _label_part(classification),
    "direct_answer": _label_part(direct_answer),
}
"""Parts of weighted rewards (core/weighted_reward.py): from rows to a number in [0, 1] each."""
CORRECT = ("accuracy", "accuracy_strict", "classification", "direct_answer")
"""The parts that can say whether an answer is correct."""


def load_reward(spec: str) -> Callable | RewardProcess:
    """The reward function that an option names.

    Args:
        spec: `fine_r1`, `fine_r1_strict`, or `module:function` (see `find_function`).

    Returns:
        The built-in function, or a process that has imported the module.

    Raises:
        ValueError: no such module or function, or the module cannot be imported.
    """
    if spec in BUILT_IN:
        return BUILT_IN[spec]
    if not all(spec.partition(":")) or spec.startswith("{"):
        raise ValueError(
            f"reward must be {', '.join(BUILT_IN)} or module:function (or weights of parts, as "
            f"{{format: 0.1, accuracy: 0.9}}), got {spec!r}"
        )
    return RewardProcess(spec)


async def call_reward(
    function: Callable | RewardProcess,
    rows: Rows,
    timeout_s: float = 900.0,
    is_reserved: Callable[[str], bool] = lambda metric: False,
) -> Results:
    """Checked results of a reward function for whole groups.

    It may be called for several groups at the same time.

    Args:
        function: as `load_reward` gives it, or any function of this process, plain or a coroutine
            function. A plain one in this process cannot be stopped: the call fails after
            `timeout_s`, its thread goes on.
        rows: its rows; `group_id` names the group in errors.
        timeout_s: longest that it may take.
        is_reserved: whether a metric's name is the trainer's own.

    Returns:
        One dict of finite floats per row, with `overall` in each and `accuracy` in all or none.

    Raises:
        ValueError: the function raises, hangs or ends its process, or returns something else.
    """
    groups = ", ".join(dict.fromkeys(str(row.get("group_id", "?")) for row in rows))
    name = getattr(function, "spec", getattr(function, "__qualname__", function))
    where = f"reward function {name!r}, group {groups}"
    try:
        if isinstance(function, RewardProcess):
            results = await function.call(rows, timeout_s)
        else:
            async with asyncio.timeout(timeout_s):
                results = await results_of(function, rows)
    except RewardError as error:
        raise ValueError(f"{where}: {error}") from error.__cause__
    except TimeoutError as error:
        raise ValueError(
            f"{where}: no result within {timeout_s:g} s (rollout.reward_timeout_s)"
        ) from error
    for metric in sorted({metric for result in results for metric in result}):
        if is_reserved(metric):
            raise ValueError(f"{where}: the trainer has a metric of its own called {metric!r}")
    return results


def read_apart(reward: str, names: Iterable[str]) -> str:
    """What to know at a run's start about names that `fine_r1` compares letter by letter.

    Args:
        reward: as `load_reward` takes it.
        names: the known sub-categories.

    Returns:
        One line naming those that the normal form spells otherwise than `fine_r1`, so that a right
        answer in another spelling gets no reward; empty where there are none.
    """
    apart = [name for name in names if _released_form(name) != normal_form(name)]
    if reward != "fine_r1" or not apart:
        return ""
    return (
        f"reward fine_r1 compares letter by letter, so a right answer may get 0 for "
        f"{len(apart)} names with special characters: "
        f"{', '.join(map(ascii, apart[:5]))}{', ...' if apart[5:] else ''}; "
        "fine_r1_strict reads every spelling"
    )


def is_correct(result: Mapping[str, float]) -> bool:
    """Whether a result, which must hold `accuracy`, counts as a correct answer."""
    return result["accuracy"] > 0.5


def keep_group(results: Sequence[Mapping[str, float]]) -> bool:
    """Whether a group passes the filter of dynamic sampling.

    Returns:
        With `accuracy`: whether some but not all answers are correct. Without: whether `overall`
        differs within the group.
    """
    if all("accuracy" in result for result in results):
        return 0 < sum(map(is_correct, results)) < len(results)
    return len({result["overall"] for result in results}) > 1
