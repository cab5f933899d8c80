"""Options of what people see of a run: the terminal's lines, the logged groups, the report."""

from __future__ import annotations

from dataclasses import dataclass, field

from jsonargparse.typing import NonNegativeInt, PositiveInt

from tercet.core.option_types import PathText, Port, Seed


@dataclass
class LogConfig:
    verbose: bool = False
    """Show every metric of a step on the terminal, below its line."""


@dataclass
class GroupLogConfig:
    log_groups: NonNegativeInt = 16
    """Most groups of a step whose responses are written to `out`/groups, drawn by the seed; 0:
    none."""
    log_groups_every: PositiveInt = 1
    """Steps from one whose groups are written to the next."""
    log_groups_mib: PositiveInt = 1024
    """Most MiB of these files; beyond that every second one of the oldest is removed."""


@dataclass
class ReportConfig:
    """Options of train/report.py."""

    runs: list[PathText]
    """Folders of runs, laid over each other; they may also be given first, without --runs."""
    out: PathText | None = None
    """File of the page; None: report.html in the first run's folder."""
    evaluations: list[PathText] = field(default_factory=list)
    """Folders of evaluations of the first run, beside those inside its own folder."""
    serve: bool = False
    """Show the page live, on this machine alone, in place of writing it."""
    port: Port = 8123
    """Port of the live page; 0: any that is free."""
    seed: Seed = 0
    """Of the groups that are chosen at random, one a step."""
