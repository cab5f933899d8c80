"""What the demo's rows show: tables, a figure, paired differences, claims with verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import get_args

import numpy as np
from matplotlib.figure import Figure

from tercet.train.demo.arms import ARMS, DAPO, LABELS, PERMUTED, START, TAPO, Equal, Row
from tercet.train.demo.scores import ACCURACIES, PARTITIONS, Scores
from tercet.train.demo.species import ATTRIBUTES, Names
from tercet.train.evaluation.intervals import wilson

GAIN, UNSEEN_LOSS, PERMUTED_GAIN, LABELS_LOSS = 5.0, 1.0, 2.0, 10.0
"""Bounds of `verdicts`, in percentage points."""
DRAWS = 2000
CHANCE = "chance 60"
"""Share (%) of seen names, 75 of 125, where nothing is known of the names or the picture."""
_COLUMNS = (
    "policy",
    *("seen", "unseen", "seen, closed", "unseen, closed"),
    *ATTRIBUTES,
    *(f"seen names on grey ({CHANCE})", "form", "tokens", "CPU s"),
)


def explained(scores: Scores) -> list[float]:
    """What stands beside the accuracies: attributes (%), grey (%), form (%), mean tokens."""
    shares = [*scores.attributes.values(), scores.grey, scores.form]
    return [*(100 * share for share in shares), scores.length]


def seed_table(rows: Sequence[Row]) -> str:
    """A Markdown table of one seed's rows, accuracies with Wilson's 95 % intervals."""
    return _table([(row.arm, _with_intervals(row.scores), [row]) for row in rows])


def mean_table(rows: Sequence[Row]) -> str:
    """A Markdown table of means over seeds, one line an arm."""
    lines = []
    for arm in dict.fromkeys(row.arm for row in rows):
        own = [row for row in rows if row.arm == arm]
        means = [mean(row.scores.accuracy(name) for row in own) for name in ACCURACIES]
        lines.append((f"{arm} ({len(own)})", [f"{value:.1f}" for value in means], own))
    return _table(lines)


def _with_intervals(scores: Scores) -> list[str]:
    shown = []
    for name in ACCURACIES:
        hits = scores.hits[name]
        low, high = wilson(hits.count("1") / len(hits), len(hits))
        shown.append(f"{scores.accuracy(name):.1f} [{100 * low:.0f}, {100 * high:.0f}]")
    return shown


def _table(lines: Sequence[tuple[str, list[str], Sequence[Row]]]) -> str:
    head = [f"| {' | '.join(_COLUMNS)} |", "| --- |" + " ---: |" * (len(_COLUMNS) - 1)]
    for name, accuracies, rows in lines:
        beside = [mean(values) for values in zip(*(explained(r.scores) for r in rows), strict=True)]
        numbers = [f"{value:.1f}" for value in beside]
        seconds = f"{mean(row.cpu_s for row in rows):.0f}"
        head.append(f"| {' | '.join([name, *accuracies, *numbers, seconds])} |")
    return "\n".join(head)


def difference(
    rows: Sequence[Row], arm: str, other: str, name: str
) -> tuple[float, float, float] | None:
    """Paired difference of two arms' accuracies, in points, with a bootstrap interval.

    Args:
        rows: of one comparison.
        arm: the minuend.
        other: the subtrahend.
        name: one of ACCURACIES.

    Returns:
        Mean over the seeds that have both arms, and the 95 % interval: seeds are drawn again, and
        in each the questions. None where no seed has both.
    """
    found = {(row.seed, row.arm): row.scores.hits[name] for row in rows}
    seeds = sorted(seed for seed, of in found if of == arm and (seed, other) in found)
    if not seeds:
        return None
    paired = [
        np.array(list(found[seed, arm]), int) - np.array(list(found[seed, other]), int)
        for seed in seeds
    ]
    return paired_difference(paired)


def paired_difference(paired: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Mean over seeds of paired differences, in points, and its 95 % interval as `difference`'s.

    Args:
        paired: for each seed the differences of its questions, -1, 0 or 1.
    """
    low, high = np.percentile(_drawn_means(paired), [2.5, 97.5])
    return 100 * mean(d.mean() for d in paired), 100 * low, 100 * high


def _drawn_means(paired: Sequence[np.ndarray]) -> np.ndarray:
    """[DRAWS] means of paired differences over seeds drawn again, and questions within each."""
    rng, means = np.random.default_rng(0), np.zeros(DRAWS)
    for _ in paired:  # as many seeds as there are
        chosen = rng.integers(len(paired), size=DRAWS)
        for i, of_seed in enumerate(paired):
            draws = np.flatnonzero(chosen == i)
            questions = rng.integers(len(of_seed), size=(len(draws), len(of_seed)))
            means[draws] += of_seed[questions].mean(axis=1) / len(paired)
    return means


