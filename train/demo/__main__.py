"""The demo: draw a fine-grained world, teach a tiny policy, let TAPO improve it, show the table.

    torchrun train/tapo.py                             # one seed; options of TAPO may follow
    python -m tercet.train.demo --names opaque         # names that do not spell what is seen
    python -m tercet.train.demo --architecture FAMILY  # a policy of another model family
    python -m tercet.train.demo --seeds 0 1 2 3 4      # five seeds beside their controls

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
from tercet.train.demo.arms import ARMS, START, TAPO, Row, run_arm
from tercet.train.demo.comparison import report, seed_table
from tercet.train.demo.progress import Progress
from tercet.train.demo.stages import (
    Seed,
    base_stage,
    choose_triplets,
    claim,
    draw_world,
    near_share,
    parse_tapo,
    stage1,
)
from tercet.train.learner.arguments import join_arguments, options_of, split_arguments
from tercet.train.learner.command_line import command, read_options

PLAN = {"drawing": 6, "base stage": 45, "stage 1": 4, "training": 80, "scores": 10}
"""CPU seconds of the demo's stages on one x86-64 core."""
DRAWN = ("data.path", "data.questions", "model.path")
"""Options that name what the demo makes itself."""


def check_options(argv: Sequence[str]) -> TapoConfig:
    """The options of train/tapo.py for the demo, checked before anything is drawn."""
    for name, values in split_arguments(argv):
        if name in DRAWN:
            raise ValueError(f"{name} cannot be given: the demo makes its own, got {values}")
    return parse_tapo(argv)


def prepare(seed: Seed, argv: Sequence[str], progress: Progress) -> Path:
    """Everything that a seed's arms share; returns the checkpoint that they start from."""
    claim(seed, argv)
    progress.begin()
    draw_world(seed)
    progress.begin()
    base = base_stage(seed)
    progress.begin()
    start = stage1(seed, base)
    choose_triplets(seed, start, argv)
    print(
        f"{near_share(seed):.0%} of negatives differ from the anchor in one attribute (chance 8%)"
    )
    return start


SHARED = [(name, PLAN[name]) for name in ("drawing", "base stage", "stage 1")]


def demo(options: SeedsConfig, argv: Sequence[str]) -> None:
    """Run one seed and print its table; `argv` holds further options of train/tapo.py."""
    config = check_options(argv)
    out, clock = Path(config.run.out), time.process_time()
    seed = Seed(out, config.run.seed, options.names, _architecture(options))
    scoring, training = PLAN["scores"], PLAN["training"] + PLAN["scores"]
    progress = Progress([*SHARED, ("scores of the start", scoring), ("TAPO", training)])
    start, rows = prepare(seed, argv, progress), []
    for arm in (START, TAPO):
        progress.begin()
        rows.append(run_arm(seed, start, arm, "responses", argv))
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
    """Run several seeds with their controls, print the tables and what they show.

    The arms come one after the other, each for all seeds, so that a run that is stopped has whole
    comparisons; it goes on where it was.

    Args:
        options: seeds, kind of names, family and folder.
        argv: further options of train/tapo.py.
    """
    if len(set(options.seeds)) < max(1, len(options.seeds)):
        raise ValueError(f"seeds must be different numbers, at least one, got {options.seeds}")
    check_options(argv)
    out, shared = Path(options.out), (options.names, _architecture(options))
    seeds = [Seed(out / f"seed_{number}", number, *shared) for number in options.seeds]
    arms = [(arm, "responses") for arm in (START, *ARMS)]
    arms += [(arm, "time") for arm in ARMS if arm != TAPO]
    each = {START: PLAN["scores"]}
    plan = [(f"seed {seed.number}, {name}", s) for seed in seeds for name, s in SHARED]
    plan += [
        (f"{arm}, equal {equal}, seed {seed.number}", each.get(arm, sum(PLAN.values()) / 2))
        for arm, equal in arms
        for seed in seeds
    ]
    progress = Progress(plan)
    starts = [prepare(seed, argv, progress) for seed in seeds]
    rows: list[Row] = []
    for arm, equal in arms:
        for seed, start in zip(seeds, starts, strict=True):
            progress.begin()
            rows.append(run_arm(seed, start, arm, equal, argv))
        (out / "table.md").write_text(report(rows, options.names) + "\n", encoding="utf-8")
    print(report(rows, options.names))


def main(argv: Sequence[str]) -> None:
    found, own = split_arguments(argv), options_of(SeedsConfig)
    mine = [a for a in found if a[0] in {*own, "help"}]
    options = read_options(SeedsConfig, join_arguments(mine), __doc__)
    rest = join_arguments([a for a in found if a[0] not in own])
    given = {name for name, _ in mine}
    if "seeds" in given:
        demo_seeds(options, rest)
    elif "out" in given:
        raise ValueError("out is for several seeds (--seeds); the folder of one is --run.out")
    else:
        demo(options, rest)


if __name__ == "__main__":
    command(lambda: main(sys.argv[1:]))
