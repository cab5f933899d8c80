"""A teacher's answers: read, kept or rejected for a reason, and made records of.

A kept answer becomes a stage-1 record in the layout of the 404 that were published.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tercet.core.data.files import check_text
from tercet.core.language import foreign_piece
from tercet.core.names import normal_form
from tercet.train.cot.prompts import SYSTEM

MOST_OPTIONS = 4
MOST_CONCEPTS = 40
MOST_CONCEPT_CHARS = 200
TAGS = ("analysis", "options", "comparison", "prediction")
_BULLET = re.compile(r"\s*(?:[-*\u2022\u2013]|\(?\d{1,2}[.)])\s*(?=\S)")
_AFTER_NAME = re.compile(r"\s?(?:[:(,;]|\.?$| - )")


@dataclass(frozen=True)
class Parts:
    """The four parts of an answer, without white space around them."""

    analysis: str
    options: str
    comparison: str
    prediction: str


def read_bullets(text: str) -> list[str]:
    """The bullet points of an answer, each once; its lines where none has a bullet."""
    items = _items(text)
    found: dict[str, str] = {}
    for item in items:
        item = item.strip("*_ ").rstrip(".")
        if item and len(item) <= MOST_CONCEPT_CHARS:
            found.setdefault(normal_form(item), item)
    return list(found.values())[:MOST_CONCEPTS]


def _items(text: str) -> list[str]:
    lines = [line for line in text.splitlines() if line.strip()]
    bullets = [line[mark.end() :] for line in lines if (mark := _BULLET.match(line))]
    return bullets or [line.strip() for line in lines]


def read_parts(text: str) -> Parts | None:
    """The four parts; None where a tag is missing, there twice, in another order, or empty."""
    place, found = 0, []
    for tag in TAGS:
        opening, closing = f"<{tag}>", f"</{tag}>"
        if text.count(opening) != 1 or text.count(closing) != 1:
            return None
        start = text.find(opening, place)
        end = text.find(closing, start)
        if start < place or end < start:
            return None
        found.append(text[start + len(opening) : end].strip())
        place = end + len(closing)
    return Parts(*found) if all(found) else None


def fault_of(parts: Parts | None, label: str, english: bool = True) -> str | None:
    """Why an answer is not kept; None where it is.

    Args:
        parts: as `read_parts` gives them.
        label: the true sub-category; names are compared in their normal form (core.names).
        english: whether another language is a fault.
    """
    if parts is None:
        return "tags: not each of the four parts once, in order, with text"
    for tag in TAGS:
        try:
            check_text(getattr(parts, tag), tag)
        except ValueError as error:
            return f"text: {error}"
    if english:
        text = "\n".join((parts.analysis, parts.options, parts.comparison))
        if piece := foreign_piece(text, (label,)):
            return f"language: {piece[:100]!r} is not English"
    options, among = _options(parts.options, parts.prediction)
    if options > MOST_OPTIONS:
        return f"options: {options}, more than {MOST_OPTIONS}"
    if not among:
        return "options: the prediction is not among them"
    if normal_form(parts.prediction) != normal_form(label):
        return "prediction: another sub-category"
    return None


def _options(text: str, name: str) -> tuple[int, bool]:
    """How many candidates there are, and whether a name is one of them.

    Candidates are bullet points, lines, or what commas or semicolons part; a name may hold those.
    """
    wanted, stand_in = normal_form(name), "\uffff"
    items = [normal_form(item.replace("*", "")) for item in _items(text)]
    items = [item.replace(wanted, stand_in) for item in items]
    if len(items) == 1:
        items = items[0].split(";" if ";" in items[0] else ",")
    items = [item.strip(" \"'").removeprefix("and ").removeprefix("or ") for item in items]
    items = [item for item in items if item]
    return len(items), any(
        item.startswith(stand_in) and _AFTER_NAME.match(item, len(stand_in)) for item in items
    )


def record(image: str, question: str, parts: Parts, label: str) -> dict:
    """A stage-1 record in the layout of the published ones.

    Args:
        image: its path as the file of records names it.
        question: without `<image>`.
        parts: of the answer.
        label: the true sub-category.
    """
    answer = (
        f"<think> Analysis of Visual Features:\n{parts.analysis}\n\n Candidate Subcategories:\n"
        f"{parts.options}\n\n Comparison Process:\n {parts.comparison}\n\n\nThe prediction is: "
        f"{parts.prediction}\n</think>\n\n<answer>{label}</answer>"
    )
    system = {"role": "system", "content": SYSTEM}
    return {"messages": [system, *_turns(question, answer)], "images": [image]}


def direct_record(image: str, question: str, label: str) -> dict:
    """A record without a chain of thought: the paper's baseline SFT."""
    return {"messages": _turns(question, f"<answer>{label}</answer>"), "images": [image]}


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"<image>{question}"},
        {"role": "assistant", "content": answer},
    ]
