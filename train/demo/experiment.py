"""The demo's parts: data, stages, evaluation, controls and the table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
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
from tercet.train.demo import drawn_world
from tercet.train.evaluation.answers import ask, table
from tercet.train.learner.command_line import RECIPES, parse
from tercet.train.learner.device import set_up

BASE_PICTURES = 6000
BASE_MIX = {"caption": 0.5, "open": 0.3, "closed": 0.2}  # kinds of base records
TRAIN, SFT, TEST = 40, 6, 30  # pictures a sub-category
CONTROLS = {
    "DAPO": [
        "--rollout.n_anchor=6",
        "--rollout.n_positive=0",
        "--loss.kl_coef=0",
        "--loss.entropy_coef=0",
        "--loss.neg_entropy_coef=0",
    ],
    "TAPO, rewards permuted": [
        "--rollout.reward=tercet.train.demo.experiment:permuted_reward",
        "--rollout.max_rounds=1",  # it unlearns, and few groups pass
    ],
}
GAIN, UNSEEN_LOSS, PERMUTED_GAIN = 10.0, 2.0, 3.0  # points that demo-seeds asks for


@dataclass(frozen=True)
class Scores:
    """Percent right on held-out pictures, seen and unseen, with the seconds training took."""

    seen: float
    unseen: float
    seen_closed: float
    unseen_closed: float
    seconds: float = 0.0


def permuted_reward(rows: list[dict]) -> list[dict]:
    """fine_r1_strict with the outcomes of a group dealt out anew: what must teach nothing."""
    digest = blake2b(rows[0]["group_id"].encode(), digest_size=8).digest()
    order = np.random.default_rng(int.from_bytes(digest, "big")).permutation(len(rows))
    outcomes = fine_r1_strict(rows)
    return [outcomes[i] for i in order]


def prepare(out: Path, seed: int) -> Path:
    """Draw the world and run base stage and stage 1; returns the stage-1 checkpoint.

    What is there already is kept: a finished part is not made again.
    """
    data, base = out / "data", out / "base_data"
    if not data.exists():
        drawn_world.write_world(data, seed, train=TRAIN, sft=SFT, test=TEST)
    if not base.exists():
        _write_base(base, seed)
    start = out / "random"
    if not start.exists():
        texts = [*drawn_world.vocabulary(), *(r["messages"][0]["content"] for r in _read(base))]
        build_tiny(texts, seed=seed).save(start)
    trained = _sft("demo_base.yaml", base / "records.json", start, out / "base", seed)
    return _sft("demo_stage1.yaml", data / "stage1.json", trained, out / "stage1", seed)


def _write_base(folder: Path, seed: int) -> None:
    """Captioned pictures of every sub-category, none of them seen again later."""
    rng = np.random.default_rng([seed, 1])
    folder.mkdir(parents=True)
    records = []
    for n in range(BASE_PICTURES):
        species = drawn_world.SPECIES[rng.integers(len(drawn_world.SPECIES))]
        drawn_world.draw(species, rng).save(folder / f"{n:05}.png")
        asked, said = _base_turns(species, rng)
        records.append(
            {
                "messages": [
                    {"role": "user", "content": f"<image>{asked}"},
                    {"role": "assistant", "content": said},
                ],
                "images": [f"{n:05}.png"],
            }
        )
    (folder / "records.json").write_text(json.dumps(records), encoding="utf-8")


def _base_turns(species: drawn_world.Species, rng: np.random.Generator) -> tuple[str, str]:
    """What a base record asks and says: a caption, an answer to an open or to a closed question."""
    kind = rng.choice(list(BASE_MIX), p=list(BASE_MIX.values()))
    if kind == "caption":
        return "Describe the picture.", drawn_world.caption(species, rng)
    asked = drawn_world.question(species.super_category, rng)
    if kind == "open":
        return asked, drawn_world.caption(species, rng)
    every = [s.name for s in drawn_world.SPECIES if s.super_category == species.super_category]
    wrong = rng.choice([name for name in every if name != species.name], 3, replace=False)
    options = rng.permutation([species.name, *wrong]).tolist()
    return closed_world_text(asked, options), drawn_world.chain_of_thought(species, rng)


def _read(base: Path) -> list[dict]:
    return json.loads((base / "records.json").read_text(encoding="utf-8"))


def _sft(recipe: str, data: Path, model: Path, out: Path, seed: int, steps: int = 0) -> Path:
    argv = [f"--config={RECIPES / recipe}", f"--data.path={data}", f"--model.path={model}"]
    argv += [f"--run.out={out}", f"--run.seed={seed}"] + [f"--run.steps={steps}"] * bool(steps)
    config, _, resolved = parse(SftConfig, argv, "")
    return sft.train(config, resolved, resume="auto")


def _tapo(data: Path, model: Path, out: Path, seed: int, argv: Sequence[str]) -> Path:
    argv = [
        f"--config={RECIPES / 'demo.yaml'}",
        *argv,
        f"--data.path={data}",
        f"--data.questions={data / 'questions.yaml'}",
        f"--model.path={model}",
        f"--run.out={out}",
        f"--run.seed={seed}",
    ]
    config, _, resolved = parse(TapoConfig, argv, "")
    return tapo.train(config, resolved, resume="auto")


def evaluate(model: Path, manifest: Manifest) -> Scores:
    """Greedy accuracy of a checkpoint on the manifest's held-out pictures."""
    parts = load_policy(ModelConfig(path=str(model)), set_up(TapoConfig().run))
    engine = LocalEngine(parts, PromptEncoder(parts), max_rows=320)
    questions = [q for partition in ("seen", "unseen") for q in eval_questions(manifest, partition)]
    scores = {}
    for prompt, score in (("stage2", "exact"), ("closed_world", "closed")):
        answers = ask(engine, parts, questions, prompt=prompt, names=manifest.names, max_tokens=48)
        for partition, row in table(answers).items():
            scores[partition if score == "exact" else f"{partition}_{score}"] = row[score]
    return Scores(**scores)


