"""The order in which a closed-world prompt shows the options."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from tercet.core.draws import seeded_int
from tercet.core.types import EvalQuestion

OptionOrder = Literal["released", "shuffled", "rotated"]
Order = tuple[int, ...]
"""Which of a question's options stands at each place of the prompt; empty: as in the file."""


def orders_of(question: EvalQuestion, kind: OptionOrder, seed: int) -> list[Order]:
    """The orders in which a question is asked.

    Args:
        question: with its options in the order of the file.
        kind: released: as in the file. shuffled: one order, drawn from the seed and the question's
            place. rotated: one order for every place of the true option, the others moved along.
        seed: of the shuffle.
    """
    places = range(len(question.options))
    if kind == "released":
        return [()]
    if kind == "shuffled":
        about = ("order", question.file, question.line)
        return [tuple(sorted(places, key=lambda option: seeded_int(seed, *about, option)))]
    truth, n = question.options.index(question.truth), len(places)
    return [tuple((truth - place + p) % n for p in places) for place in places]


def shown_in(question: EvalQuestion, order: Order) -> EvalQuestion:
    """The question with its options in this order."""
    if not order:
        return question
    return replace(question, options=tuple(question.options[place] for place in order))
