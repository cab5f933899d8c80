"""Does training help on real photos? A base policy, stage 1 and four ways to go on from there.

    python -m tercet.bench.learning --images FLOWERS --questions flower_seen.jsonl \\
        flower_unseen.jsonl --out OUT

FLOWERS holds Oxford Flowers-102 in folders by class, the files under their official names; the
questions are Fine-R1's. No photo that a question names is trained on. The policy is SmolLM2-135M's
first layers in the Qwen2.5-VL frame behind the tower of bench/learning_tower.py, so that neither
has seen a flower's name before the base stage, which stands in for what a published model knows.
Every stage adds a row to the ledger and is passed over where OUT has its result: a command that was
stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from tercet.bench import measure
from tercet.bench.learning_records import (
    Flowers,
    choose_classes,
    look_alikes,
    read_flowers,
    stem,
    write_base,
    write_labels,
    write_photos,
    write_stage1,
)
from tercet.bench.learning_tower import (
    SIDE,
    Teacher,
    TowerSizes,
    efficientnet,
    linear_probe,
    match_text_scale,
    nearest_mean,
    seen_by,
    square,
    teacher_features,
    tower_means,
    train_tower,
)
from tercet.bench.real_parts import download, real_language_model
from tercet.core.config import ModelConfig, SftConfig, TapoConfig
from tercet.core.data.embedders import embedder
from tercet.core.data.manifest import MANIFEST_NAME
from tercet.core.data.triplets import prepare_manifest
from tercet.core.models import load_policy
from tercet.core.tool_config import EvalConfig
from tercet.core.types import PolicyParts
from tercet.train import eval_fgvr, sft, tapo
from tercet.train.cli.command_line import RECIPES, parse
from tercet.train.demo.arms import DAPO, FORMS, RELEASED, TAPO_ARMS
from tercet.train.demo.comparison import paired_difference, with_interval
from tercet.train.demo.stages import give_memory_back
from tercet.train.evaluation.intervals import wilson
from tercet.train.evaluation.questions import read_all

RESULTS = Path(__file__).parent / "results" / "learning.jsonl"
VISION = {"depth": 4, "hidden_size": 192, "num_heads": 6, "intermediate_size": 576}
LAYERS = 6
"""Kept of SmolLM2's 30: all of them would take days on a CPU."""
MAX_TOKENS = 40
BASE, STAGE1, LABELS = "base", "stage 1", "SFT, labels"
ARMS: dict[str, tuple[str, ...]] = {
    DAPO: TAPO_ARMS[DAPO],
    "TAPO": FORMS["flow, kl 0.03"],
    "TAPO, released": FORMS[RELEASED],
}
"""The arms that train/tapo.py trains: their options."""
SCORES = ("seen", "unseen", "seen_closed", "unseen_closed")
_FROZEN = ("--model.freeze_vision=true", "--model.freeze_merger=false")
Run = Callable[[Path, Path, Path, int, Sequence[str]], Path]
"""Trains a model on data in a folder, with a seed and options; returns the last checkpoint."""


@dataclass(frozen=True)
class Sizes:
    """How long every stage of a seed is."""

    per_class: int = 10
    """Questions about a class, at most."""
    views: int = 6
    """Of each photo of the base stage."""
    base_steps: int = 90
    stage1_steps: int = 8
    stage1_lr: float = 1e-5
    steps: int = 12
    """Of every arm."""
    lr: float = 2e-5
    """Of every arm."""
    groups: int = 10
    """Photos a step of an arm."""
    tower: TowerSizes = field(default_factory=TowerSizes)


def real_parts() -> PolicyParts:
    """SmolLM2's first layers in the Qwen2.5-VL frame, with a random tower."""
    parts, _ = real_language_model(download(), LAYERS, VISION)
    parts.image_processor.size = {"shortest_edge": SIDE**2, "longest_edge": SIDE**2}
    return parts


