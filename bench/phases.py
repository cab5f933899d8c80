"""Where a whole training step's time goes, by phase, and what comes before the first step.

    python -m tercet.bench.phases --photos folder      # steps on photos enlarged to a megapixel
    python -m tercet.bench.phases --parts start        # 5,000 generated JPEGs to the first step

The policy is SmolLM2-135M's body behind a small random vision tower (real_parts.py), so that
everything but the model costs what it costs in a run, and the model less than there: shares of
what is not the model are upper bounds on the CPU.

- step: train/tapo.py with TAPO's defaults, without its first step; every group is trained on, as
  this policy is never right. A phase's seconds are its own: those of a phase that it calls are
  taken off. `once` are seconds of what a run does once, or every run.save_every steps.
- start, start again: from the command to the first step on generated photos, every photo of a seen
  sub-category trained on; at first nothing is kept in the user's cache, then embeddings are.
- s, cpu_s: seconds a step (of the whole start) by the clock, and CPU seconds of the process, which
  other work on the machine changes less; share: of cpu_s.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tercet.bench import measure
from tercet.bench.real_parts import download, real_language_model
from tercet.bench.whole_step_case import now
from tercet.core.config import TapoConfig
from tercet.core.data import embedders, triplets
from tercet.core.data.manifest import Manifest
from tercet.core.data.patches import Patches
from tercet.core.data.photos import read_photos
from tercet.core.data.vision import PromptEncoder, load_image
from tercet.rollout.sampler import GroupSampler
from tercet.rollout.training_prompts import TrainingPrompts
from tercet.train import tapo
from tercet.train.cli.command_line import parse
from tercet.train.cli.interrupt import StopSignal
from tercet.train.evaluation.held_out import HeldOut
from tercet.train.learner.policy import Policy
from tercet.train.logs.group_log import GroupLog
from tercet.train.logs.run_log import RunLog
from tercet.train.run import assemble
from tercet.train.run.run_folder import open_folder

RESULTS = Path(__file__).parent / "results" / "phases.csv"
Calls = dict[str, list[tuple[object, str]]]
STEP: Calls = {
    "other": [(tapo.TapoRun, "step"), (tapo, "finish_step"), (tapo, "report_end")],
    "sampling": [(tapo.TapoRun, "_sample")],
    "texts of responses": [(GroupSampler, "_fill")],
    "prompts": [(PromptEncoder, "__call__"), (TrainingPrompts, "ids")],
    "photos": [(PromptEncoder, "levels"), (Patches, "pixel_values")],
    "packing": [(tapo, "micro_batch"), (tapo, "scored_batch"), (tapo, "mini_batches")],
    "forward": [(Policy, "forward")],
    "backward": [(Tensor, "backward")],
    "optimiser": [(tapo, "clip_and_step")],
    "weight sync": [(tapo.TapoRun, "_sync")],
    "held-out photos": [(HeldOut, "figures")],
    "groups on disk": [(GroupLog, "take"), (GroupLog, "write")],
    "log": [(RunLog, "step")],
    "once: checkpoint": [(tapo.TapoRun, "save")],
    "once: figures": [(tapo, "draw_figures")],
}
"""Phases of a step, with the functions whose time they are."""
ONCE = "once: "
START: Calls = {
    "other": [(tapo.TapoRun, "__init__"), (tapo, "parse")],
    "policy": [(tapo, "open_parts")],
    "photos checked": [(triplets, "read_photos")],
    "copies of photos": [(triplets, "_without_copies")],
    "embedding": [(embedders, "_kept")],
    "triplets written": [(Manifest, "write")],
    "digests": [(assemble, "triplet_digests")],
    "prompts checked": [(GroupSampler, "check_prompts")],
}
"""Phases of a start."""
NOT_OURS = ("imports", "policy", "embedding")
PIXELS = 1_003_520
"""Most of a photo as the policy sees it: 1,280 tokens."""
KINDS, NAMES, PHOTOS = 5, 25, 40
"""Generated super-categories, sub-categories of each, and photos of each: 5,000."""
SIDES = (640, 480)
"""Of a generated photo."""
LIMIT_S = 1800


@dataclass
class Row:
    """A row of the ledger."""

    part: str
    phase: str
    s: float
    cpu_s: float
    share: float | None


class Clock:
    """Seconds of phases, by the clock and of the CPU, without those of phases inside them."""

    def __init__(self):
        self._open: list[str] = []
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        self.spent: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        self._last = now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        moment = now()
        if self._open:
            spent = self.spent[self._open[-1]]
            gone = zip(spent, moment, self._last, strict=True)
            self.spent[self._open[-1]] = tuple(so_far + new - old for so_far, new, old in gone)
        self._last = moment

    def _timed(self, name: str, call: Callable) -> Callable:
        @wraps(call)
        def timed(*given, **options):
            with self.phase(name):
                return call(*given, **options)

        return timed

    @contextmanager
    def watching(self, calls: Calls) -> Iterator[Clock]:
        """Count the time of these functions, called by one thread, as that of their phases."""
        with ExitStack() as stack:
            for name, functions in calls.items():
                for owner, attribute in functions:
                    timed = self._timed(name, getattr(owner, attribute))
                    stack.enter_context(patch.object(owner, attribute, timed))
            yield self


def rows_of(part: str, spent: dict[str, tuple[float, float]], steps: int = 1) -> list[Row]:
    """Seconds a step of each phase, the largest first, and of the whole at the end."""
    each = {name: (s / steps, cpu_s / steps) for name, (s, cpu_s) in spent.items()}
    once = {name: spent[name] for name in each if name.startswith(ONCE)}
    each = {name: taken for name, taken in each.items() if name not in once}
    s, cpu_s = (sum(one) for one in zip(*each.values(), strict=True))
    rows = [Row(part, name, *taken, taken[1] / cpu_s) for name, taken in each.items()]
    rows.sort(key=lambda row: -row.cpu_s)
    rows.append(Row(part, "whole", s, cpu_s, 1.0))
    return rows + [Row(part, name, *taken, None) for name, taken in once.items()]


def prepare_policy(folder: Path) -> Path:
    """The policy, made where it is not there yet."""
    if not folder.exists():
        parts, _ = real_language_model(download())
        parts.image_processor.size = {"shortest_edge": PIXELS // 5, "longest_edge": PIXELS}
        parts.save(folder)
    return folder


def enlarge(photos: Path, out: Path) -> Path:
    """Labelled photos as JPEGs of a megapixel, in a folder of their own."""
    if not out.exists():
        for number, photo in enumerate(read_photos(photos).photos):
            folder = out.with_name(f"{out.name}.partial") / photo.super_category
            (folder / photo.sub_category).mkdir(parents=True, exist_ok=True)
            image = load_image(photo.image)
            scale = (PIXELS / (image.width * image.height)) ** 0.5
            image = image.resize((round(image.width * scale), round(image.height * scale)))
            image.save(folder / photo.sub_category / f"{number}.jpg", quality=90)
        out.with_name(f"{out.name}.partial").rename(out)
    return out


def generate(out: Path, photos: int = PHOTOS) -> Path:
    """JPEGs of coarse noise, their files about as large as a photograph's."""
    rng, unfinished = np.random.default_rng(0), out.with_name(f"{out.name}.partial")
    if not out.exists():
        for kind in range(KINDS):
            for name in range(NAMES):
                folder = unfinished / f"kind_{kind}" / f"name_{kind}_{name}"
                folder.mkdir(parents=True, exist_ok=True)
                for number in range(photos):
                    coarse = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
                    image = Image.fromarray(coarse).resize(SIDES, Image.Resampling.BICUBIC)
                    image.save(folder / f"{number}.jpg", quality=85)
        unfinished.rename(out)
    return out


