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
from tercet.train.cli.arguments import overridden
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
_FLOW = ("--loss.update_on=anchor", "--loss.neg_grad=flow")
_KL_ALONE = (*_FLOW, "--loss.neg_entropy_coef=0")
RELEASED = "released"
FORMS: dict[str, tuple[str, ...]] = {
    RELEASED: ("--loss.update_on=own", "--loss.neg_grad=detach"),
    "released, anchor": ("--loss.update_on=anchor", "--loss.neg_grad=detach"),
    "flow": _FLOW,
    "flow, own": ("--loss.update_on=own", "--loss.neg_grad=flow"),
    "flow, exact": (*_FLOW, "--loss.entropy_form=exact"),
    "flow, kl 0.01": (*_KL_ALONE, "--loss.kl_coef=0.01"),
    "flow, kl 0.03": (*_KL_ALONE, "--loss.kl_coef=0.03"),
    "flow, kl 0.1": (*_KL_ALONE, "--loss.kl_coef=0.1"),
    "flow, policy_over_neg": (*_FLOW, "--loss.kl_ratio=policy_over_neg"),
}
"""Forms of the loss: the options in which they differ from the demo's recipe. "flow"
is that of the preset tercet."""
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


@dataclass(frozen=True)
class Job:
    """One arm of one seed."""

    seed: Seed
    arm: str
    """START, or one of ARMS or FORMS."""
    equal: Equal
    margins: bool = False
    """Whether margins are scored too."""

    @property
    def name(self) -> str:
        return f"seed {self.seed.number}: {self.arm}, equal {self.equal}"

    def kept(self, arm: str | None = None, equal: Equal | None = None) -> Row | None:
        """The row of this job, or of another arm of its seed, where it is in the ledger."""
        wanted = (arm or self.arm, equal or self.equal)
        rows = {(row.arm, row.equal): row for row in read_rows(self.seed.out / LEDGER)}
        return rows.get(wanted)

    def keep(self, row: Row) -> None:
        """Add a row to the seed's ledger."""
        with (self.seed.out / LEDGER).open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(asdict(row)) + "\n")


def run_arm(job: Job, argv: Sequence[str]) -> Row:
    """Train and score an arm and keep its row, or read it where it is in the ledger.

    Args:
        job: of a seed that is prepared.
        argv: further options of train/tapo.py.
    """
    if row := job.kept():
        return row
    row = measured(job, argv)
    job.keep(row)
    return row


def measured(job: Job, argv: Sequence[str]) -> Row:
    """Train and score an arm. At equal time it needs the rows of the arm and of TAPO at equal
    responses."""
    seed, arm = job.seed, job.arm
    steps, seconds, trained = 0, 0.0, seed.start
    if arm != START:
        steps, folder = parse_tapo(argv).run.steps, folder_of(arm)
        if job.equal == "time":
            share = job.kept(TAPO, "responses").cpu_s / job.kept(arm, "responses").cpu_s
            steps, folder = max(1, round(steps * share)), f"{folder}_time"
        trained = _train(seed, arm, folder, steps, argv)
        seconds = cpu_seconds(seed.out / folder)
    manifest = Manifest.read(seed.triplets)
    scores = evaluate(trained, manifest, greys_of(seed), seed.names, job.margins)
    return Row(seed.number, arm, job.equal, steps, seconds, scores)


def _train(seed: Seed, arm: str, folder: str, steps: int, argv: Sequence[str]) -> Path:
    options = TAPO_ARMS | FORMS
    if arm in options:
        more = overridden(argv, [*options[arm], f"--run.steps={steps}"])
        return train_tapo(seed, seed.start, folder, more)
    path = seed.out / f"{folder_of(arm)}.json"
    path.write_text(json.dumps(_records(seed, arm)), encoding="utf-8")
    pictures = parse_tapo(argv).rollout.groups_per_step
    more = [f"--run.steps={steps}", f"--optim.samples_per_step={pictures}"]
    return train_sft(seed, "demo_stage1.yaml", path, seed.start, folder, more)


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
