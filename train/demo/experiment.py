"""The demo's parts: data, training stages, TAPO and its controls, evaluation and the table.

A seed's arms all start from the same stage-1 checkpoint: TAPO, the CONTROLS, and stage 1 continued
("SFT"). `run_seed` trains and evaluates them; their names are the rows of the table.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import blake2b
from pathlib import Path
from statistics import mean

import numpy as np

from tercet.core.config import ModelConfig, SftConfig, TapoConfig
from tercet.core.data.manifest import Manifest
from tercet.core.data.triplets import eval_questions
from tercet.core.data.vision import PromptEncoder
from tercet.core.models import build_tiny, load_policy
from tercet.core.prompts import closed_world_text, stage2_text
from tercet.core.rewards import fine_r1_strict
from tercet.rollout.local import LocalEngine
from tercet.train import sft, tapo
from tercet.train.demo.drawing import draw
from tercet.train.demo.drawn_world import sft_record, write_world
from tercet.train.demo.species import (
    SPECIES,
    Species,
    caption,
    chain_of_thought,
    question,
    vocabulary,
)
from tercet.train.evaluation.answers import ask, table
from tercet.train.learner.arguments import overridden
from tercet.train.learner.command_line import RECIPES, parse
from tercet.train.learner.device import set_up
from tercet.train.learner.identity import Kind, of_kind, options_of, shown
from tercet.train.learner.metrics import METRICS_FILE, phase_seconds, read_metrics

BASE_PICTURES = 6000
BASE_MIX = {"caption": 0.5, "open": 0.3, "closed": 0.2}
"""Share of each kind of record in the base stage."""
PICTURES = {"train": 40, "sft": 6, "test": 30}
"""Pictures of a sub-category in each split."""
START, PERMUTED = "stage 1 (start)", "TAPO, rewards permuted"
CONTROLS = {
    "DAPO": [
        "--rollout.n_anchor=6",
        "--rollout.n_positive=0",
        "--loss.kl_coef=0",
        "--loss.entropy_coef=0",
        "--loss.neg_entropy_coef=0",
    ],
    PERMUTED: [
        "--rollout.reward=tercet.train.demo.experiment:permuted_reward",
        "--rollout.max_rounds=1",  # the policy gets worse, so that ever fewer groups pass
    ],
}
"""The control arms trained by train/tapo.py, with the options in which they differ from TAPO."""
GAIN, UNSEEN_LOSS, PERMUTED_GAIN = 10.0, 2.0, 3.0
"""Bounds of `verdicts`, in percentage points."""


@dataclass(frozen=True)
class Scores:
    """Accuracy (%) of one arm on held-out pictures of seen and unseen sub-categories.

    `seen` and `unseen` are of open answers, right only if the true name is the one known name in
    them; `seen_closed` and `unseen_closed` are of questions that list options. `seconds` is what
    the training took after stage 1.
    """

    seen: float
    unseen: float
    seen_closed: float
    unseen_closed: float
    seconds: float = 0.0


def permuted_reward(rows: list[dict]) -> list[dict]:
    """A control reward: fine_r1_strict, its results permuted at random within the group.

    A group keeps its rewards, but they no longer say which response was right, so nothing can be
    learnt from them. The permutation depends on the group's id alone.
    """
    digest = blake2b(rows[0]["group_id"].encode(), digest_size=8).digest()
    order = np.random.default_rng(int.from_bytes(digest, "big")).permutation(len(rows))
    results = fine_r1_strict(rows)
    return [results[i] for i in order]


def prepare(out: Path, seed: int) -> Path:
    """Draw the world, then run the base stage and stage 1; returns the stage-1 checkpoint.

    Parts that `out` holds already are not made again.
    """
    data, base = out / "data", out / "base_data"
    if not data.exists():
        write_world(data, seed, **PICTURES)
    if not base.exists():
        _write_base_data(base, seed)
    random = out / "random"
    if not random.exists():
        records = json.loads((base / "records.json").read_text(encoding="utf-8"))
        asked = [record["messages"][0]["content"] for record in records]
        build_tiny([*vocabulary(), *asked], seed=seed).save(random)
    trained = _run_sft("demo_base.yaml", base / "records.json", random, out / "base", seed)
    return _run_sft("demo_stage1.yaml", data / "stage1.json", trained, out / "stage1", seed)


def _write_base_data(folder: Path, seed: int) -> None:
    """Write the base stage's pictures of every sub-category; no later stage uses them."""
    rng = np.random.default_rng([seed, 1])
    folder.mkdir(parents=True)
    records = []
    for n in range(BASE_PICTURES):
        species = SPECIES[rng.integers(len(SPECIES))]
        draw(species, rng).save(folder / f"{n:05}.png")
        asked, said = _base_turns(species, rng)
        records.append(sft_record(f"{n:05}.png", asked, said))
    (folder / "records.json").write_text(json.dumps(records), encoding="utf-8")