def difference_table(rows: Sequence[Row]) -> str:
    """A Markdown table of every arm's paired differences to the start and to DAPO, in points."""
    lines = [
        "| arm | seeds | seen - start | unseen - start | seen - DAPO | unseen - DAPO |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for arm in ARMS:
        cells = [
            None if arm == other else difference(rows, arm, other, name)
            for other in (START, DAPO)
            for name in ("seen", "unseen")
        ]
        seeds = len({row.seed for row in rows if row.arm == arm})
        if seeds:
            shown = " | ".join(with_interval(cell) if cell else "" for cell in cells)
            lines.append(f"| {arm} | {seeds} | {shown} |")
    return "\n".join(lines)


def with_interval(found: tuple[float, float, float]) -> str:
    """A difference and its interval."""
    value, low, high = found
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def verdicts(rows: Sequence[Row], names: Names) -> list[str]:
    """The demo's claims about all seeds together, each with its figures and pass or FAIL.

    Args:
        rows: of the comparison at equal responses.
        names: kind of the world's names; the claim about labels is made for opaque ones.
    """
    checks = []
    for arm in (TAPO, DAPO):
        checks.append((arm, "seen", "at least +5", lambda value: value >= GAIN))
        checks.append((arm, "unseen", "at least -1", lambda value: value >= -UNSEEN_LOSS))
    checks.append((PERMUTED, "seen", "under +2", lambda value: value < PERMUTED_GAIN))
    if names == "opaque":
        checks.append((LABELS, "unseen", "at most -10", lambda value: value <= -LABELS_LOSS))
    lines = []
    for arm, name, bound, holds in checks:
        found = difference(rows, arm, START, name)
        if found is None:
            lines.append(f"not run  {arm}: {name}, {bound}")
        else:
            verdict = "pass" if holds(found[0]) else "FAIL"
            lines.append(f"{verdict}  {arm}: {name} {with_interval(found)} points, {bound}")
    return lines


def report(rows: Sequence[Row], names: Names) -> str:
    """The whole of demo-seeds' result as Markdown; a comparison without rows is left out."""
    first, timed = ([row for row in rows if row.equal == equal] for equal in get_args(Equal))
    shared = [row for row in first if row.arm in (START, TAPO)]
    parts = []
    for title, own in (("responses", first), ("CPU seconds", timed and [*shared, *timed])):
        if own:
            heading = f"### as many {title} as TAPO, mean (seeds)"
            parts += [heading, mean_table(own), difference_table(own)]
    return "\n\n".join([*parts, *verdicts(first, names)])


def draw_gains(rows: Mapping[Names, Sequence[Row]], out: Path) -> None:
    """What every arm gains on the start, seen and unseen, a panel for each kind of names.

    Args:
        rows: of the comparison at equal responses, by kind of names.
        out: the PNG file.
    """
    arms = [arm for arm in ARMS if any(row.arm == arm for own in rows.values() for row in own)]
    figure = Figure(figsize=(10, 0.9 + 0.36 * len(arms)), layout="constrained")
    panels = figure.subplots(1, len(rows), sharey=True, squeeze=False)[0]
    for panel, (names, own) in zip(panels, rows.items(), strict=True):
        for shift, name, colour in ((0.17, "seen", "tab:blue"), (-0.17, "unseen", "tab:orange")):
            found = {arm: difference(own, arm, START, name) for arm in arms}
            found = {arm: gain for arm, gain in found.items() if gain}
            values = np.array(list(found.values())).reshape(-1, 3).T
            places = [len(arms) - 1 - arms.index(arm) + shift for arm in found]
            errors = [values[0] - values[1], values[2] - values[0]]
            panel.errorbar(
                values[0], places, xerr=errors, fmt="o", ms=5, capsize=2, color=colour, label=name
            )
        start = [mean(r.scores.accuracy(n) for r in own if r.arm == START) for n in PARTITIONS]
        panel.axvline(0, color="black", lw=1)
        panel.set_title(f"{names} names, start {start[0]:.0f} / {start[1]:.0f}", loc="left")
        panel.set(yticks=range(len(arms)), yticklabels=arms[::-1], xlabel="points gained")
        panel.grid(axis="x", alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, loc="lower left")
    figure.savefig(out, dpi=110)
