"""Tables in the papers' shape: data sets across; seen, unseen and their average; published rows."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tercet.core.data.eval_files import DATASETS
from tercet.train.evaluation.answer_file import Mode
from tercet.train.evaluation.intervals import of_average
from tercet.train.evaluation.scoring import SCORES, Cell, Scored, cell, grouped

PUBLISHED = Path(__file__).with_name("published.csv")
"""Figures of the Fine-R1 paper; `shown` rows stand in the terminal and in Markdown, all in CSV."""
TITLES = {
    "closed": "Closed-world accuracy (%), released rule",
    "closed_strict": "Closed-world accuracy (%), exactly one option named",
    "similarity": "Open-world relative semantic similarity (%)",
    "inclusion": "Open-world text inclusion (%), released rule",
    "inclusion_strict": "Open-world text inclusion (%), exactly one known name",
}
AVERAGE, ALL = "average", "all"


@dataclass(frozen=True)
class Row:
    """A model's row of a table, for seen, unseen or both."""

    score: str
    model: str
    source: str
    """measured, baseline, or the paper's table."""
    setting: str
    """seen, unseen or all."""
    cells: dict[str, Cell]
    """By data set, and the average."""
    shown: bool = True
    """In the terminal and in Markdown too."""


def measured_rows(scored: Sequence[Scored], model: str) -> list[Row]:
    """Seen, unseen and all for every score.

    The average of seen (and of unseen) is the mean of the data sets, never of lines; that of all is
    the mean of the two. Questions of neither partition stand in the row for all.
    """
    rows = []
    groups = grouped(scored, lambda s: (s.question.partition or ALL, s.question.dataset))
    for score in SCORES:
        cells = {key: c for key, group in groups.items() if (c := cell(group, score))}
        averages = []
        for setting in ("seen", "unseen", ALL):
            of_setting = {name: c for (s, name), c in cells.items() if s == setting}
            if of_setting:
                of_setting[AVERAGE] = _average(list(of_setting.values()))
                averages.append(of_setting[AVERAGE])
            elif setting == ALL and len(averages) == 2:
                of_setting = {AVERAGE: _average(averages)}
            if of_setting:
                rows.append(Row(score, model, "measured", setting, of_setting))
    return rows


def _average(cells: Sequence[Cell]) -> Cell:
    value = sum(c.value for c in cells) / len(cells)
    low, high = of_average([c.value for c in cells], [(c.low, c.high) for c in cells])
    trials, errors = min(c.trials for c in cells), [c.error for c in cells]
    error = None if None in errors else sum(e * e for e in errors) ** 0.5 / len(cells)
    return Cell(value, low, high, sum(c.n for c in cells), trials, error)


@cache
def published_rows() -> list[Row]:
    """The rows of the Fine-R1 paper's tables 1, 2 and 6; their figures have no interval."""
    rows = []
    with open(PUBLISHED, encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            figures = {name: line[name] for name in (*DATASETS, AVERAGE) if line[name]}
            cells = {name: _figure(float(text)) for name, text in figures.items()}
            source = f"{line['paper']}, {line['table']}"
            shown = line["shown"] == "yes"
            rows.append(Row(line["score"], line["model"], source, line["setting"], cells, shown))
    return rows


def _figure(value: float) -> Cell:
    return Cell(value, value, value, 0, 0, None)


def datasets_of(rows: Iterable[Row]) -> list[str]:
    """The data sets of some rows: the papers' in their order, then others by name."""
    found = {name for row in rows for name in row.cells} - {AVERAGE}
    return [d for d in DATASETS if d in found] + sorted(found - set(DATASETS))


def shown_rows(rows: Sequence[Row], score: str) -> tuple[list[Row], list[str]]:
    """Measured and some published rows of one table, and its data sets.

    A published average is left out unless all six data sets were measured.
    """
    own = [row for row in rows if row.score == score]
    datasets, settings = datasets_of(own), {row.setting for row in own}
    columns = set(datasets) | ({AVERAGE} if set(DATASETS) <= set(datasets) else set())
    known = []
    for row in published_rows():
        cells = {name: c for name, c in row.cells.items() if name in columns}
        if row.shown and row.score == score and row.setting in settings and cells:
            known.append(replace(row, cells=cells))
    return [*known, *own], datasets


def _text(found: Cell | None, gap: str) -> str:
    if found is None:
        return ""
    if found.n == 0:
        return f"{found.value:.2f}"
    error = "" if found.error is None else f" ± {found.error:.2f}"
    return f"{found.value:.2f}{error}{gap}[{found.low:.1f}, {found.high:.1f}]"


def markdown(rows: Sequence[Row], notes: Mapping[Mode, Sequence[str]]) -> str:
    """All tables in Markdown, each with the notes on its mode below it."""
    parts = []
    for score, title in TITLES.items():
        lines, datasets = shown_rows(rows, score)
        if not datasets:
            continue
        columns = [*datasets, AVERAGE]
        parts += [f"## {title}", ""]
        parts.append(f"| model | source | setting | {' | '.join(columns)} |")
        parts.append(f"| --- | --- | --- |{' ---: |' * len(columns)}")
        for row in lines:
            cells = " | ".join(_text(row.cells.get(name), " ") for name in columns)
            model = row.model.replace("|", "\\|")
            parts.append(f"| {model} | {row.source} | {row.setting} | {cells} |")
        parts += ["", *(f"- {note}" for note in notes[SCORES[score]]), ""]
    return "\n".join(parts)


def print_tables(
    rows: Sequence[Row], notes: Mapping[Mode, Sequence[str]], console: Console
) -> None:
    """The same tables in the terminal."""
    for score, title in TITLES.items():
        lines, datasets = shown_rows(rows, score)
        if not datasets:
            continue
        caption = "\n".join(notes[SCORES[score]]) or None
        table = Table(title=title, caption=caption, title_justify="left", box=SIMPLE_HEAD)
        for name in ("model", "setting"):
            table.add_column(name, overflow="fold")
        for name in (*datasets, AVERAGE):
            table.add_column(name, justify="right", overflow="fold")
        for row in lines:
            published = "" if row.source in ("measured", "baseline") else "\n(published)"
            cells = [_text(row.cells.get(name), "\n") for name in (*datasets, AVERAGE)]
            table.add_row(row.model + published, row.setting, *cells)
        console.print(table)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """The measured and all published rows, a column a data set, and two for its interval."""
    datasets = datasets_of([*rows, *published_rows()])
    columns = [*datasets, AVERAGE]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        bounds = [f"{name}_{end}" for name in columns for end in ("low", "high")]
        writer.writerow(["score", "model", "source", "setting", *columns, *bounds])
        for row in [*rows, *published_rows()]:
            found = [row.cells.get(name) for name in columns]
            values = ["" if c is None else f"{c.value:.6f}" for c in found]
            ends = [("", "") if not (c and c.n) else (c.low, c.high) for c in found]
            shown = [f"{end:.6f}" if end != "" else "" for pair in ends for end in pair]
            writer.writerow([row.score, row.model, row.source, row.setting, *values, *shown])
