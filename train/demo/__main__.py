"""The demo: draw a fine-grained world, teach a tiny policy, let TAPO improve it, show the table.

    torchrun train/tapo.py                             # one seed; options of TAPO may follow
    python -m tercet.train.demo --seeds 0 1 2          # three seeds beside their controls

A base stage (captions of every sub-category) stands in for pretraining. Stage 1 teaches the chain
of thought on seen sub-categories, and TAPO goes on from there. The table shows accuracy (%) on
held-out pictures with greedy decoding; an open answer is right only if the true name is the one
known name in it. The controls are DAPO for as many steps, SFT for as long on the same pictures, and
TAPO with the rewards of each group permuted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tercet.core.config import TapoConfig
from tercet.core.tool_config import SeedsConfig
from tercet.train.demo.experiment import markdown, mean_scores, run_seed, verdicts
from tercet.train.learner.arguments import join_arguments, options_of, split_arguments
from tercet.train.learner.command_line import RECIPES, command, parse, read_options
from tercet.train.learner.ranks import restarts
from tercet.train.learner.run_folder import move_aside

DRAWN = ("data.path", "data.questions", "model.path")
"""Options that name what the demo makes itself."""


def check_options(argv: Sequence[str]) -> TapoConfig:
    """The options of train/tapo.py for the demo, checked before anything is drawn."""
    for name, values in split_arguments(argv):
        if name in DRAWN:
            raise ValueError(f"{name} cannot be given: the demo makes its own, got {values}")
    return parse(TapoConfig, [f"--config={RECIPES / 'demo.yaml'}", *argv], "")[0]


def demo(argv: Sequence[str]) -> None:
    """Run one seed and print its table; `argv` holds further options of train/tapo.py."""
    config = check_options(argv)
    out, clock = Path(config.run.out), time.perf_counter()
    if config.run.overwrite and out.exists() and not restarts():
        print(move_aside(out))
    result = markdown(run_seed(out, config.run.seed, argv, controls=False))
    (out / "table.md").write_text(result + "\n", encoding="utf-8")
    print(
        f"\n{result}\n\nAccuracy (%) on held-out pictures, greedy decoding. "
        f"All of it took {time.perf_counter() - clock:.0f} s."
    )
    print(
        f"pictures: {out}/tapo/curves.png, {out}/tapo/samples.png\npolicy: {out}/tapo/checkpoints"
    )


def demo_seeds(argv: Sequence[str]) -> None:
    """Run several seeds with their controls and print the tables and what they show.

    Args:
        argv: `--seeds`, `--out`, and further options of train/tapo.py.
    """
    found, own = split_arguments(argv), options_of(SeedsConfig)
    mine = [a for a in found if a[0] in {*own, "help"}]
    options = read_options(SeedsConfig, join_arguments(mine), __doc__)
    if len(set(options.seeds)) < max(1, len(options.seeds)):
        raise ValueError(f"seeds must be different numbers, at least one, got {options.seeds}")
    argv = join_arguments([a for a in found if a[0] not in own])
    check_options(argv)
    runs = [
        run_seed(Path(options.out) / f"seed_{seed}", seed, argv, controls=True)
        for seed in options.seeds
    ]
    parts = [
        f"### seed {seed}\n{markdown(run)}" for seed, run in zip(options.seeds, runs, strict=True)
    ]
    result = "\n\n".join([*parts, f"### mean\n{markdown(mean_scores(runs))}", *verdicts(runs)])
    (Path(options.out) / "table.md").write_text(result + "\n", encoding="utf-8")
    print(result)


def main(argv: Sequence[str]) -> None:
    several = "seeds" in dict(split_arguments(argv))
    (demo_seeds if several else demo)(argv)


if __name__ == "__main__":
    command(lambda: main(sys.argv[1:]))
