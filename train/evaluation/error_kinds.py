"""What kind of error an answer is: did the model know the name, consider it, or say nothing."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache

from tercet.core.names import names_in, normal_form
from tercet.core.prompts import extract_answer
from tercet.train.evaluation.metrics import open_world_included, spoken_name

KINDS = {
    "not_chosen": "the reasoning names the right one, the answer another",
    "never_candidate": "the right name is nowhere in the reasoning",
    "several_names": "the answer holds several known names",
    "no_answer": "nothing stands between answer tags, or there are none",
    "cut_off": "the output ends at the token limit before an answer",
    "other_language": "letters of another script than the name's",
}
"""In the order of the columns."""
FOREIGN_SHARE = 0.1
"""Of an output's letters: as many of other scripts make it one of another language."""


def error_kind(
    output: str, finish: str, truth: str, names: Sequence[str], cars: bool = False
) -> str | None:
    """The kind of error of an answer, a key of KINDS; None for a right one.

    The first that holds counts: cut_off, no_answer, several_names, right, other_language,
    not_chosen, never_candidate. Right is an answer that includes the true name, by the released
    rule; unlike there, it must stand between the tags.

    Args:
        output: the whole raw output.
        finish: why it ended; "length" where it was cut off.
        truth: the true name.
        names: the known names: the options in closed world.
        cars: body and year of the name need not be said (see `open_world_included`).
    """
    answer = extract_answer(output, "longest")
    if not answer:
        return "cut_off" if finish == "length" else "no_answer"
    if len(names_in(answer, names)) > 1:
        return "several_names"
    if open_world_included(f"<answer>{answer}</answer>", truth, cars):
        return None
    if _is_foreign(output, truth):
        return "other_language"
    reasoning = output[: output.find("<answer>")]
    wanted = [spoken_name(truth)] if cars else names
    considered = {normal_form(name) for name in names_in(reasoning, wanted)}
    among = normal_form(wanted[0] if cars else truth) in considered
    return "not_chosen" if among else "never_candidate"


def _is_foreign(text: str, name: str) -> bool:
    """Whether a text of a Latin name has many letters of other scripts."""
    if text.isascii() or any(char.isalpha() and not _is_latin(char) for char in name):
        return False
    letters = [char for char in text if char.isalpha()]
    return sum(not _is_latin(char) for char in letters) > FOREIGN_SHARE * len(letters)


@cache
def _is_latin(char: str) -> bool:
    return char.isascii() or "LATIN" in unicodedata.name(char, "")
