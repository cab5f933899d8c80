"""The demo's stages: the drawn world, base stage, stage 1, and one training run after it.

Every function goes on where an earlier call in the same folder was stopped.
"""

from __future__ import annotations

import ctypes
import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean

from tercet.core.config import ModelConfig, SftConfig, TapoConfig
from tercet.core.data.embedders import embedder
from tercet.core.data.manifest import MANIFEST_NAME, Manifest
from tercet.core.data.triplets import prepare_manifest
from tercet.core.models import FAMILIES, build_tiny, load_policy
from tercet.core.types import PolicyParts
from tercet.train import sft, tapo
from tercet.train.cli.arguments import overridden
from tercet.train.cli.command_line import RECIPES, parse
from tercet.train.demo.drawn_world import write_base, write_world
from tercet.train.demo.scores import write_greys
from tercet.train.demo.species import SUPER_CATEGORY, Names, species_of, vocabulary
from tercet.train.learner.ranks import restarts
from tercet.train.logs.metrics import METRICS_FILE, phase_seconds, read_metrics
from tercet.train.run.identity import Kind, of_kind, options_of, shown
from tercet.train.run.run_folder import move_aside

VERSION = 2
"""Of the world, the policy and the stages: a folder of another version is made anew."""
BASE_PICTURES = {"spelled": 1500, "opaque": 3500}
"""Records of the base stage, by kind of names."""
BASE_STEPS = {"spelled": 160, "opaque": 400}
STAGE1_STEPS = {"spelled": 10, "opaque": 25}
PICTURES = {"train": 4, "sft": 1, "test": 8}
"""Pictures of a sub-category in each split."""
SIZE = 84
"""Pixels a side."""
LAYERS = 2
"""Of the language model, and of the vision tower."""
STEP_CPU = "cpu.json"
SHARED = ("drawing", "base stage", "stage 1")
"""What `prepare` does, stage by stage."""
PLAN = {"drawing": 6, "base stage": 45, "stage 1": 4, "training": 80, "scores": 10}
"""CPU seconds of the demo's stages on one x86-64 core."""


@dataclass(frozen=True)
class Seed:
    """One seed's folder: the drawn world, and the stages that all of its arms share."""

    out: Path
    number: int
    names: Names
    architecture: str = FAMILIES[0]

    @property
    def data(self) -> Path:
        """The drawn world."""
        return self.out / "data"

    @property
    def start(self) -> Path:
        """The policy after stage 1: with `triplets` all that arms need beside the drawn world."""
        return self.out / "start"

    @property
    def triplets(self) -> Path:
        """Folder of the triplets that all arms use."""
        return self.out / "triplets"


def parse_tapo(argv: Sequence[str]) -> TapoConfig:
    """The demo's options of train/tapo.py, `argv` among them."""
    return parse(TapoConfig, [f"--config={RECIPES / 'demo.yaml'}", *argv], "")[0]


def claim(seed: Seed, argv: Sequence[str]) -> None:
    """Make a folder the seed's own; one of another version, or with run.overwrite, is moved aside.

    Args:
        seed: its folder, number and kind of names.
        argv: further options of train/tapo.py.

    Raises:
        ValueError: the folder holds the demo with other options.
    """
    config = parse_tapo(argv)
    config.run.seed = seed.number
    if config.run.overwrite and seed.out.exists() and not restarts():
        print(move_aside(seed.out))
    shared = {"names": seed.names, "architecture": seed.architecture}
    now = {"version": VERSION, **shared, "options": options_of(config)}
    noted = seed.out / "options.json"
    if noted.exists():
        then = json.loads(noted.read_text(encoding="utf-8"))
        if then.get("version") != VERSION:
            print(f"{seed.out} holds another version of the demo: {move_aside(seed.out)}")
        else:
            _refuse_changes(seed.out, then, now)
    seed.out.mkdir(parents=True, exist_ok=True)
    noted.write_text(json.dumps(now, indent=1), encoding="utf-8")


def _refuse_changes(out: Path, then: dict, now: dict) -> None:
    def differs(old: dict, new: dict) -> dict[str, tuple]:
        pairs = {name: (old.get(name), value) for name, value in new.items()}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    own = {name: now[name] for name in ("names", "architecture")}
    changed = differs({"architecture": FAMILIES[0], **then}, own)  # early folders do not name it
    # An option that was not there yet had the default.
    options = differs(options_of(TapoConfig()) | then["options"], now["options"])
    if changed := changed | of_kind(options, Kind.FIXED, Kind.STEP, Kind.LISTED):
        raise ValueError(
            f"run.out {out} holds the demo with other options ({shown(changed)}): give another "
            "--run.out, or --run.overwrite true, which moves it aside"
        )


def prepare(seed: Seed, argv: Sequence[str], begin: Callable[[], None] = lambda: None) -> None:
    """Make everything that a seed's arms share: the drawn world, the start and the triplets.

    Args:
        seed: its folder, number and kind of names.
        argv: further options of train/tapo.py.
        begin: called when each of the stages in SHARED begins.
    """
    claim(seed, argv)
    made = seed.start.exists()
    begin()
    if not seed.data.exists():
        write_world(seed.data, seed.number, **PICTURES, size=SIZE, names=seed.names)
    if not made:
        draw_base(seed)
    begin()
    base = seed.start if made else base_stage(seed)
    begin()
    if not made:
        _save(load_policy(ModelConfig(path=str(stage1(seed, base)))), seed.start)
    choose_triplets(seed, argv)
    print(
        f"{near_share(seed):.0%} of negatives differ from the anchor in one attribute (chance 8%)"
    )


