"""Will a run work here? Looks at the machine and at a run's inputs, and says what to do.

    python -m tercet.train.doctor
    python -m tercet.train.doctor --config train/recipes/tapo_7b.yaml --start_server

Options of train/tapo.py say which model, data, servers and reward are looked at; what is not named
is left out. Nothing is trained, downloaded or changed. The exit code is 1 where there is an error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tercet.core.config import TapoConfig
from tercet.core.tool_config import DoctorConfig
from tercet.train.cli.arguments import join_arguments, options_of, split_arguments
from tercet.train.cli.command_line import command, help_text, parse, read_options
from tercet.train.cli.help_page import asked

if TYPE_CHECKING:
    from tercet.train.fit.finding import Check, Finding

MARKS = {"ok": "ok     ", "warning": "WARNING", "error": "ERROR  "}


def read(argv: Sequence[str]) -> tuple[DoctorConfig, TapoConfig]:
    """The doctor's own options and those of the run that is looked at.

    Raises:
        ValueError: naming the option at fault.
    """
    if asked(argv):
        print(help_text(DoctorConfig, __doc__.splitlines()[0], False, True))
        print("and the options of train/tapo.py:\n")
    found, own = split_arguments(argv), options_of(DoctorConfig)
    mine = join_arguments([a for a in found if a[0] in own])
    rest = join_arguments([a for a in found if a[0] not in own])
    options = read_options(DoctorConfig, mine, "")
    return options, parse(TapoConfig, rest, "")[0]


def checks(options: DoctorConfig, config: TapoConfig) -> Iterator[tuple[str, Check]]:
    """Names and checks, the quick ones first."""
    # Here, so that --help does not wait for torch and transformers.
    from tercet.train.fit import inputs, machine

    yield "python", machine.python
    yield "packages", machine.packages
    yield "gpu", machine.gpus
    yield "attention", machine.attention
    yield "triton", machine.triton
    yield "disk", lambda: machine.disk(Path(config.run.out), inputs.checkpoint_bytes(config))
    yield "shared memory", machine.shared_memory
    yield "ports", machine.ports
    yield "all-reduce", machine.all_reduce
    if config.model.path:
        yield "model", partial(inputs.model, config.model)
    if config.data.path:
        yield "data", partial(inputs.data, config)
    yield "trackers", partial(inputs.trackers, config)
    yield "reward", partial(inputs.reward, config)
    if config.rollout.engine == "sglang":
        yield "server", partial(inputs.servers, config)
    if options.start_server:
        yield "start", partial(inputs.started_server, config)


def examine(options: DoctorConfig, config: TapoConfig) -> Iterator[Finding]:
    """The findings, one by one as they come."""
    from tercet.train.fit.finding import run_check

    for name, check in checks(options, config):
        yield from run_check(name, check)


def described(finding: Finding) -> str:
    """A finding as a line, and its advice below it."""
    line = f"{MARKS[finding.level]}  {finding.name:<13}  {finding.said}"
    return f"{line}\n{' ' * 24}-> {finding.advice}" if finding.advice else line


def main(argv: Sequence[str] | None = None) -> None:
    options, config = read(sys.argv[1:] if argv is None else argv)
    levels = []
    for finding in examine(options, config):
        levels.append(finding.level)
        print(json.dumps(finding._asdict()) if options.json else described(finding), flush=True)
    errors, warned = levels.count("error"), levels.count("warning")
    if not options.json:
        print(f"{len(levels)} findings: {errors} errors, {warned} warnings")
        missing = [f"--{name}.path" for name in ("model", "data") if not getattr(config, name).path]
        if missing:
            print(f"not looked at without {' and '.join(missing)}: what a run needs of them")
    if errors:
        sys.exit(1)


if __name__ == "__main__":
    command(main)