@dataclass(frozen=True)
class Bench:
    """What all stages share."""

    out: Path
    ledger: Path
    questions: tuple[str, ...]
    flowers: Flowers
    sizes: Sizes
    teacher: Callable[[], Teacher] = efficientnet
    frame: Callable[[], PolicyParts] = real_parts

    def claim(self, classes: int) -> None:
        """Make the folder that of these sizes; ValueError where it holds stages of others."""
        now = json.loads(json.dumps({"classes": classes, "sizes": asdict(self.sizes)}))
        noted = self.out / "options.json"
        then = json.loads(noted.read_text(encoding="utf-8")) if noted.exists() else now
        if then != now:
            raise ValueError(f"--out {self.out} holds stages of {then}, not {now}: give another")
        self.out.mkdir(parents=True, exist_ok=True)
        noted.write_text(json.dumps(now), encoding="utf-8")

    def stage(self, name: str, seed: int | None, work: Callable[[], dict]) -> dict:
        """Do a stage and add its row to the ledger, or read the row where it is done.

        Args:
            name: of the stage.
            seed: None where all seeds share it.
            work: returns the row's figures; called again after it was stopped.
        """
        done = self.out / "rows" / f"{slug(name)}{'' if seed is None else f'_{seed}'}.json"
        if done.exists():
            return json.loads(done.read_text(encoding="utf-8"))
        say(f"{time.strftime('%H:%M:%S')} {name}{'' if seed is None else f', seed {seed}'}")
        done.parent.mkdir(exist_ok=True)
        with _spent(done.with_suffix(".spent")) as spent:
            row = {"stage": name, "seed": seed} | work()
        row |= spent | measure.conditions("cpu", measure.commit())
        done.write_text(json.dumps(row), encoding="utf-8")
        with self.ledger.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(row) + "\n")
        say(json.dumps({key: value for key, value in row.items() if key != "hits"}))
        return row


@contextmanager
def _spent(path: Path) -> Iterator[dict[str, float]]:
    """Hours and CPU seconds of a stage, those of earlier calls that were stopped among them."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    spent, wall, cpu = {}, time.time(), time.process_time()
    try:
        yield spent
    finally:
        spent["hours"] = before.get("hours", 0.0) + (time.time() - wall) / 3600
        spent["cpu_s"] = before.get("cpu_s", 0.0) + time.process_time() - cpu
        path.write_text(json.dumps(spent), encoding="utf-8")


def tower_stages(bench: Bench) -> None:
    """The teacher's features, and the tower that learns them: shared by all seeds."""
    out, sizes, known = bench.out, bench.sizes.tower, bench.flowers.known
    squares, features = out / "squares.npy", out / "targets.pt"

    def teach() -> dict:
        if not squares.exists():
            np.save(squares, np.stack([square(path) for path, _ in known]))
        found = teacher_features(bench.teacher(), np.load(squares), sizes.views, say)
        torch.save(found, features)
        return {"photos": len(known), "views": sizes.views}

    def distil() -> dict:
        parts, kept, targets = bench.frame(), np.load(squares), torch.load(features)["targets"]
        names = sorted({name for _, name in known})
        classes = [names.index(name) for _, name in known]
        train_tower(parts, kept, targets, classes, sizes, out / "tower.pt", say)
        match_text_scale(parts, kept)
        parts.save(out / "start")
        return {"photos": len(known), **asdict(sizes)}

    bench.stage("teacher", None, teach)
    bench.stage("tower", None, distil)


def say(line: str) -> None:
    print(line, flush=True)


def probe(bench: Bench, questions: Sequence[str], classes: Sequence[str]) -> dict:
    """What tower and teacher tell about the photos that are asked about, by simple classifiers."""
    parts = load_policy(ModelConfig(path=str(bench.out / "start"), dtype="float32"))
    flowers, names = bench.flowers, list(classes)
    rows = [i for i, (_, name) in enumerate(flowers.known) if name in classes]
    kept = np.load(bench.out / "squares.npy")[rows]
    labels = [names.index(flowers.known[i][1]) for i in rows]
    asked = read_all(questions).all
    test = np.stack([square(flowers.files[stem(q.path)]) for q in asked])
    truths = [names.index(q.truth) for q in asked]
    means = torch.load(bench.out / "targets.pt")["means"][rows]
    by_teacher = (means, labels, seen_by(bench.teacher(), test), truths)
    by_tower = (tower_means(parts, kept), labels, tower_means(parts, test), truths)
    return {
        "classes": len(names),
        "photos_per_class": len(rows) / len(names),
        "questions": len(asked),
        "teacher_nearest_mean": nearest_mean(*by_teacher),
        "teacher_linear": linear_probe(*by_teacher),
        "tower_nearest_mean": nearest_mean(*by_tower),
        "tower_linear": linear_probe(*by_tower),
    }


