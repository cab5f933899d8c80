"""Options of what a run shows of itself: the terminal's lines and the groups that are kept."""

from __future__ import annotations

from dataclasses import dataclass

from jsonargparse.typing import NonNegativeInt, PositiveInt


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
