"""What an evaluation writes: a line for each answer, tables, and the kinds of error."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tercet.core.names import normal_form
from tercet.core.prompts import extract_answer
from tercet.train.evaluation.confusion import draw_confusion
from tercet.train.evaluation.error_kinds import KINDS
from tercet.train.evaluation.option_bias import baseline_rows, meaning, write_places
from tercet.train.evaluation.scoring import (
    SCORES,
    Cell,
    DomainWords,
    Scored,
    cell,
    domain_word,
    grouped,
)
from tercet.train.evaluation.tables import markdown, measured_rows, print_tables, write_csv

EXAMPLES, EXAMPLE_CHARS = 5, 2000
FIRST_COLUMNS = ("questions", "mode", "n", "closed", "inclusion", "similarity")


def write_report(
    scored: Sequence[Scored],
    folder: Path,
    *,
    model: str,
    words: DomainWords,
    remarks: Sequence[str],
    console: Console,
) -> None:
    """Write every file of an evaluation and print its tables.

    Args:
        scored: at least one answer.
        folder: made where there is none.
        model: name of the tables' row.
        words: as the answers were scored.
        remarks: stand below every table.
        console: for the tables.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_lines(scored, folder / "lines.jsonl", words)
    _write_table(scored, folder / "table.csv")
    _write_sub_categories(scored, folder / "by_sub_category.csv")
    rows = [*baseline_rows(scored), *measured_rows(scored, model)]
    notes = {"closed": [*meaning(scored), *remarks], "open": remarks}
    write_csv(rows, folder / "tables.csv")
    (folder / "tables.md").write_text(markdown(rows, notes), encoding="utf-8")
    if any(s.answer.mode == "closed" for s in scored):
        write_places(scored, folder / "by_place.csv")
    for mode in ("closed", "open"):
        of_mode = [s for s in scored if s.answer.mode == mode]
        if of_mode:
            draw_confusion(of_mode, folder / f"confusion_{mode}.png")
    write_examples(scored, folder / "errors.md")
    print_tables(rows, notes, console)
    print_shares(scored, console)


def _write_lines(scored: Sequence[Scored], path: Path, words: DomainWords) -> None:
    with open(path, "w", encoding="utf-8", errors="replace") as file:
        for s in scored:
            a, q = s.answer, s.question
            line = {
                "file": a.file,
                "line": a.line,
                "mode": a.mode,
                "trial": a.trial,
                "dataset": q.dataset,
                "partition": q.partition,
                "image": q.path,
                "truth": q.truth,
                "order": a.order,
                "answer": extract_answer(s.text, "longest"),
                "named": s.named,
                **s.scores,
                "error": s.error,
                "output": a.output,
                "finish": a.finish,
                "missing": s.missing,
            }
            if a.mode == "open":
                line["domain_word"] = domain_word(q, words)[0]
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _write_table(scored: Sequence[Scored], path: Path) -> None:
    """One row for each question file and mode."""
    strict = [name for name in SCORES if name not in FIRST_COLUMNS]
    bounds = [f"{name}_{end}" for name in SCORES for end in ("low", "high", "error")]
    counts = ["trials", "no_answer", "cut_off", "missing"]
    errors = [f"error_{kind}" for kind in KINDS]
    header = [*FIRST_COLUMNS, *strict, "dataset", "partition", *counts, *bounds, *errors]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, header, restval="")
        writer.writeheader()
        for (stem, mode), group in grouped(
            scored, lambda s: (s.answer.file, s.answer.mode)
        ).items():
            asked = [s for s in group if not s.missing]
            row = {
                "questions": stem,
                "mode": mode,
                "n": len({s.answer.line for s in group}),
                "dataset": _only(s.question.dataset for s in group),
                "partition": _only(s.question.partition for s in group),
                "trials": len({s.answer.trial for s in group}),
                "no_answer": sum(not extract_answer(s.text, "longest") for s in asked),
                "cut_off": sum(s.answer.finish == "length" for s in asked),
                "missing": sum(s.missing for s in group),
            }
            for name in SCORES:
                row |= _columns(name, cell(group, name))
            row |= {f"error_{kind}": f"{share:.6f}" for kind, share in shares(group).items()}
            writer.writerow(row)