def seed_stages(bench: Bench, classes: int, seed: int) -> None:
    """Base stage, stage 1 and the arms of one seed, each scored."""
    folder, sizes, start = bench.out / f"seed{seed}", bench.sizes, bench.out / "start"
    flowers, official = bench.flowers, read_all(bench.questions).all
    chosen = choose_classes(official, classes, seed)
    questions = write_photos(flowers, official, chosen, folder, sizes.per_class)
    means = torch.load(bench.out / "targets.pt")["means"].numpy()
    near = look_alikes(means, [name for _, name in flowers.known])

    def trained(arm: str, run: Run, model: Path, data: Path, *options: str) -> Path:
        def work() -> dict:
            checkpoint = run(model, data, folder / slug(arm), seed, options)
            give_memory_back()
            place = str(checkpoint.relative_to(bench.out))
            return {"classes": classes, "options": list(options), "checkpoint": place}

        row = bench.stage(f"{arm}, training", seed, work)
        checkpoint = bench.out / row["checkpoint"]
        bench.stage(arm, seed, lambda: scored(checkpoint, questions, folder / "eval" / slug(arm)))
        return checkpoint

    bench.stage("probe", seed, lambda: probe(bench, questions, sorted(chosen)))
    records = write_base(flowers, chosen, folder, sizes.views, near, seed)
    given = (f"--run.steps={sizes.base_steps}", "--optim.lr=5e-4", "--optim.warmup_steps=10")
    base = trained(BASE, run_sft, start, records, *given)
    records = write_stage1(flowers, chosen, folder, near, seed)
    given = (f"--run.steps={sizes.stage1_steps}", f"--optim.lr={sizes.stage1_lr}")
    given += ("--optim.warmup_steps=2",)
    stage1 = trained(STAGE1, run_sft, base, records, *given)
    triplets = choose_triplets(folder, stage1, seed)
    given = (f"--run.steps={sizes.steps}", f"--optim.lr={sizes.lr}", "--optim.warmup_steps=2")
    samples = f"--optim.samples_per_step={sizes.groups}"
    trained(LABELS, run_sft, stage1, write_labels(folder, triplets), *given, samples)
    groups = [
        f"--rollout.{name}={sizes.groups}" for name in ("groups_per_step", "prompts_per_batch")
    ]
    for arm, options in ARMS.items():
        trained(arm, run_tapo, stage1, triplets, *given, *groups, *options)


def slug(arm: str) -> str:
    """An arm's name as a folder's."""
    return "_".join("".join(c if c.isalnum() else " " for c in arm.lower()).split())


def run_sft(model: Path, records: Path, out: Path, seed: int, options: Sequence[str]) -> Path:
    """Run train/sft.py's loop; returns the last checkpoint."""
    argv = [
        f"--config={RECIPES / 'demo_stage1.yaml'}",
        f"--data.path={records}",
        *_FROZEN,
        *options,
    ]
    argv += [f"--model.path={model}", f"--run.out={out}", f"--run.seed={seed}"]
    argv += ["--run.save_every=20", "--parallel.micro_batch_tokens=2048"]
    config, _, resolved = parse(SftConfig, argv, "")
    return sft.train(config, resolved, resume="auto")


def choose_triplets(folder: Path, model: Path, seed: int) -> Path:
    """Write the triplets of all arms, look-alikes by the tower; returns their folder."""
    out = folder / "triplets"
    if not (out / MANIFEST_NAME).exists():
        argv = [f"--data.path={folder / 'photos'}", "--data.sft_shots=0", f"--run.seed={seed}"]
        config, _, _ = parse(TapoConfig, [f"--model.path={model}", *argv], "")
        config.data.seed = seed
        embed = embedder("policy", lambda: load_policy(ModelConfig(path=str(model))))
        prepare_manifest(config.data, embed).write(out)
    return out


def run_tapo(model: Path, triplets: Path, out: Path, seed: int, options: Sequence[str]) -> Path:
    """Run train/tapo.py's loop; returns the last checkpoint."""
    argv = [f"--config={RECIPES / 'demo.yaml'}", f"--data.path={triplets}", *options]
    argv += [f"--model.path={model}", f"--run.out={out}", f"--run.seed={seed}"]
    argv += [*_FROZEN, "--run.save_every=4", "--parallel.micro_batch_tokens=2048"]
    argv += [f"--rollout.max_response_tokens={MAX_TOKENS}"]
    config, _, resolved = parse(TapoConfig, argv, "")
    return tapo.train(config, resolved, resume="auto")


