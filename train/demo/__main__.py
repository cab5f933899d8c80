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

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tercet.core.config import TapoConfig
from tercet.train.demo.experiment import markdown, mean_scores, run_seed, verdicts
from tercet.train.learner.command_line import RECIPES, command, parse
from tercet.train.learner.ranks import restarts
from tercet.train.learner.run_folder import move_aside


def demo(argv: Sequence[str]) -> None:
    """Run one seed and print its table; `argv` holds further options of train/tapo.py."""
    config, _, _ = parse(TapoConfig, [f"--config={RECIPES / 'demo.yaml'}", *argv], "")
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--out", default="runs/demo_seeds")
    options, argv = parser.parse_known_args(argv)
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
    (demo_seeds if "--seeds" in argv else demo)(argv)


if __name__ == "__main__":
    command(lambda: main(sys.argv[1:]))
