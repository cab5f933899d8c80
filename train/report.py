"""A run as a page: its curves, what the policy says about photos, confusion, evaluations, options.

    python -m tercet.train.report runs/mine                      # writes runs/mine/report.html
    python -m tercet.train.report runs/mine runs/other --out both.html
    python -m tercet.train.report runs/mine --serve              # live, while the run goes on

The page is one file without anything from elsewhere: it opens from disk, on a phone too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tercet.core.log_config import ReportConfig
from tercet.train.cli.command_line import check_output, command, read_options

PAGE = "report.html"


def read(argv: Sequence[str]) -> ReportConfig:
    """The options; first words without dashes are runs."""
    count = next((n for n, word in enumerate(argv) if word.startswith("-")), len(argv))
    runs = ["--runs", *argv[:count]] if count else []
    return read_options(ReportConfig, [*runs, *argv[count:]], __doc__.split("\n")[0])


def write(page: str, path: Path) -> None:
    """Write the page, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)


def main() -> None:
    options = read(sys.argv[1:])
    out = Path(options.out or Path(options.runs[0]) / PAGE)
    if not options.serve:
        check_output(out, "out")
    from tercet.train.page.build import Report
    from tercet.train.page.serve import serve

    folders, evaluations = map(Path, options.runs), map(Path, options.evaluations)
    report = Report([*folders], [*evaluations], options.seed)
    for run in report.runs:
        for problem in run.problems:
            print(f"{run.name}: {problem}")
    if options.serve:
        serve(report, options.port)
        return
    write(report.page(live=False), out)
    print(f"wrote {out}: {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    command(main)