def _base_turns(species: Species, rng: np.random.Generator) -> tuple[str, str]:
    """Question and answer of a base record: a caption, or an open or a closed question."""
    kind = rng.choice(list(BASE_MIX), p=list(BASE_MIX.values()))
    if kind == "caption":
        return "Describe the picture.", caption(species, rng)
    asked = question(species.super_category, rng)
    if kind == "open":
        return asked, caption(species, rng)
    every = [s.name for s in SPECIES if s.super_category == species.super_category]
    wrong = rng.choice([name for name in every if name != species.name], 3, replace=False)
    options = rng.permutation([species.name, *wrong]).tolist()
    return closed_world_text(asked, options), chain_of_thought(species, rng)


def _run_sft(recipe: str, data: Path, model: Path, out: Path, seed: int, steps: int = 0) -> Path:
    """Run train/sft.py's loop; returns the last checkpoint. 0 steps: as many as the recipe says."""
    argv = [f"--config={RECIPES / recipe}", f"--data.path={data}", f"--model.path={model}"]
    argv += [f"--run.out={out}", f"--run.seed={seed}"] + [f"--run.steps={steps}"] * bool(steps)
    config, _, resolved = parse(SftConfig, argv, "")
    return sft.train(config, resolved, resume="auto")


def _run_tapo(data: Path, model: Path, out: Path, seed: int, argv: Sequence[str]) -> Path:
    """Run train/tapo.py's loop; returns the last checkpoint."""
    own = [
        f"--data.path={data}",
        f"--data.questions={data / 'questions.yaml'}",
        f"--model.path={model}",
        f"--run.out={out}",
        f"--run.seed={seed}",
    ]
    argv = [f"--config={RECIPES / 'demo.yaml'}", *overridden(argv, own)]
    config, _, resolved = parse(TapoConfig, argv, "")
    config.run.overwrite = False  # the whole demo was moved aside
    return tapo.train(config, resolved, resume="auto")


def evaluate(model: Path, manifest: Manifest, seconds: float = 0.0) -> Scores:
    """Accuracy of a checkpoint on the manifest's held-out pictures, with greedy decoding."""
    parts = load_policy(ModelConfig(path=str(model)), set_up(TapoConfig().run))
    engine = LocalEngine(parts, PromptEncoder(parts), max_rows=320)
    questions = [q for partition in ("seen", "unseen") for q in eval_questions(manifest, partition)]
    accuracy = {}
    for prompt, score in (("stage2", "exact"), ("closed_world", "closed")):
        answers = ask(engine, parts, questions, prompt=prompt, names=manifest.names, max_tokens=48)
        for partition, row in table(answers).items():
            accuracy[partition if score == "exact" else f"{partition}_{score}"] = row[score]
    return Scores(**accuracy, seconds=seconds)


def run_seed(out: Path, seed: int, argv: Sequence[str], controls: bool) -> dict[str, Scores]:
    """Train and evaluate a seed's arms.

    A finished seed is not run again: its scores are read from scores.json. The folder keeps the
    options too, and refuses others.

    Args:
        out: folder of the seed.
        seed: of the data and of every training run.
        argv: further options of train/tapo.py, for TAPO and the CONTROLS.
        controls: whether the controls are run beside TAPO.

    Returns:
        Scores by arm: START, "TAPO", then CONTROLS and "SFT" if wanted.

    Raises:
        ValueError: the folder holds the demo with other options.
    """
    _refuse_other_options(out, seed, argv)
    kept = out / "scores.json"
    if kept.exists():
        found = json.loads(kept.read_text(encoding="utf-8"))
        return {name: Scores(**numbers) for name, numbers in found.items()}
    start = prepare(out, seed)
    scores = {}
    for name, options in {"TAPO": [], **(CONTROLS if controls else {})}.items():
        folder = out / name.lower().replace(", ", "_").replace(" ", "_")
        trained = _run_tapo(out / "data", start, folder, seed, overridden(options, argv))
        manifest = Manifest.read(folder)
        if not scores:
            scores[START] = evaluate(start, manifest)
        scores[name] = evaluate(trained, manifest, sum(_step_seconds(folder)))
    if controls:
        trained = _continue_sft(out, start, manifest, seed, scores["TAPO"].seconds)
        scores["SFT"] = evaluate(trained, manifest, sum(_step_seconds(out / "sft")))
    numbers = {name: asdict(arm) for name, arm in scores.items()}
    kept.write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    return scores