def _only(values) -> str:
    """The one value that all have; empty where they differ."""
    found = set(values)
    return found.pop() if len(found) == 1 else ""


def _columns(name: str, found: Cell | None) -> dict[str, str]:
    if found is None:
        return {}
    ends = {"": found.value, "_low": found.low, "_high": found.high, "_error": found.error}
    return {name + end: f"{value:.6f}" for end, value in ends.items() if value is not None}


def _write_sub_categories(scored: Sequence[Scored], path: Path) -> None:
    """One row for each sub-category and mode, with the wrong name that was said most often."""
    header = ["dataset", "partition", "sub_category", "mode", "n", *SCORES]
    groups = grouped(
        scored,
        lambda s: (s.question.dataset, s.question.partition, s.question.truth, s.answer.mode),
    )
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*header, "most_said_instead", "times"], restval="")
        writer.writeheader()
        for key, group in sorted(groups.items()):
            row = dict(zip(header, key, strict=False))
            row["n"] = len({(s.answer.file, s.answer.line) for s in group})
            for name in SCORES:
                values = [s.scores[name] for s in group if name in s.scores]
                if values:
                    row[name] = f"{100 * sum(values) / len(values):.4f}"
            wrong = Counter(name for s in group for name in wrong_names(s))
            if wrong:
                row["most_said_instead"], row["times"] = wrong.most_common(1)[0]
            writer.writerow(row)


def wrong_names(s: Scored) -> list[str]:
    """The known names in an answer that are not the true one."""
    truth = normal_form(s.question.truth)
    return [name for name in s.named if normal_form(name) != truth]


def shares(scored: Sequence[Scored]) -> Mapping[str, float]:
    """Percent of the answers with each kind of error; of those that were asked for."""
    asked = [s for s in scored if not s.missing]
    return {k: 100 * sum(s.error == k for s in asked) / len(asked) for k in KINDS if asked}


def write_examples(scored: Sequence[Scored], path: Path) -> None:
    """Write the shares and some examples of each kind, of sub-categories as different as can be."""
    parts = ["# Errors", ""]
    for (mode,), of_mode in grouped(scored, lambda s: (s.answer.mode,)).items():
        parts += [f"## {mode} world", "", "| kind | % of answers | meaning |"]
        parts.append("| --- | ---: | --- |")
        parts += [f"| {k} | {v:.2f} | {KINDS[k]} |" for k, v in shares(of_mode).items()]
        for kind in KINDS:
            group = [s for s in of_mode if s.error == kind]
            if group:
                parts += ["", f"### {kind} ({mode}): {len(group):,}"]
                parts += [line for s in _varied(group) for line in _example(s)]
        parts.append("")
    path.write_text("\n".join(parts), encoding="utf-8", errors="replace")


def _varied(group: Sequence[Scored]) -> list[Scored]:
    first = {s.question.truth: s for s in reversed(group)}
    rest = [s for s in group if first[s.question.truth] is not s]
    return [*reversed(first.values()), *rest][:EXAMPLES]


def _example(s: Scored) -> list[str]:
    text = s.answer.output[:EXAMPLE_CHARS] + ("…" if len(s.answer.output) > EXAMPLE_CHARS else "")
    quoted = [f"> {line}" for line in text.replace("<", "\\<").splitlines()]
    place = f"{s.answer.file}:{s.answer.line}"
    return ["", f"**{s.question.truth}** · {s.question.path} · {place}", "", *(quoted or [">"])]


def print_shares(scored: Sequence[Scored], console: Console) -> None:
    """A table of the kinds of error, a row for each mode and partition."""
    table = Table(title="Errors (% of answers)", title_justify="left", box=SIMPLE_HEAD)
    for name in ("world", "setting"):
        table.add_column(name)
    for kind in KINDS:
        table.add_column(kind.replace("_", " "), justify="right")
    groups = grouped(scored, lambda s: (s.answer.mode, s.question.partition or "all"))
    for (mode, setting), group in groups.items():
        table.add_row(mode, setting, *(f"{value:.2f}" for value in shares(group).values()))
    console.print(table)
