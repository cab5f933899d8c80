"""Groups on disk: what the policy said in some groups of a step, and what the step made of it.

Nothing is computed for it: a log-prob that the step did not need is null (see group_files for what
a file holds).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tercet.core.config import TapoConfig
from tercet.core.data.manifest import Manifest
from tercet.core.draws import seeded_order
from tercet.core.packing import Piece, by_response
from tercet.core.rewards import is_correct
from tercet.core.types import Group, PolicyParts, Response
from tercet.rollout.step_groups import StepGroups
from tercet.train.learner.ranks import Ranks
from tercet.train.logs.group_files import GROUPS, packed, step_files, thin_out, write_groups
from tercet.train.logs.run_log import RunLog, SilentLog

ROWS = ("logprobs", "neg_logprobs")
"""Log-probs of an update, on its own photo and on the negative."""
Place = tuple[str, int]
"""A response: its group's id and its index."""


class Run(Protocol):
    """What it uses of a run of TAPO."""

    config: TapoConfig
    manifest: Manifest
    parts: PolicyParts
    ranks: Ranks
    log: RunLog | SilentLog
    out: Path
    steps_done: int


class GroupLog:
    """Writes some groups of each step; on ranks other than the first it only hands over log-probs.

    Args:
        run: of TAPO; files of steps that it takes again are removed.
    """

    def __init__(self, run: Run):
        self._run, self._options = run, run.config.run
        self.sampled: StepGroups | None = None
        """What the step's sampling gave, on rank 0; None after a resume amid a step."""
        self._found: dict[str, dict[Place, Tensor]] = {name: {} for name in ROWS}
        self._folder = run.out / GROUPS
        if run.ranks.is_first:
            self._root = run.manifest.common_folder()
            self._names = sub_categories(run.manifest)
            self._text = TokenTexts(run.parts.tokenizer)
            for step, file in step_files(self._folder).items():
                if step > run.steps_done:
                    with suppress(OSError):
                        file.unlink()

    def take(self, pieces: Sequence[Piece], metrics: dict[str, Tensor]) -> dict[Place, Tensor]:
        """Take the log-probs of an update's rows out of its metrics.

        Args:
            pieces: whose rows they are.
            metrics: of `Policy.accumulate`; `logprobs` and `neg_logprobs` [R] leave it.

        Returns:
            The policy's, by response; without those of row weight 0.
        """
        found = {
            name: by_response(pieces, metrics.pop(name), weighted=True)
            for name in ROWS
            if name in metrics
        }
        for name, rows in found.items():
            self._found[name] |= rows
        return found["logprobs"]

    def write(self, groups: Sequence[Group]) -> None:
        """Write a step that ends, where it is due; a collective.

        What goes wrong with a file costs a line of the log, not the run.

        Args:
            groups: those that the step trained on.
        """
        step, sampled, found = self._run.steps_done + 1, self.sampled, self._found
        self.sampled, self._found = None, {name: {} for name in ROWS}
        if not self._options.log_groups or step % self._options.log_groups_every:
            return
        with self._run.log.phase("log", total=1, unit="file") as phase:
            every = {group.id: group for group in (*groups, *(sampled.rewarded if sampled else ()))}
            chosen = self._first(every, step)
            kept = {group.id for group in groups}
            mine = set(chosen if self._run.ranks.is_first else self._first(kept, step))
            for name in ROWS:
                some = {place: rows for place, rows in found[name].items() if place[0] in mine}
                parts = self._run.ranks.exchange(some)
                found[name] = {place: rows for part in parts for place, rows in part.items()}
            if self._run.ranks.is_first:
                try:
                    lines = [self._line(step, every[i], i in kept, sampled, found) for i in chosen]
                    write_groups(self._folder, step, lines)
                    thin_out(self._folder, self._options.log_groups_mib * 2**20)
                except Exception as error:  # what only reports does not end training
                    self._run.log.say(f"the groups of step {step} are not written: {error}")
            phase.advance()

    def _first(self, ids: Iterable[str], step: int) -> list[str]:
        """The ids that are drawn; those of fewer ids hold those of more that are among them."""
        seed = self._options.seed
        return seeded_order(ids, seed, "groups", step)[: self._options.log_groups]

    def _line(
        self,
        step: int,
        group: Group,
        kept: bool,
        sampled: StepGroups | None,
        found: dict[str, dict[Place, Tensor]],
    ) -> dict:
        triplet = group.triplet
        keys = {role: getattr(triplet, role) for role in ("anchor", "positive", "negative")}
        names = dict.fromkeys(("anchor", "positive"), triplet.sub_category)
        responses = [
            self._response(response, kept, {n: found[n].get((group.id, i)) for n in ROWS})
            for i, response in enumerate(group.responses)
        ]
        return {
            "step": step,
            "id": group.id,
            "photos": {role: os.path.relpath(key, self._root) for role, key in keys.items()},
            "names": names | {"negative": self._names.get(triplet.negative, "")},
            "super_category": triplet.super_category,
            "question": triplet.question,
            "kept": kept,
            "why": why(group, kept, sampled),
            "responses": responses,
        }

    def _response(self, response: Response, kept: bool, rows: dict[str, Tensor | None]) -> dict:
        if rows["neg_logprobs"] is None:
            rows["neg_logprobs"] = response.neg_logprobs
        rows |= {"old_logprobs": response.old_logprobs}
        rows |= {"rollout_logprobs": response.rollout_logprobs}
        return {
            "role": response.role,
            "text": response.text,
            "tokens": self._text.of(response.token_ids),
            "reward": response.reward,
            "metrics": response.metrics,
            "advantage": response.advantage if kept else None,
            "finish_reason": response.finish_reason,
            "weight_version": response.weight_version,
            **{name: packed(values) for name, values in rows.items()},
        }


def sub_categories(manifest: Manifest) -> dict[str, str]:
    """The sub-category of each photo that the manifest gives one."""
    found = {photo.image: photo.sub_category for photo in manifest.sft}
    for anchor in manifest.anchors:
        found |= dict.fromkeys((anchor.image, *anchor.positives), anchor.sub_category)
    return found


def why(group: Group, kept: bool, sampled: StepGroups | None) -> str:
    """Why a group was kept or dropped; empty where the sampling is not known any more."""
    if sampled is None:
        return ""
    if group.id in sampled.passing:
        return "passed" if kept else "surplus"
    if kept:
        return "filled up"
    marks = {is_correct(r.metrics) for r in group.responses if "accuracy" in r.metrics}
    if len(marks) == 2:  # it came too late to be counted
        return "surplus"
    return {(True,): "all right", (False,): "all wrong"}.get(tuple(marks), "rewards alike")


class TokenTexts:
    """The text of each token, so that those of a response together are its text.

    Args:
        tokenizer: a byte-level one: a character may take several tokens; the first one has it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def of(self, token_ids: Sequence[int]) -> list[str]:
        for token in set(token_ids) - self._known.keys():
            self._known[token] = self._tokenizer.decode([token])
        texts = [self._known[token] for token in token_ids]
        start = None  # of tokens that hold parts of characters
        for place in range(len(texts) + 1):
            if place < len(texts) and "\ufffd" in texts[place]:
                start = place if start is None else start
            elif start is not None:
                whole = self._tokenizer.decode(list(token_ids[start:place]))
                texts[start:place] = [whole, *[""] * (place - start - 1)]
                start = None
        return texts
