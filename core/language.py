"""Is a text English throughout? Teachers fall into another language now and then.

py3langid (Lui and Baldwin's langid.py; BSD, 1 MB with its model, needs NumPy alone) gives every
language a log-likelihood, the same on every machine. On the 12,850 pieces of the 404 published
chains of thought nothing but Latin names of species reached a margin of 21 nats over English;
sentences in Spanish, German, French, Italian and Portuguese reach 33 to 110.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache

LETTERS = 30
"""Shorter pieces are too short to tell, but for other scripts."""
MARGIN = 25.0
"""Nats by which another language must be more likely than English."""
ALLOWED = ("en", "la")
"""Latin: names of species."""
MOST_CHARS = 5000
"""Of a piece this much is looked at."""
_ENDS = re.compile(r"[\n.!?;:]+")


def foreign_piece(text: str, names: tuple[str, ...] = ()) -> str | None:
    """The first piece of a text that is not English.

    Args:
        text: any text.
        names: names that may be of any language; they do not count.

    Returns:
        A letter of another script, or a sentence in another language; None in an English text.
    """
    for name in sorted(names, key=len, reverse=True):
        text = text.replace(name, " ")
    for letter in text:
        if not letter.isascii() and letter.isalpha() and not _is_latin(letter):
            return letter
    for piece in _ENDS.split(text):
        if sum(map(str.isalpha, piece)) >= LETTERS and _is_foreign(piece):
            return " ".join(piece.split())
    return None


@cache
def _is_latin(letter: str) -> bool:
    """Of the Latin script, or a sign such as the micro of a unit."""
    name = unicodedata.name(letter, "")
    plain = unicodedata.normalize("NFKC", letter)
    return name.startswith(("LATIN", "MODIFIER", "MICRO")) or plain.isascii()


def _is_foreign(piece: str) -> bool:
    import py3langid  # 0.3 s, which only the teacher's answers need

    ranked = dict(py3langid.rank(piece[:MOST_CHARS]))
    best = max(ranked, key=ranked.get)
    return best not in ALLOWED and ranked[best] - ranked["en"] > MARGIN
