"""Evaluation metrics: each a pure function of an answer, or of similarities.

Released rules are those of the published evaluation script, to the letter; strict ones ask for one
name and the right one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from tercet.core.names import is_only_name, names_in, normal_form
from tercet.core.prompts import extract_answer

WORDS = {"aircraft": "aircraft", "birds": "bird", "cars": "car", "flower": "flower"}
"""What the released script looks for in a photo's path, in its order, and the word it takes."""
NO_WORD = "object"
SAME = 1e-9
"""Cosines this close to 1 are those of equal embeddings, up to rounding in float64."""
_ONE_LETTER = re.compile(r"\(?([A-Z])[).:]?")
_LETTER = re.compile(r"(?<!\w)\(?([A-Z])[).:]")


def closed_world_correct(output: str, truth: str) -> bool:
    """Whether the longest answer includes the true option: the released rule.

    Args:
        output: the whole raw output; without answer tags, or with nothing between them, it is
            wrong.
        truth: the true option; case is ignored, and `_` is a space in both.

    Raises:
        ValueError: the true option is empty.
    """
    answer = extract_answer(output, "longest")
    return bool(answer) and _spaced(truth) in answer.lower().replace("_", " ")


def closed_world_exact(
    output: str, truth: str, options: Sequence[str], letters: bool = False
) -> bool:
    """Whether the longest answer names exactly one option and that is the true one: strictly.

    Args:
        output: the whole raw output; without answer tags it is wrong.
        truth: the true option.
        options: in the order in which the prompt showed them.
        letters: whether the prompt showed a letter before each option; a letter counts as its
            option then, if it is the whole answer or has a bracket, a full stop or a colon.
    """
    named = options_named(extract_answer(output, "longest") or "", options, letters)
    return [normal_form(name) for name in named] == [normal_form(truth)]


def options_named(answer: str, options: Sequence[str], letters: bool = False) -> list[str]:
    """The options that an answer names, by their names or letters (see `closed_world_exact`)."""
    named = names_in(answer, options)
    if letters:
        whole = _ONE_LETTER.fullmatch(answer.strip())
        found = [whole[1]] if whole else _LETTER.findall(answer)
        places = [ord(letter) - ord("A") for letter in found]
        named += [options[place] for place in places if place < len(options)]
    return list(dict.fromkeys(named))


def released_answer(output: str) -> str:
    """What the released script takes for the open-world answer: the longest one, else all of it.

    The output stands in where tags are missing or nothing is between them.
    """
    return extract_answer(output, "longest") or output


def released_word(path: str) -> str:
    """The word for the super-category that the released script finds in a photo's path."""
    return next((word for part, word in WORDS.items() if part in path), NO_WORD)


def open_world_included(output: str, truth: str, cars: bool) -> bool:
    """Whether the true name occurs in the answer: text inclusion by the released rule.

    Args:
        output: the whole raw output (see `released_answer`).
        truth: the true name; case is ignored, and `_` in it is read as a space.
        cars: drop the last two words of the truth (body and year), and leave `_` as it is. Nothing
            is left of a name of two words, which every answer includes then.

    Raises:
        ValueError: the true name is empty.
    """
    name = _spaced(truth)
    if cars:
        name = " ".join(truth.lower().split()[:-2])
    return name in released_answer(output).lower()


def spoken_name(truth: str) -> str:
    """A car's name without body and year, as far as something is left of it."""
    return " ".join(truth.split()[:-2]) or truth


def open_world_exact(output: str, truth: str, names: Iterable[str]) -> bool:
    """Whether the true name is the only known name in the longest answer: strictly.

    Args:
        output: the whole raw output; without answer tags it is wrong.
        truth: the true name.
        names: every known name, the true one among them.

    Raises:
        ValueError: the true name is not a known one.
    """
    return is_only_name(extract_answer(output, "longest") or "", truth, names)


def relative_similarity(s_pred, s_super):
    """Open-world relative semantic similarity max(0, (s_pred - s_super) / (1 - s_super)).

    Args:
        s_pred: cosine similarity of prediction and true name, a number or an array.
        s_super: cosine similarity of super-category word and true name.

    Returns:
        0 for a prediction no more similar than the super-category word, 1 for the true name. 0 too
        where word and true name have one embedding, for which the fraction does not exist.

    Raises:
        ValueError: a similarity is NaN.
    """
    s_pred, s_super = np.asarray(s_pred, np.float64), np.asarray(s_super, np.float64)
    if np.isnan(s_pred).any() or np.isnan(s_super).any():
        raise ValueError("similarities must be numbers, got NaN")
    room = 1 - s_super
    return np.where(room > SAME, np.maximum(0, (s_pred - s_super) / np.maximum(room, SAME)), 0.0)


def _spaced(name: str) -> str:
    if not name.strip(" _"):
        raise ValueError(f"the true name must not be empty, got {name!r}")
    return name.lower().replace("_", " ")
