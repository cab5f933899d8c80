"""Where a question's photo lies: found under the given roots by the longest tail of its path."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

from tercet.core.data.photos import check_images
from tercet.core.types import EvalQuestion

AT_ONCE = 64
"""Photos that are checked between two signs of life."""


def find_photo(path: str, roots: Sequence[str]) -> str | None:
    """The file under one of the roots whose path ends as this one does, for the longest such end.

    At least the name of the folder and of the file must agree: names repeat between the training
    and test photos of one data set.

    Args:
        path: as a question file gives it, perhaps an absolute path on another machine.
        roots: folders; of two with equally long ends, the first counts.

    Returns:
        Path of the file, or None.
    """
    parts = [part for part in os.path.normpath(path.replace("\\", "/")).split("/") if part]
    parts = parts[parts.count("..") :]
    for start in range(len(parts) - 1):
        for root in roots:
            if os.path.isfile(found := os.path.join(root, *parts[start:])):
                return os.path.abspath(found)
    return None


def place_photos(questions: Sequence[EvalQuestion], roots: Sequence[str]) -> list[EvalQuestion]:
    """The questions with the key of their photo under the roots; empty where it is not found."""
    return [replace(q, image=find_photo(q.path, roots) or "") for q in questions]


def unusable(
    questions: Sequence[EvalQuestion], on_checked: Callable[[int], None] = lambda n: None
) -> dict[str, str]:
    """The photos that cannot be asked about: by path as the question gives it, the reason.

    Args:
        questions: with their keys.
        on_checked: called with the number of questions that were checked since the last call.
    """
    bad = {}
    for start in range(0, len(questions), AT_ONCE):
        part = questions[start : start + AT_ONCE]
        faults = check_images((q.image for q in part if q.image), "skip")
        for q in part:
            if not q.image:
                bad[q.path] = f"photo {q.path!r} is under none of the roots"
            elif q.image in faults:
                bad[q.path] = faults[q.image]
        on_checked(len(part))
    return bad