def run_seed(out: Path, seed: int, argv: Sequence[str], controls: bool) -> dict[str, Scores]:
    """Scores of the stage-1 start, of TAPO and, if wanted, of each control; by name.

    They are kept in scores.json: a seed that is finished is not run again.
    """
    kept = out / "scores.json"
    if kept.exists():
        found = json.loads(kept.read_text(encoding="utf-8"))
        return {name: Scores(**numbers) for name, numbers in found.items()}
    start = prepare(out, seed)
    scores = {}
    for name, options in {"TAPO": [], **(CONTROLS if controls else {})}.items():
        folder = out / name.lower().replace(", ", "_").replace(" ", "_")
        trained = _tapo(out / "data", start, folder, seed, [*options, *argv])
        manifest = Manifest.read(folder)
        if not scores:
            scores["stage 1 (start)"] = evaluate(start, manifest)
        scores[name] = replace(evaluate(trained, manifest), seconds=sum(_seconds(folder)))
    if controls:
        trained = _more_sft(out, start, manifest, seed, scores["TAPO"].seconds)
        scores["SFT"] = replace(evaluate(trained, manifest), seconds=sum(_seconds(out / "sft")))
    numbers = {name: asdict(score) for name, score in scores.items()}
    kept.write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    return scores


def _more_sft(out: Path, start: Path, manifest: Manifest, seed: int, seconds: float) -> Path:
    """Stage 1 continued on TAPO's own pictures for about `seconds`."""
    rng = np.random.default_rng([seed, 2])
    species = {s.name: s for s in drawn_world.SPECIES}
    records = [
        {
            "messages": [
                {"role": "user", "content": "<image>" + stage2_text(anchor.question)},
                {
                    "role": "assistant",
                    "content": drawn_world.chain_of_thought(species[anchor.sub_category], rng),
                },
            ],
            "images": [anchor.image],
        }
        for anchor in manifest.anchors
    ]
    path = out / "sft_records.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    recipe = "demo_stage1.yaml"
    steps = max(1, round(seconds / mean(_seconds(out / "stage1"))))
    return _sft(recipe, path, start, out / "sft", seed, steps)


def _seconds(folder: Path) -> list[float]:
    """Seconds of each step that a run in `folder` took."""
    rows = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    phases = [json.loads(row).items() for row in rows]
    return [sum(v for name, v in row if name.startswith("seconds_")) for row in phases]


def markdown(scores: dict[str, Scores]) -> str:
    """The scores as a table."""
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
    names = [field.name for field in fields(Scores)]
    return {
        name: Scores(**{n: mean(getattr(run[name], n) for run in runs) for n in names})
        for name in runs[0]
    }


def verdicts(runs: Sequence[dict[str, Scores]]) -> list[str]:
    """What three seeds must show, each with its figures and pass or fail."""
    start = "stage 1 (start)"
    gains = [run["TAPO"].seen - run[start].seen for run in runs]
    unseen = mean(run["TAPO"].unseen - run[start].unseen for run in runs)
    permuted = mean(run["TAPO, rewards permuted"].seen - run[start].seen for run in runs)
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
