"""A figure of what was said for what: a matrix a data set, of the sub-categories that err most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tercet.core.names import normal_form
from tercet.train.evaluation.scoring import Scored, grouped

MOST = 12
"""Sub-categories in a matrix."""
OTHER, SEVERAL, NONE = "(other)", "(several)", "(none)"
LONGEST = 26
"""Characters of a name."""
DPI = 110


def draw_confusion(scored: Sequence[Scored], png: Path) -> None:
    """Draw a matrix for each data set: a row a true name, a column the name that was said.

    Args:
        scored: answers of one mode, at least one.
        png: picture to write.
    """
    groups = grouped(scored, lambda s: (s.question.dataset,))
    columns = min(len(groups), 2)
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(7.5 * columns, 6.2 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, ((dataset,), group) in zip(axes, groups.items(), strict=False):
        _draw(axis, dataset, group)
    for axis in axes[len(groups) :]:
        axis.remove()
    figure.savefig(png, dpi=DPI)


def confusion(scored: Sequence[Scored]) -> tuple[list[str], list[str], np.ndarray]:
    """Shares of what was said for the sub-categories with the most wrong answers.

    Returns:
        True names; said names (the same and OTHER, SEVERAL, NONE); [true, said] shares that add up
        to 1 in each row.
    """
    spelled: dict[str, str] = {}
    said: Counter[tuple[str, str]] = Counter()
    for s in scored:
        truth = normal_form(s.question.truth)
        spelled.setdefault(truth, s.question.truth)
        names = [normal_form(name) for name in s.named]
        said[truth, names[0] if len(names) == 1 else (SEVERAL if names else NONE)] += 1
    wrong: Counter[str] = Counter()
    for (truth, name), count in said.items():
        wrong[truth] += count if name != truth else 0
    rows = sorted(name for name, _ in wrong.most_common(MOST))
    columns = [*rows, OTHER, SEVERAL, NONE]
    counts = np.zeros((len(rows), len(columns)))
    for (truth, name), count in said.items():
        if truth in rows:
            counts[rows.index(truth), columns.index(name if name in columns else OTHER)] += count
    shares = counts / counts.sum(axis=1, keepdims=True)
    return [spelled[n] for n in rows], [spelled.get(n, n) for n in columns], shares


def _draw(axis: Axes, dataset: str, scored: Sequence[Scored]) -> None:
    rows, columns, shares = confusion(scored)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axis.set_title(dataset, fontsize=10, parse_math=False)
    style = {"fontsize": 7, "parse_math": False}
    axis.set_xticks(range(len(columns)), [n[:LONGEST] for n in columns], rotation=60, ha="right")
    axis.set_yticks(range(len(rows)), [n[:LONGEST] for n in rows])
    for label in (*axis.get_xticklabels(), *axis.get_yticklabels()):
        label.set(**style)
    axis.set_xlabel("said", fontsize=8)
    axis.set_ylabel("true", fontsize=8)
    for (i, j), share in np.ndenumerate(shares):
        if share >= 0.005:
            colour = "white" if share > 0.6 else "black"
            text = f"{100 * share:.0f}"
            axis.text(j, i, text, ha="center", va="center", fontsize=6.5, color=colour)
