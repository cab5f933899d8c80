"""The demo's arms: ways to go on from stage 1, each a training run that is scored and kept.

A row of scores.jsonl is written for every arm as soon as it is scored, so that a run that was
stopped goes on with the next one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import numpy as np

from tercet.core.data.manifest import Manifest
from tercet.core.prompts import stage2_text
from tercet.core.rewards import fine_r1_strict
from tercet.train.demo.drawn_world import sft_record
from tercet.train.demo.scores import Scores, evaluate
from tercet.train.demo.species import chain_of_thought, species_of
from tercet.train.demo.stages import (
    Seed,
    cpu_seconds,
    greys_of,
    parse_tapo,
    train_sft,
    train_tapo,
)
from tercet.train.learner.arguments import overridden

Equal = Literal["responses", "time"]
START, TAPO, DAPO = "stage 1 (start)", "TAPO", "DAPO"
PERMUTED, LABELS, ORACLE = "TAPO, rewards permuted", "SFT, labels", "SFT, exact thoughts (oracle)"
_ANCHOR_ONLY = ("--rollout.n_anchor=6", "--rollout.n_positive=0")
_PLAIN = ("--loss.kl_coef=0", "--loss.entropy_coef=0", "--loss.neg_entropy_coef=0")
TAPO_ARMS: dict[str, tuple[str, ...]] = {
    TAPO: (),
    DAPO: (*_ANCHOR_ONLY, *_PLAIN),
    PERMUTED: ("--rollout.reward=tercet.train.demo.arms:permuted_reward",),
    "DAPO + intra": _PLAIN,
    "DAPO + inter": _ANCHOR_ONLY,
}
"""The arms that train/tapo.py trains: the options in which they differ from TAPO."""
ARMS = (TAPO, DAPO, PERMUTED, LABELS, "DAPO + intra", "DAPO + inter", ORACLE)
LEDGER = "scores.jsonl"


@dataclass(frozen=True)
class Row:
    """One arm's result: a line of scores.jsonl."""

    seed: int
    arm: str
    equal: Equal
    """What the arm has as much of as TAPO: sampled responses, or CPU seconds."""
    steps: int
    cpu_s: float
    scores: Scores


def permuted_reward(rows: list[dict]) -> list[dict]:
    """A control reward: fine_r1_strict, its results permuted at random within the group.

    A group keeps its rewards, but they no longer say which response was right, so nothing can be
    learnt from them. The permutation depends on the group's id alone.
    """
    digest = blake2b(rows[0]["group_id"].encode(), digest_size=8).digest()
    order = np.random.default_rng(int.from_bytes(digest, "big")).permutation(len(rows))
    results = fine_r1_strict(rows)
    return [results[i] for i in order]


def read_rows(path: Path) -> list[Row]:
    """The rows of a ledger; a last line that a killed run left unfinished is passed over."""
    if not path.exists():
        return []
    *lines, rest = path.read_text(encoding="utf-8").split("\n")
    if rest:
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    found = [json.loads(line) for line in lines]
    return [Row(**row | {"scores": Scores(**row["scores"])}) for row in found]


def run_arm(seed: Seed, start: Path, arm: str, equal: Equal, argv: Sequence[str]) -> Row:
    """Train and score an arm, or read its row where it is in the ledger.

    Args:
        seed: with its triplets chosen.
        start: the checkpoint after stage 1.
        arm: START or one of ARMS.
        equal: what the arm has as much of as TAPO. "time" needs the rows of the arm and of TAPO for
            "responses".
        argv: further options of train/tapo.py.
    """
    ledger = seed.out / LEDGER
    kept = {(row.arm, row.equal): row for row in read_rows(ledger)}
    if (arm, equal) in kept:
        return kept[arm, equal]
    steps, seconds, trained = 0, 0.0, start
    if arm != START:
        steps, folder = parse_tapo(argv).run.steps, folder_of(arm)
        if equal == "time":
            share = kept[TAPO, "responses"].cpu_s / kept[arm, "responses"].cpu_s
            steps, folder = max(1, round(steps * share)), f"{folder}_time"
        trained = _train(seed, start, arm, folder, steps, argv)
        seconds = cpu_seconds(seed.out / folder)
    scores = evaluate(trained, Manifest.read(seed.triplets), greys_of(seed), seed.names)
    row = Row(seed.number, arm, equal, steps, seconds, scores)
    with ledger.open("a", encoding="utf-8") as opened:
        opened.write(json.dumps(asdict(row)) + "\n")
    return row


def _train(seed: Seed, start: Path, arm: str, folder: str, steps: int, argv: Sequence[str]) -> Path:
    if arm in TAPO_ARMS:
        more = overridden(argv, [*TAPO_ARMS[arm], f"--run.steps={steps}"])
        return train_tapo(seed, start, folder, more)
    path = seed.out / f"{folder_of(arm)}.json"
    path.write_text(json.dumps(_records(seed, arm)), encoding="utf-8")
    pictures = parse_tapo(argv).rollout.groups_per_step
    more = [f"--run.steps={steps}", f"--optim.samples_per_step={pictures}"]
    return train_sft(seed, "demo_stage1.yaml", path, start, folder, more)


def _records(seed: Seed, arm: str) -> list[dict]:
    """Records for train/sft.py about TAPO's anchors: the target is the name alone (LABELS) or the
    exact chain of thought (ORACLE)."""
    species, records = {s.name: s for s in species_of(seed.names)}, []
    for anchor in Manifest.read(seed.triplets).anchors:
        said = f"<answer>{anchor.sub_category}</answer>"
        if arm == ORACLE:
            said = chain_of_thought(species[anchor.sub_category])
        records.append(sft_record([anchor.image], stage2_text(anchor.question), said))
    return records


def folder_of(arm: str) -> str:
    """The name of an arm's folder."""
    words = "".join(c if c.isalnum() else " " for c in arm.lower()).split()
    return "_".join(words)
