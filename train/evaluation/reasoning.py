"""What stands in a chain of thought: the reasoning before the answer, and its candidates."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from tercet.core.names import names_in, normal_form
from tercet.core.prompts import extract_answer

MOST_READ = 100_000
"""Characters of a chain of thought that are searched for candidates."""
MOST_HEADINGS = 10
MOST_WORDS = 8
"""Longest item of a list that is read as a name."""
_HEADING = re.compile(r"candidate (?:sub[- ]?)?categor|<options>", re.IGNORECASE)
_ITEM = re.compile(r"(?:[-*•]|(\d{1,2}[.)])) *(\S.*)")


def reasoning_of(output: str) -> str:
    """The text before the answer, without its tags; all of the output where there is no answer."""
    before = output
    if extract_answer(output) is not None:
        before = output[: output.find("<answer>")]
    return before.replace("<think>", "").replace("</think>", "").strip()


def candidates(output: str, names: Sequence[str] = ()) -> list[str]:
    """The names that a chain of thought weighs, in its order.

    Those are the items of the list under its heading "Candidate Subcategories", as stage 1 teaches
    it; without such a list the known names that occur in it.

    Args:
        output: the whole raw output.
        names: known names.
    """
    reasoning = reasoning_of(output)[:MOST_READ]
    lines = reasoning.splitlines()
    headings = [n for n, line in enumerate(lines) if _HEADING.search(line)]
    for n in headings[:MOST_HEADINGS]:
        found: dict[str, str] = {}
        for name in _items(lines[n + 1 :]):
            found.setdefault(normal_form(name), name)
        if found:
            return list(found.values())
    return names_in(reasoning, names) if names else []


def _items(lines: Iterable[str]) -> list[str]:
    """Items of the first list; lines below them, further to the right, are about them."""
    items, edge, numbered = [], 0, False
    for line in lines:
        place = len(line) - len(line.lstrip())
        if not line.strip() or items and place > edge + 1:
            continue
        item = _ITEM.fullmatch(line.strip())
        name = item[2].split(":")[0].strip(" *.-") if item else ""
        if len(name.split()) > MOST_WORDS:
            name = name.split(" (")[0]
        if item and not items:
            edge, numbered = place, bool(item[1])
        if name and len(name.split()) <= MOST_WORDS and bool(item[1]) == numbered:
            items.append(name)
        elif items or _HEADING.search(line):
            break
    return items