def scored(model: Path, questions: Sequence[str], out: Path) -> dict:
    """Ask the questions by train/eval_fgvr.py's functions; the row's figures.

    A closed answer is right where it is the true option alone, an open one where the true name is
    the only known one in it.
    """
    options = EvalConfig(questions=list(questions), images=[str(out.parents[1] / "asked")])
    options.out, options.options, options.text_encoder = str(out), "shuffled", None
    options.model.path, options.model.dtype, options.max_tokens = str(model), "float32", MAX_TOKENS
    eval_fgvr.evaluate(options)
    lines = [json.loads(line) for line in (out / "lines.jsonl").read_text("utf-8").splitlines()]
    hits, released = dict.fromkeys(SCORES, ""), defaultdict(list)
    for line in sorted(lines, key=lambda line: (line["file"], line["line"])):
        closed = line["mode"] == "closed"
        name = line["partition"] + ("_closed" if closed else "")
        hits[name] += str(int(line["closed_strict" if closed else "inclusion_strict"]))
        released[name].append(line["closed" if closed else "inclusion"])
    accuracy = {name: 100 * np.mean(list(map(int, of))) for name, of in hits.items()}
    by_release = {f"{name}_released": 100 * float(np.mean(of)) for name, of in released.items()}
    form = np.mean(
        [line["output"].startswith("<think>") and line["finish"] == "stop" for line in lines]
    )
    return {"questions": len(lines), **accuracy, **by_release, "form": 100 * form, "hits": hits}


def table(rows: Sequence[dict]) -> str:
    """A Markdown table of the seeds' arms: accuracies, and paired differences to stage 1.

    Args:
        rows: of the ledger; the newest of a stage and seed counts.
    """
    found = {(row["seed"], row["stage"]): row for row in rows if "hits" in row}
    arms = [arm for arm in (BASE, STAGE1, LABELS, *ARMS) if any(of == arm for _, of in found)]
    head = ("policy", "seeds", *SCORES, *(f"{name} - stage 1" for name in SCORES), "form")
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    for arm in arms:
        seeds = [seed for seed, of in found if of == arm]
        cells = [arm, str(len(seeds))]
        for name in SCORES:
            hits = "".join(found[seed, arm]["hits"][name] for seed in seeds)
            low, high = wilson(hits.count("1") / len(hits), len(hits))
            cells.append(
                f"{100 * hits.count('1') / len(hits):.1f} [{100 * low:.0f}, {100 * high:.0f}]"
            )
        both = [seed for seed in seeds if (seed, STAGE1) in found and arm != STAGE1]
        for name in SCORES:
            pairs = [
                np.array(list(found[seed, arm]["hits"][name]), int)
                - np.array(list(found[seed, STAGE1]["hits"][name]), int)
                for seed in both
            ]
            cells.append(with_interval(paired_difference(pairs)) if pairs else "")
        form = np.mean([found[seed, arm]["form"] for seed in seeds])
        lines.append(f"| {' | '.join([*cells, f'{form:.0f}'])} |")
    return "\n".join(lines)


def learn(bench: Bench, classes: int, seeds: Sequence[int]) -> str:
    """All stages of all seeds; returns the table."""
    bench.claim(classes)
    tower_stages(bench)
    for seed in seeds:
        seed_stages(bench, classes, seed)
    return table([json.loads(line) for line in bench.ledger.read_text("utf-8").splitlines()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, help="folder of all photos, by class")
    parser.add_argument("--questions", nargs=2, required=True, help="seen and unseen ones")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ledger", type=Path, default=RESULTS)
    parser.add_argument("--classes", type=int, default=25)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if len(set(options.seeds)) < len(options.seeds):
        parser.error(f"--seeds: each once, got {options.seeds}")
    flowers = read_flowers(options.images, read_all(options.questions).all)
    bench = Bench(options.out, options.ledger, tuple(options.questions), flowers, Sizes())
    print(learn(bench, options.classes, options.seeds))


if __name__ == "__main__":
    main()
