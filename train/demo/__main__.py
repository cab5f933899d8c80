"""The demo: draw a fine-grained world, teach a tiny policy, let TAPO improve it, show the table.

    torchrun train/tapo.py                             # one seed; options of TAPO may follow
    python -m tercet.train.demo --names opaque         # names that do not spell what is seen
    python -m tercet.train.demo --architecture FAMILY  # a policy of another model family
    python -m tercet.train.demo --seeds 0 1 2 3 4      # five seeds beside their controls
    python -m tercet.train.demo --seeds 5 6 7 --arms forms --workers 4   # forms of the loss

A base stage on plates (every sub-category) stands in for pretraining. Stage 1 teaches the chain of
thought on field pictures of seen sub-categories, and TAPO goes on from there. The tables show
accuracy (%) on held-out field pictures with greedy decoding, and what explains it. The controls
(see train/demo/arms.py) start from the same stage 1.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tercet.core.config import TapoConfig
from tercet.core.models import FAMILIES
from tercet.core.tool_config import SeedsConfig
from tercet.train.cli.arguments import join_arguments, options_of, split_arguments
from tercet.train.cli.command_line import command, read_options
from tercet.train.demo.arms import START, TAPO, Job, run_arm
from tercet.train.demo.comparison import report, seed_table
from tercet.train.demo.forms import forms_report
from tercet.train.demo.jobs import jobs_of, run_in_turn, run_side_by_side
from tercet.train.demo.progress import Progress
from tercet.train.demo.stages import PLAN, SHARED, Seed, parse_tapo, prepare

DRAWN = ("data.path", "data.questions", "model.path")
"""Options that name what the demo makes itself."""


def check_options(argv: Sequence[str]) -> TapoConfig:
    """The options of train/tapo.py for the demo, checked before anything is drawn."""
    for name, values in split_arguments(argv):
        if name in DRAWN:
            raise ValueError(f"{name} cannot be given: the demo makes its own, got {values}")
    return parse_tapo(argv)


def demo(options: SeedsConfig, argv: Sequence[str]) -> None:
    """Run one seed and print its table; `argv` holds further options of train/tapo.py."""
    config = check_options(argv)
    out, clock = Path(config.run.out), time.process_time()
    seed = Seed(out, config.run.seed, options.names, _architecture(options))
    scoring, training = PLAN["scores"], PLAN["training"] + PLAN["scores"]
    plan = [(name, PLAN[name]) for name in SHARED]
    progress = Progress([*plan, ("scores of the start", scoring), ("TAPO", training)])
    prepare(seed, argv, progress.begin)
    rows = []
    for arm in (START, TAPO):
        progress.begin()
        rows.append(run_arm(Job(seed, arm, "responses"), argv))
    result = seed_table(rows)
    (out / "table.md").write_text(result + "\n", encoding="utf-8")
    print(
        f"\n{result}\n\nAccuracy (%) on held-out pictures, greedy decoding, with 95 % intervals. "
        f"All of it took {time.process_time() - clock:.0f} CPU seconds."
    )
    print(
        f"pictures: {out}/tapo/curves.png, {out}/tapo/samples.png\npolicy: {out}/tapo/checkpoints\n"
        f"what the policy says about each photo: python -m tercet.train.report {out}/tapo"
    )


def _architecture(options: SeedsConfig) -> str:
    name = options.architecture or FAMILIES[0]
    if name not in FAMILIES:
        raise ValueError(f"architecture must be one of {', '.join(FAMILIES)}, got {name!r}")
    return name


def demo_seeds(options: SeedsConfig, argv: Sequence[str]) -> None:
    """Run several seeds with their arms, print the tables and what they show.

    Controls come one after the other, each for all seeds, so that a run that is stopped has whole
    comparisons; forms of the loss come seed by seed. It goes on where it was.

    Args:
        options: what is run, and in which folder.
        argv: further options of train/tapo.py.
    """
    if len(set(options.seeds)) < max(1, len(options.seeds)):
        raise ValueError(f"seeds must be different numbers, at least one, got {options.seeds}")
    if options.minutes and not options.workers:
        raise ValueError("minutes needs workers: the processes that are stopped")
    check_options(argv)
    out, shared = Path(options.out), (options.names, _architecture(options))
    seeds = [Seed(out / f"seed_{number}", number, *shared) for number in options.seeds]
    jobs = jobs_of(options.arms, seeds)
    try:
        if options.workers:
            run_side_by_side(seeds, jobs, argv, options.workers, options.minutes)
        else:
            run_in_turn(seeds, jobs, argv)
    finally:
        rows = [row for job in jobs if (row := job.kept())]
        if rows:
            forms = any(job.margins for job in jobs)
            text = forms_report(rows) if forms else report(rows, options.names)
            (out / "table.md").write_text(text + "\n", encoding="utf-8")
            print(text)


def main(argv: Sequence[str]) -> None:
    found, own = split_arguments(argv), options_of(SeedsConfig)
    mine = [a for a in found if a[0] in {*own, "help"}]
    options = read_options(SeedsConfig, join_arguments(mine), __doc__)
    rest = join_arguments([a for a in found if a[0] not in own])
    given = {name for name, _ in mine}
    if "seeds" in given:
        demo_seeds(options, rest)
    elif of_seeds := given & {"out", "arms", "workers", "minutes"}:
        raise ValueError(
            f"{min(of_seeds)} is for several seeds (--seeds); the folder of one is --run.out"
        )
    else:
        demo(options, rest)


if __name__ == "__main__":
    command(lambda: main(sys.argv[1:]))
