"""Which state of this code is running: its commit, where it runs from a repository."""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path

TIMEOUT_S = 10.0


def code_version() -> str:
    """`0.1.0, commit 0123456789ab`, with ` and changes` where files differ from it.

    Without a repository, or without git, the version alone.
    """
    try:
        version = metadata.version("tercet")
    except metadata.PackageNotFoundError:
        version = "not installed"
    root = Path(__file__).resolve().parents[1]
    head = git(root, "rev-parse", "--short=12", "HEAD") if (root / ".git").exists() else ""
    if not head:
        return version
    changed = " and changes" if git(root, "status", "--porcelain", "-uno") else ""
    return f"{version}, commit {head}{changed}"


def git(root: Path, *arguments: str) -> str:
    """What a git command says of a folder; empty outside a repository or without git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