def options_of(photos: Path, policy: Path, out: Path, *more: str) -> list[str]:
    """The command line of a run."""
    given = {
        "data.path": photos,
        "model.path": policy,
        "rollout.dynamic_sampling": "false",
        "rollout.max_prompt_tokens": 2048,
        "run.out": out,
        "run.overwrite": "true",
        "run.device": "cpu",
        "run.threads": torch.get_num_threads(),
    }
    return [*(f"--{name}={value}" for name, value in given.items()), *more]


def steps(argv: Sequence[str], count: int) -> list[Row]:
    """A run of so many steps and one before them for warm-up, to its checkpoint and figures."""
    config, _, resolved = parse(TapoConfig, [*argv, f"--run.steps={count + 1}"], "")
    clock = Clock()
    finish = tapo.finish_step

    def finished(run: tapo.TapoRun, figures: dict[str, float]) -> Path | None:
        saved = finish(run, figures)
        if run.steps_done == 1:
            clock.reset()
        return saved

    with patch.object(tapo, "finish_step", finished), clock.watching(STEP):
        tapo.train(config, resolved)
    return rows_of("step", clock.spent, count)


def start(argv: Sequence[str], began: float) -> dict[str, tuple[float, float]]:
    """What a run spends before its first step.

    Args:
        argv: its command line.
        began: when this process was started, in seconds since 1970.
    """
    clock = Clock()
    clock.spent["imports"] = (time.time() - began, time.process_time())
    with clock.watching(START):
        config, _, resolved = tapo.parse(TapoConfig, argv, "")
        with StopSignal() as stop, open_folder(config, None) as folder:
            run = tapo.TapoRun(config, resolved, stop, folder)
            found = dict(clock.spent)
            with closing(run), run.log:
                return found


