"""What a check of the machine or of a run's inputs has found, and checks that cannot fail."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

Level = Literal["ok", "warning", "error"]


class Finding(NamedTuple):
    """One line of the doctor."""

    name: str
    """What was looked at."""
    level: Level
    """error: a run would fail, or would not begin. warning: it may, or would be slow."""
    said: str
    """What was found."""
    advice: str = ""
    """What to do about it."""


Check = Callable[[], Iterable[Finding]]


def run_check(name: str, check: Check) -> Iterator[Finding]:
    """The findings of a check, an error where it raises, and the warnings of our own modules."""
    found: list[Finding] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            found += check()
        except Exception as error:  # a machine may be broken in any way: that is the finding
            said = " ".join(str(error).split()) or type(error).__name__
            if not isinstance(error, ValueError | OSError):
                said = f"{type(error).__name__}: {said}"
            found.append(Finding(name, "error", said))
    yield from found
    ours = {vars(module).get("__file__") for key, module in sys.modules.items() if _is_ours(key)}
    for warning in caught:
        if warning.filename in ours:
            yield Finding(name, "warning", " ".join(str(warning.message).split()))


def _is_ours(module: str) -> bool:
    return module.startswith("tercet.")
