"""The kinds of error of an evaluation: how many answers have each, and examples to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tercet.train.evaluation.error_kinds import KINDS
from tercet.train.evaluation.scoring import Scored, grouped

EXAMPLES, EXAMPLE_CHARS = 5, 2000


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