def starts(options: argparse.Namespace) -> list[Row]:
    """A start with nothing in the cache, and another one, in processes of their own."""
    rows = []
    for part in ("start", "start again"):
        command = [sys.executable, "-m", "tercet.bench.phases", f"--child={part}"]
        command += [f"--folder={options.folder}", f"--threads={options.threads}"]
        cache = options.folder / "cache"
        if part == "start":
            (cache / "embeddings.sqlite").unlink(missing_ok=True)
        environment = os.environ | {embedders.CACHE: str(cache)}
        command.append(f"--began={time.time()}")
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT_S, env=environment
        )
        if done.returncode:
            raise RuntimeError(f"{part} failed: {done.stderr[-3000:]}")
        lines = (line.rsplit(maxsplit=2) for line in done.stdout.splitlines()[-len(START) - 1 :])
        found = rows_of(part, {name: (float(s), float(cpu)) for name, s, cpu in lines})
        print(f"{part}: {own(found):.2f} CPU seconds of our own work", flush=True)
        rows += found
    return rows


def own(rows: Sequence[Row]) -> float:
    """CPU seconds of a start that are our own work: neither imports, nor the model's."""
    return sum(row.cpu_s for row in rows if row.phase not in (*NOT_OURS, "whole"))


def show(row: Row) -> str:
    share = "" if row.share is None else f"{row.share:7.1%}"
    return f"{row.part:12} {row.phase:20} {row.s:8.3f} s, CPU {row.cpu_s:8.3f} s {share}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=("step", "start"), default=["step"])
    parser.add_argument("--photos", type=Path, help="labelled photos, as data.path, for the steps")
    parser.add_argument("--folder", type=Path, default=Path("runs/phases"))
    parser.add_argument("--out", type=Path, default=RESULTS.parent)
    parser.add_argument("--steps", type=int, default=2, help="timed steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    parser.add_argument("more", nargs="*", help="options of train/tapo.py for the steps, after --")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    policy = prepare_policy(options.folder / "policy")
    if options.child:
        pictures = generate(options.folder / "generated")
        shots = (f"--data.shots={PHOTOS - 4}", "--data.sft_shots=4")
        given = options_of(pictures, policy, options.folder / "start", *shots)
        for name, taken in start(given, options.began).items():
            print(name, *taken)
        return
    rows = []
    if "step" in options.parts:
        photos = enlarge(options.photos, options.folder / "megapixel")
        few = ("groups_per_step=2", "n_anchor=4", "n_positive=4", "max_response_tokens=64")
        more = [*(f"--rollout.{one}" for one in few), *options.more]
        rows += steps(options_of(photos, policy, options.folder / "run", *more), options.steps)
    if "start" in options.parts:
        generate(options.folder / "generated")
        rows += starts(options)
    print(*map(show, rows), sep="\n", flush=True)
    measure.append(options.out / RESULTS.name, rows, measure.conditions("cpu", measure.commit()))


if __name__ == "__main__":
    main()
