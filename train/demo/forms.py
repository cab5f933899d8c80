"""What the rows of the forms of the loss show: the table, the decision and the figure.

Only seeds that have every arm count, so that all means are over the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

from tercet.train.demo.arms import FORMS, RELEASED, START, Row
from tercet.train.demo.comparison import difference, with_interval
from tercet.train.demo.scores import PARTITIONS
from tercet.train.evaluation.intervals import bootstrap

MOST_LOSS = 3.0
"""Loss of accuracy, in percentage points, that a form must exclude."""


def whole_seeds(rows: Sequence[Row]) -> list[Row]:
    """The rows of the seeds that have every arm that is there."""
    arms = {row.arm for row in rows}
    of = {seed: {row.arm for row in rows if row.seed == seed} for seed in {r.seed for r in rows}}
    return [row for row in rows if of[row.seed] == arms]


def margin(row: Row) -> float:
    """Mean margin over all held-out pictures, seen and unseen, in nats."""
    counts = {partition: len(row.scores.hits[partition]) for partition in PARTITIONS}
    total = sum(row.scores.margins[partition] * count for partition, count in counts.items())
    return total / sum(counts.values())


def forms_report(rows: Sequence[Row]) -> str:
    """The table of the forms and what follows from it, as Markdown."""
    kept = whole_seeds(rows)
    if not kept:
        return f"no seed has every arm yet ({len(rows)} rows)"
    seeds = sorted({row.seed for row in kept})
    form = best_form(kept)
    said = f"The highest margin without loss of accuracy has `{form}`." if form else ""
    shown = f"{len(seeds)} of {len({row.seed for row in rows})} seeds have every arm: {seeds}."
    return f"{shown}\n\n{forms_table(kept)}\n\n{said}".strip()


def forms_table(rows: Sequence[Row]) -> str:
    """A Markdown table of the start and the forms: means, and paired differences to RELEASED.

    Args:
        rows: of seeds that all have the same arms.
    """
    head = ("form", "margin", "margin, unseen", "margin - released", "seen", "unseen")
    head += ("seen - released", "unseen - released", "right form", "CPU s")
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    for arm in (START, *FORMS):
        own = [row for row in rows if row.arm == arm]
        if not own:
            continue
        scores = [row.scores for row in own]
        cells = [arm, f"{mean(map(margin, own)):.2f}"]
        cells += [f"{mean(s.margins['unseen'] for s in scores):.2f}", margin_difference(rows, arm)]
        cells += [f"{mean(s.accuracy(name) for s in scores):.1f}" for name in PARTITIONS]
        differences = [difference(rows, arm, RELEASED, name) for name in PARTITIONS]
        cells += ["" if arm == RELEASED or not d else with_interval(d) for d in differences]
        cells += [f"{100 * mean(s.form for s in scores):.1f}", f"{mean(r.cpu_s for r in own):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def margin_difference(rows: Sequence[Row], arm: str) -> str:
    """Paired difference of an arm's margin to RELEASED's, with its interval over several seeds."""
    found = {(row.seed, row.arm): margin(row) for row in rows}
    pairs = [(found.get((s, arm)), found.get((s, RELEASED))) for s in {r.seed for r in rows}]
    values = [own - other for own, other in pairs if own is not None and other is not None]
    if arm == RELEASED or not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:+.2f}"
    low, high = bootstrap(values)
    return f"{mean(values):+.2f} [{low:+.2f}, {high:+.2f}]"


def best_form(rows: Sequence[Row]) -> str | None:
    """The form with the highest margin among those whose accuracy is not below RELEASED's.

    The 95 % interval of its paired difference, seen and unseen, must not end below 0, nor begin
    below -MOST_LOSS: a form that differs much from seed to seed would pass for its wide interval.

    Args:
        rows: of seeds that all have the same arms.

    Returns:
        The form's name; None without RELEASED.
    """
    margins = {}
    for arm in FORMS:
        found = [difference(rows, arm, RELEASED, name) for name in PARTITIONS]
        if None not in found and all(low >= -MOST_LOSS and high >= 0 for _, low, high in found):
            margins[arm] = mean(margin(row) for row in rows if row.arm == arm)
    return max(margins, key=margins.__getitem__, default=None)


def draw_forms(rows: Sequence[Row], out: Path) -> None:
    """Margins beside accuracies: each form's mean, the seeds, and intervals to RELEASED.

    Args:
        rows: of seeds that all have the same arms.
        out: the PNG file.
    """
    arms = [arm for arm in FORMS if any(row.arm == arm for row in rows)][::-1]
    figure = Figure(figsize=(10, 0.5 + 0.42 * len(arms)), layout="constrained")
    margins, accuracies = figure.subplots(1, 2, sharey=True)
    start = mean(margin(row) for row in rows if row.arm == START)
    margins.axvline(start, color="black", ls=":", lw=1, label="stage 1 (start)")
    for place, arm in enumerate(arms):
        values = [margin(row) for row in rows if row.arm == arm]
        margins.barh(place, mean(values), color="tab:red" if arm == RELEASED else "tab:gray")
        margins.plot(values, [place] * len(values), "k.", ms=3)
        for shift, name, colour in ((0.15, "seen", "tab:blue"), (-0.15, "unseen", "tab:orange")):
            if arm != RELEASED:
                value, low, high = difference(rows, arm, RELEASED, name)
                error = [[value - low], [high - value]]
                label = name if place == 0 else None
                accuracies.errorbar(
                    value, place + shift, xerr=error, fmt="o", ms=4, color=colour, label=label
                )
    accuracies.axvline(0, color="black", lw=1)
    margins.set(yticks=range(len(arms)), yticklabels=arms, xlabel="margin after training, nats")
    accuracies.set(xlabel="accuracy - released, points, with 95 % intervals")
    for panel in (margins, accuracies):
        panel.legend(frameon=False, fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=110)