def _refuse_other_options(out: Path, seed: int, argv: Sequence[str]) -> None:
    config, _, _ = parse(TapoConfig, [f"--config={RECIPES / 'demo.yaml'}", *argv], "")
    config.run.seed = seed
    now, noted = options_of(config), out / "options.json"
    if noted.exists():
        then = json.loads(noted.read_text(encoding="utf-8"))
        changed = {name: (then.get(name), value) for name, value in now.items()}
        changed = {name: pair for name, pair in changed.items() if pair[0] != pair[1]}
        if changed := of_kind(changed, Kind.FIXED, Kind.STEP, Kind.LISTED):
            raise ValueError(
                f"run.out {out} holds the demo with other options ({shown(changed)}): give another "
                "--run.out, or --run.overwrite true, which moves it aside"
            )
    out.mkdir(parents=True, exist_ok=True)
    noted.write_text(json.dumps(now, indent=1), encoding="utf-8")


def _continue_sft(out: Path, start: Path, manifest: Manifest, seed: int, seconds: float) -> Path:
    """Continue stage 1 on TAPO's training pictures for about `seconds`; returns the checkpoint."""
    rng = np.random.default_rng([seed, 2])
    species = {s.name: s for s in SPECIES}
    records = [
        sft_record(
            anchor.image,
            stage2_text(anchor.question),
            chain_of_thought(species[anchor.sub_category], rng),
        )
        for anchor in manifest.anchors
    ]
    path = out / "sft_records.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    steps = max(1, round(seconds / mean(_step_seconds(out / "stage1"))))
    return _run_sft("demo_stage1.yaml", path, start, out / "sft", seed, steps)


def _step_seconds(folder: Path) -> list[float]:
    """Seconds that each step of the run in `folder` took."""
    return [sum(phase_seconds(step).values()) for step in read_metrics(folder / METRICS_FILE)]


def markdown(scores: dict[str, Scores]) -> str:
    """A Markdown table of the scores, one row an arm."""
    lines = [
        "| policy | seen | unseen | seen, closed | unseen, closed | training |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, s in scores.items():
        numbers = (s.seen, s.unseen, s.seen_closed, s.unseen_closed)
        shown = " | ".join(f"{number:.1f}" for number in numbers)
        lines.append(f"| {name} | {shown} | {f'{s.seconds:.0f} s' if s.seconds else ''} |")
    return "\n".join(lines)


def mean_scores(runs: Sequence[dict[str, Scores]]) -> dict[str, Scores]:
    """Means over the seeds of every arm's scores."""
    names = [field.name for field in fields(Scores)]
    return {
        name: Scores(**{n: mean(getattr(run[name], n) for run in runs) for n in names})
        for name in runs[0]
    }


def verdicts(runs: Sequence[dict[str, Scores]]) -> list[str]:
    """The demo's claims about all seeds together, each with its numbers and pass or FAIL.

    Args:
        runs: one seed's scores by arm, with all controls.
    """
    gains = [run["TAPO"].seen - run[START].seen for run in runs]
    unseen = mean(run["TAPO"].unseen - run[START].unseen for run in runs)
    permuted = mean(run[PERMUTED].seen - run[START].seen for run in runs)
    checks = [
        (f"seen: mean gain {mean(gains):+.1f}, at least {GAIN:+.0f}", mean(gains) >= GAIN),
        (f"seen: every seed up, least {min(gains):+.1f}", min(gains) > 0),
        (
            f"unseen: mean change {unseen:+.1f}, at least {-UNSEEN_LOSS:+.0f}",
            unseen >= -UNSEEN_LOSS,
        ),
        (
            f"permuted rewards: gain {permuted:+.1f}, under {PERMUTED_GAIN:+.0f}",
            permuted < PERMUTED_GAIN,
        ),
    ]
    return [f"{'pass' if passed else 'FAIL'}  {text}" for text, passed in checks]
