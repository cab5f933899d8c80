"""Rewards: the two built-in ones, and how any reward function is found, called and checked.

A reward function maps the rows of whole groups to one dict of numbers per row; it may be a
coroutine function. A row holds `response` (special tokens removed), `response_length`,
`ground_truth`, `question`, `images`, `role`, `group_id`, `finish_reason` and `names` (the known
sub-categories). A result holds `overall` and, optionally, `accuracy` and further metrics.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import PathFinder

from tercet.core.prompts import extract_answer, is_only_name, names_in, squeeze

Rows = list[dict]
Results = list[dict[str, float]]

_FORMAT = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)


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
    if not truth.strip():
        raise ValueError(f"the true name must not be empty, got {truth!r}")
    response = squeeze(response)
    answer = extract_answer(response, "first")
    hit = answer is not None and squeeze(truth.strip()).lower() in answer.lower()
    return _result(hit, _has_format(response))


def fine_r1(rows: Rows) -> Results:
    """`fine_r1_reward` of every row, with the metric `several_names`."""
    results = []
    for row in rows:
        result = fine_r1_reward(row["response"], row["ground_truth"])
        results.append({**result, "several_names": _several_names(row)})
    return results


def fine_r1_strict(rows: Rows) -> Results:
    """`fine_r1`, but correct only if the true name is the only known name in the first answer.

    Raises:
        ValueError: a row's true name is not among its known names.
    """
    results = []
    for row in rows:
        hit = is_only_name(_first_answer(row), row["ground_truth"], row.get("names", ()))
        result = _result(hit, _has_format(squeeze(row["response"])))
        results.append({**result, "several_names": _several_names(row)})
    return results


def _first_answer(row: dict) -> str:
    return extract_answer(squeeze(row["response"]), "first") or ""


def _several_names(row: dict) -> float:
    return float(len(names_in(_first_answer(row), row.get("names", ()))) > 1)


def _has_format(squeezed: str) -> bool:
    return _FORMAT.fullmatch(squeezed) is not None


def _result(hit: bool, has_format: bool) -> dict[str, float]:
    accuracy, form = float(hit), float(has_format)
    return {"overall": 0.9 * accuracy + 0.1 * form, "format": form, "accuracy": accuracy}


BUILT_IN: dict[str, Callable] = {"fine_r1": fine_r1, "fine_r1_strict": fine_r1_strict}


def load_reward(spec: str) -> Callable:
    """The reward function that an option names.

    Args:
        spec: `fine_r1`, `fine_r1_strict`, or `module:function`. A module that is not installed is
            searched in the current directory, as a file or as a package with `__init__.py`. The
            directory is not added to sys.path, where its folders could hide installed packages.

    Returns:
        The function.

    Raises:
        ValueError: no such module or function, or the module cannot be imported.
    """
    if spec in BUILT_IN:
        return BUILT_IN[spec]
    module_name, _, function_name = spec.partition(":")
    if not module_name or not function_name:
        raise ValueError(f"reward must be {', '.join(BUILT_IN)} or module:function, got {spec!r}")
    try:
        module = _import(module_name)
    except Exception as error:
        raise ValueError(
            f"reward {spec!r}: importing module {module_name!r} (installed, or in {os.getcwd()}) "
            f"failed: {error!r}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        where = getattr(module, "__file__", None) or module_name
        raise ValueError(f"reward {spec!r}: {where} has no function {function_name!r}")
    return function


def _import(name: str):
    """Module `name`; its top level comes from the current directory if it is not installed."""
    top = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        found = PathFinder.find_spec(top, [os.getcwd()])
        if error.name != top or found is None or found.loader is None:
            raise
    # As an import does: the module is in sys.modules while it is executed.
    sys.modules[top] = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(sys.modules[top])
        return importlib.import_module(name)
    except BaseException:
        sys.modules.pop(top, None)
        raise


async def call_reward(function: Callable, rows: Rows) -> Results:
    """Checked results of a reward function for whole groups.

    A plain function runs in a thread, so that the event loop goes on. It may be called for several
    groups at the same time.

    Args:
        function: a reward function, plain or a coroutine function.
        rows: its rows; `group_id` names the group in errors.

    Returns:
        One dict of finite floats per row, with `overall` in each and `accuracy` in all or none.

    Raises:
        ValueError: the function raises, or returns something else.
    """
    groups = ", ".join(dict.fromkeys(str(row.get("group_id", "?")) for row in rows))
    where = f"reward function {getattr(function, '__qualname__', function)!r}, group {groups}"
    try:
        results = await asyncio.to_thread(_call, function, rows)
        if inspect.isawaitable(results):
            results = await results
    except Exception as error:
        raise ValueError(f"{where}: it raised {error!r}") from error
    if not isinstance(results, list | tuple) or len(results) != len(rows):
        got = len(results) if isinstance(results, list | tuple) else type(results).__name__
        raise ValueError(f"{where}: it must return a list of {len(rows)} results, got {got}")
    checked = [_checked(result, f"{where}, response {n}") for n, result in enumerate(results)]
    if len({"accuracy" in result for result in checked}) > 1:
        raise ValueError(f"{where}: `accuracy` must be in all of its results or in none")
    return checked


def _call(function: Callable, rows: Rows):
    try:
        return function(rows)
    except StopIteration as error:
        # A future cannot carry a StopIteration from the thread to whoever awaits it.
        raise RuntimeError(repr(error)) from error


def _checked(result, where: str) -> dict[str, float]:
    if not isinstance(result, Mapping) or "overall" not in result:
        raise ValueError(f"{where}: a result must be a dict with `overall`, got {result!r}")
    numbers = {}
    for key, value in result.items():
        try:
            numbers[key] = math.nan if isinstance(value, str) else float(value)
        except Exception as error:
            raise ValueError(f"{where}: {key!r} must be a number, got {value!r}") from error
        if not math.isfinite(numbers[key]):
            raise ValueError(f"{where}: {key!r} must be a finite number, got {value!r}")
    return numbers


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
