"""Names of sub-categories: one normal form in which they are compared, and which occur in a text.

Class lists, file systems and models spell one name in many ways: with `_`, in capitals, with a
curly apostrophe, a non-breaking hyphen, or accents as characters of their own.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from functools import cache, lru_cache
from pathlib import Path

from tercet.core.prompts import squeeze

MOST_MARKS = 30
"""Accents on one letter that are read (Unicode's stream-safe text); sorting more takes too long."""
_DASHES = "\u2043\u2212\u02d7\u2796"  # beside category Pd
_APOSTROPHES = (
    "'`\u00b4\u02b9\u02bb\u02bc\u02bd\u02be\u02bf\u02c8\u055a\u05f3\u1fbd\u1fbf\u1ffe"
    "\u2018\u2019\u201a\u201b\u2032\u2035\u2039\u203a\u275b\u275c\ua78b\ua78c\uff07\uff40"
)
_QUOTES = (
    '"\u00ab\u00bb\u02ba\u05f4\u201c\u201d\u201e\u201f\u2033\u2036\u275d\u275e\u301d\u301e\u301f'
    "\uff02"
)
_UNSEEN = "\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0"  # beside category Cf and variation selectors
_SIGNS = "\u2120\u2122"  # service and trade mark: NFKC makes letters of them
_NO_SPACES = (
    "CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "BOPOMOFO", "HANGUL", "YI ", "TANGUT", "NUSHU",
    "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "JAVANESE", "BALINESE", "TAI ", "NEW TAI",
)  # fmt: skip
"""How Unicode's names of characters begin in scripts that put no spaces between words, or, as in
Korean, put particles right behind a name."""


class _Folding(dict):
    """For str.translate: a code to a plain character, to nothing, or to itself."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        category = unicodedata.category(char)
        if category == "Pd" or char in _DASHES:
            folded = "-"
        elif char in _APOSTROPHES:
            folded = "'"
        elif char in _QUOTES:
            folded = '"'
        elif category == "Cf" or char in _UNSEEN + _SIGNS or _is_selector(code):
            folded = ""
        else:
            folded = char
        self[code] = folded
        return folded


def _is_selector(code: int) -> bool:
    return 0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF or 0x180B <= code <= 0x180F


_FOLDING = _Folding()


def normal_form(text: str) -> str:
    """The form in which names are compared: two spellings of a name have the same one.

    It is Unicode's NFKC with case folded; dashes, apostrophes and quotation marks are plain ones;
    characters that are not seen are left out; `_` and white space are single spaces, none at the
    ends nor around `<`, `>` and `/`.
    """
    if text.isascii():
        text = text.lower().replace("`", "'")
    else:
        text = unicodedata.normalize("NFD", _few_marks(text.translate(_FOLDING))).casefold()
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        text = text.translate(_FOLDING)
    return squeeze(" ".join(text.replace("_", " ").split()))


def _few_marks(text: str) -> str:
    """`text` with at most MOST_MARKS combining marks in a row."""
    kept, run = [], 0
    for char in text:
        run = run + 1 if unicodedata.combining(char) else 0
        if run <= MOST_MARKS:
            kept.append(char)
    return "".join(kept)


def names_in(text: str, names: Iterable[str]) -> list[str]:
    """The known names that occur in a text, compared in the normal form.

    A name counts only between word boundaries, where its script has them. Longer names are searched
    first, and text that they match is not searched again: "crested auklet" does not count as
    "auklet".

    Args:
        text: the text to search.
        names: the known names; of two that are equal in the normal form, the first is returned.

    Returns:
        The distinct names found, spelled as given, in the order of their first occurrence.

    Raises:
        ValueError: a name is empty.
    """
    return list(_names_in(text, tuple(names)))


@lru_cache(maxsize=64)
def _names_in(text: str, names: tuple[str, ...]) -> tuple[str, ...]:
    hay = normal_form(text)
    taken = bytearray(len(hay))
    letters = set(hay)
    found: dict[str, int] = {}
    for needle, name in _by_length(names):
        # A search for 200 names in a long text of few letters would take a second.
        start = hay.find(needle) if letters.issuperset(needle) else -1
        while start >= 0:
            end = start + len(needle)
            if taken.find(1, start, end) >= 0 or _in_word(hay, start) or _in_word(hay, end):
                end = start + 1
            else:
                taken[start:end] = b"\1" * len(needle)
                found.setdefault(name, start)
            start = hay.find(needle, end)
    return tuple(sorted(found, key=found.__getitem__))


def is_only_name(text: str, truth: str, names: Iterable[str]) -> bool:
    """Whether the true name is the only known name that occurs in a text (see `names_in`).

    Raises:
        ValueError: the true name is not a known one.
    """
    known, wanted = tuple(names), [normal_form(truth)]
    if [normal_form(name) for name in names_in(truth, known)] != wanted:
        raise ValueError(f"the true name {truth!r} is not a known name; known are {known}")
    return [normal_form(name) for name in names_in(text, known)] == wanted


def refuse_alike(classes: Iterable[tuple[str, str]], where: str | Path) -> None:
    """Refuse two spellings of one name: a negative could be of the same sub-category.

    Args:
        classes: (super-category, sub-category) pairs.
        where: what the error names, a file or a folder.

    Raises:
        ValueError: naming two super-categories, or two sub-categories of one super-category, that
            differ but are equal in the normal form.
    """
    by_super: dict[str, list[str]] = defaultdict(list)
    for super_category, sub_category in sorted(set(classes)):
        by_super[super_category].append(sub_category)
    _refuse_alike(by_super, "super-categories", where)
    for super_category, names in by_super.items():
        of_super = f" of {super_category!r}" if super_category else ""
        _refuse_alike(names, f"sub-categories{of_super}", where)


def _refuse_alike(names: Iterable[str], kind: str, where: str | Path) -> None:
    spelled: dict[str, str] = {}
    for name in names:
        other = spelled.setdefault(normal_form(name), name)
        if other != name:
            raise ValueError(
                f"{where}: the {kind} {_shown(other)} and {_shown(name)} are one name in two "
                "spellings: rename or merge them"
            )


def _shown(name: str) -> str:
    """A name in quotation marks, and its codes where two names could look alike."""
    return repr(name) if name.isascii() else f"{name!r} ({ascii(name)})"


@lru_cache(maxsize=64)
def _by_length(names: tuple[str, ...]) -> list[tuple[str, str]]:
    """(name in the normal form, name as given), longest first."""
    needles: dict[str, str] = {}
    for name in names:
        if not normal_form(name):
            raise ValueError(f"a known name must not be empty, got {name!r}")
        needles.setdefault(normal_form(name), name)
    return sorted(needles.items(), key=lambda item: -len(item[0]))


def _in_word(text: str, place: int) -> bool:
    """Whether the characters before and after a place are parts of one word."""
    if not 0 < place < len(text):
        return False
    before, after = text[place - 1], text[place]
    if unicodedata.category(after)[0] == "M":
        return True
    return _is_part(before) and _is_part(after) and _has_spaces(before) and _has_spaces(after)


@cache
def _is_part(char: str) -> bool:
    """Whether words consist of such characters: letters, digits, and the marks on them."""
    return char.isalnum() or unicodedata.category(char)[0] == "M"


@cache
def _has_spaces(char: str) -> bool:
    """Whether a character's script puts spaces between words."""
    return not unicodedata.name(char, "").startswith(_NO_SPACES)
