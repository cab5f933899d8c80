"""How a reward function is found, called and checked, in the process that runs it."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping
from importlib.machinery import PathFinder

Rows = list[dict]
Results = list[dict[str, float]]

MOST_SHOWN = 500
"""Characters of an exception or a value that an error shows."""


class RewardError(Exception):
    """What is wrong with a call; whoever made it adds the function's name and the group."""


def find_function(spec: str) -> Callable:
    """The function that `module:function` names.

    A module that is not installed is searched in the current directory, as a file or as a package
    with `__init__.py`. The directory is not added to sys.path, where its folders could hide
    installed packages.

    Raises:
        ValueError: no such module or function, or the module cannot be imported.
    """
    module_name, _, function_name = spec.partition(":")
    try:
        module = _import(module_name)
    except BaseException as error:  # it may call sys.exit
        raise ValueError(
            f"reward {spec!r}: importing module {module_name!r} (installed, or in {os.getcwd()}) "
            f"failed: {shown(error)}"
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


async def results_of(function: Callable, rows: Rows) -> Results:
    """Checked results of a reward function, called in this process.

    A plain function runs in a thread, so that the event loop goes on.

    Returns:
        One dict of finite floats per row, with `overall` in each and `accuracy` in all or none.

    Raises:
        RewardError: the function raises, whatever it is, or returns something else.
    """
    if any(map(inspect.iscoroutinefunction, (function, type(function).__call__))):
        results = _call(function, rows)  # a coroutine, awaited below
    else:
        results = await asyncio.to_thread(_call, function, rows)
    if inspect.isawaitable(results):
        results = await _awaited(results)
    if not isinstance(results, list | tuple) or len(results) != len(rows):
        got = len(results) if isinstance(results, list | tuple) else type(results).__name__
        raise RewardError(f"it must return a list of {len(rows)} results, got {got}")
    checked = [_checked(result, f"response {n}") for n, result in enumerate(results)]
    if len({"accuracy" in result for result in checked}) > 1:
        raise RewardError("`accuracy` must be in all of its results or in none")
    return checked


def _call(function: Callable, rows: Rows):
    try:
        return function(rows)
    except BaseException as error:  # sys.exit, and what a future cannot carry, among them
        raise RewardError(f"it raised {shown(error)}") from error


async def _awaited(results):
    try:
        return await results
    except GeneratorExit:
        raise
    except BaseException as error:
        if isinstance(error, asyncio.CancelledError) and asyncio.current_task().cancelling():
            raise  # nobody waits for the results any more
        raise RewardError(f"it raised {shown(error)}") from error


def _checked(result, where: str) -> dict[str, float]:
    try:
        items = dict(result) if isinstance(result, Mapping) else {}
    except Exception as error:
        raise RewardError(f"{where}: reading its result raised {shown(error)}") from error
    if "overall" not in items:
        raise RewardError(f"{where}: a result must be a dict with `overall`, got {shown(result)}")
    numbers = {}
    for key, value in items.items():
        if not isinstance(key, str) or not key.isprintable() or not key.strip():
            raise RewardError(f"{where}: a metric's name must be a text, got {shown(key)}")
        try:
            number = math.nan if isinstance(value, str | bytes) else float(value)
        except Exception as error:
            raise RewardError(
                f"{where}: {shown(key)} must be a number, got {shown(value)}"
            ) from error
        if not math.isfinite(number):
            raise RewardError(f"{where}: {shown(key)} must be a finite number, got {shown(value)}")
        numbers[str(key)] = number
    return numbers


def shown(value: object) -> str:
    """An exception or a value as an error shows it: on one line, cut where it is long."""
    try:
        text = repr(value)
    except BaseException:  # a class of the user's, whose `__repr__` may fail in any way
        text = type(value).__name__
    if len(text) > MOST_SHOWN:
        text = text[:MOST_SHOWN] + "…"
    return " ".join(text.split())