def draw_base(seed: Seed) -> None:
    """Draw the base stage's pictures and build the random policy."""
    base = seed.out / "base_data"
    if not base.exists():
        write_base(base, seed.number, BASE_PICTURES[seed.names], SIZE, seed.names)
    if not (seed.out / "random").exists():
        records = json.loads((base / "records.json").read_text(encoding="utf-8"))
        said = [message["content"] for record in records for message in record["messages"]]
        sizes = {"image_size": SIZE, "layers": LAYERS, "vision_layers": LAYERS}
        kind = {"architecture": seed.architecture, "seed": seed.number}
        parts = build_tiny([*vocabulary(seed.names), *said], **sizes, **kind)
        _save(parts, seed.out / "random")


def _save(parts: PolicyParts, folder: Path) -> None:
    """Write a policy into a folder that takes its name only when it is complete."""
    unfinished = folder.with_name(f".{folder.name}.partial")
    parts.save(unfinished)
    unfinished.rename(folder)


def greys_of(seed: Seed) -> list[str]:
    """Paths of the seed's blank pictures."""
    return write_greys(seed.out / "grey", SIZE)


def base_stage(seed: Seed) -> Path:
    """Train the random policy on plates of every sub-category; returns the checkpoint."""
    records = seed.out / "base_data" / "records.json"
    steps = [f"--run.steps={BASE_STEPS[seed.names]}"]
    return train_sft(seed, "demo_base.yaml", records, seed.out / "random", "base", steps)


def stage1(seed: Seed, base: Path) -> Path:
    """Chains of thought on seen sub-categories; returns the checkpoint."""
    records, steps = seed.data / "stage1.json", [f"--run.steps={STAGE1_STEPS[seed.names]}"]
    return train_sft(seed, "demo_stage1.yaml", records, base, "stage1", steps)


def choose_triplets(seed: Seed, argv: Sequence[str]) -> None:
    """Choose the triplets of all arms, with the vision tower of the start."""
    if (seed.triplets / MANIFEST_NAME).exists():
        return
    data = parse_tapo(argv).data
    data.path, data.questions = str(seed.data), str(seed.data / "questions.yaml")
    data.seed = seed.number
    load = partial(load_policy, ModelConfig(path=str(seed.start)))
    embed = embedder(data.embedder, load, layer=data.embedder_layer)
    prepare_manifest(data, embed).write(seed.triplets)


def near_share(seed: Seed) -> float:
    """Share of seen sub-categories whose most similar one, as the embedder finds it, differs in one
    attribute."""
    values = {species.name: species.values for species in species_of(seed.names)}
    nearest = Manifest.read(seed.triplets).nearest[SUPER_CATEGORY]
    pairs = [(values[name], values[others[0]]) for name, others in nearest.items()]
    return mean(sum(a != b for a, b in zip(*pair, strict=True)) == 1 for pair in pairs)


def train_sft(
    seed: Seed, recipe: str, records: Path, model: Path, folder: str, more: Sequence[str] = ()
) -> Path:
    """Run train/sft.py's loop in a folder of the seed's; returns the last checkpoint."""
    argv = [f"--config={RECIPES / recipe}", f"--data.path={records}", f"--model.path={model}"]
    argv += [f"--run.out={seed.out / folder}", f"--run.seed={seed.number}", *more]
    config, _, resolved = parse(SftConfig, argv, "")
    return _timed(lambda: sft.train(config, resolved, resume="auto"), seed.out / folder)


def train_tapo(seed: Seed, model: Path, folder: str, argv: Sequence[str]) -> Path:
    """Run train/tapo.py's loop in a folder of the seed's; returns the last checkpoint."""
    own = [
        f"--data.path={seed.triplets}",
        f"--model.path={model}",
        f"--run.out={seed.out / folder}",
        f"--run.seed={seed.number}",
    ]
    argv = [f"--config={RECIPES / 'demo.yaml'}", *overridden(argv, own)]
    config, _, resolved = parse(TapoConfig, argv, "")
    config.run.overwrite = False  # the whole demo was moved aside
    return _timed(lambda: tapo.train(config, resolved, resume="auto"), seed.out / folder)


def _timed(train: Callable[[], Path], folder: Path) -> Path:
    """Train, note the CPU seconds a step, and give freed memory back to the system."""
    before, clock = _steps(folder), time.process_time()
    checkpoint = train()
    seconds, done = time.process_time() - clock, _steps(folder) - before
    if done:
        (folder / STEP_CPU).write_text(json.dumps(seconds / done), encoding="utf-8")
    give_memory_back()
    return checkpoint


def give_memory_back() -> None:
    """Return memory of what is not used any more to the system, where the C library can."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc
        libc.malloc_trim(0)


def _steps(folder: Path) -> int:
    path = folder / METRICS_FILE
    return len(read_metrics(path)) if path.exists() else 0


def cpu_seconds(folder: Path) -> float:
    """CPU seconds of a finished run; of its phases by the clock where they were not noted."""
    noted = folder / STEP_CPU
    if noted.exists():
        return _steps(folder) * json.loads(noted.read_text(encoding="utf-8"))
    return sum(sum(phase_seconds(step).values()) for step in read_metrics(folder / METRICS_FILE))
