"""Evaluation metrics, each of one answer or of one pair of similarities."""

from __future__ import annotations

from collections.abc import Iterable

from tercet.core.names import is_only_name
from tercet.core.prompts import extract_answer


def closed_world_correct(output: str, truth: str) -> bool:
    """Whether the longest answer includes the true option, ignoring case, `_` as a space.

    Args:
        output: the whole raw output; without answer tags it is wrong.
        truth: the true option.

    Raises:
        ValueError: the true option is empty.
    """
    answer = extract_answer(output, "longest")
    return answer is not None and _spaced(truth) in answer.lower().replace("_", " ")


def open_world_included(output: str, truth: str, cars: bool) -> bool:
    """Whether the true name occurs in the answer: text inclusion.

    Args:
        output: the whole raw output; all of it is searched if its longest answer is missing or
            empty.
        truth: the true name; case is ignored, and `_` in it is read as a space.
        cars: drop the last two words of the truth (body and year).

    Raises:
        ValueError: nothing is left of the true name.
    """
    name = _spaced(truth)
    if cars:
        name = " ".join(name.split()[:-2])
        if not name:
            raise ValueError(f"a car's name needs more than body and year, got {truth!r}")
    return name in (extract_answer(output, "longest") or output).lower()


def open_world_exact(output: str, truth: str, names: Iterable[str]) -> bool:
    """Whether the true name is the only known name in the longest answer.

    Args:
        output: the whole raw output; without answer tags it is wrong.
        truth: the true name.
        names: every known name, the true one among them.

    Raises:
        ValueError: the true name is not a known one.
    """
    return is_only_name(extract_answer(output, "longest") or "", truth, names)


def relative_similarity(s_pred: float, s_super: float) -> float:
    """Open-world relative semantic similarity max(0, (s_pred - s_super) / (1 - s_super)).

    Args:
        s_pred: cosine similarity of prediction and true name.
        s_super: cosine similarity of super-category word and true name.

    Returns:
        0 for a prediction no more similar than the super-category word, 1 for the true name.

    Raises:
        ValueError: a similarity is NaN, or `s_super` is not below 1.
    """
    if s_pred != s_pred or not s_super < 1:
        raise ValueError(
            f"s_pred must be a number and s_super a number below 1, got {s_pred} and {s_super}"
        )
    return max(0.0, (s_pred - s_super) / (1 - s_super))


def _spaced(name: str) -> str:
    if not name.strip(" _"):
        raise ValueError(f"the true name must not be empty, got {name!r}")
    return name.lower().replace("_", " ")
