"""The logged groups of a run as the page shows them: all in brief, some of them whole."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from statistics import fmean, pstdev

from tercet.core.draws import seeded_order
from tercet.core.names import names_in, normal_form
from tercet.core.prompts import extract_answer
from tercet.core.rewards import is_correct
from tercet.train.logs.group_files import read_groups
from tercet.train.page.runs import Run

PERIODS, PAIRS = 8, 60
"""Periods that confusion is shown over; pairs of sub-categories shown."""
ROLES = ("anchor", "positive", "negative")
ROWS = ("logprobs", "neg_logprobs", "old_logprobs", "rollout_logprobs")


@dataclass(frozen=True)
class Brief:
    """A group in brief: what choosing and counting need."""

    step: int
    id: str
    anchor: str
    super_category: str
    truth: str
    right: float | None
    """Share of right answers; None: the reward function does not tell."""
    reward: float
    spread: float
    """Standard deviation of the rewards."""
    responses: int
    said: tuple[str, ...]
    """Of each response the known names that it holds and that are not the true one."""


class LoggedGroups:
    """The groups that a run has logged; files are read again when they have changed.

    Args:
        run: whose they are; what cannot be read is added to its problems.
    """

    def __init__(self, run: Run):
        self._run = run
        self._files: dict[int, tuple[tuple[int, int], list[Brief]]] = {}
        self.photos: dict[str, str] = {}
        """Image keys by the photo's name on the page."""
        for step in run.group_files:
            self.read(step)

    def refresh(self, run: Run) -> None:
        """Read what has been written since."""
        self._run = run
        self._files = {
            step: known for step, known in self._files.items() if step in run.group_files
        }
        for step, file in run.group_files.items():
            if step not in self._files or self._files[step][0] != _stamp(file):
                self.read(step)

    @property
    def briefs(self) -> list[Brief]:
        return [brief for step in sorted(self._files) for brief in self._files[step][1]]

    @property
    def steps(self) -> list[int]:
        return sorted(self._files)

    def read(self, step: int) -> list[dict]:
        """The groups of a step, whole, as the page takes them."""
        file = self._run.group_files[step]
        stamp = _stamp(file)
        lines, problem = read_groups(file)
        found = []
        for number, line in enumerate(lines, 1):
            try:
                found.append(self._page_group(line))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                problem = f"{file.name}, line {number}: not a group ({error!r})"
        if problem and problem not in self._run.problems:
            self._run.problems.append(problem)
        self._files[step] = (stamp, [brief_of(group) for group in found])
        return found

    def lost(self) -> set[tuple[int, str]]:
        """(step, id) of groups all wrong now whose anchor had a right answer at an earlier step."""
        once, found = set(), set()
        for brief in self.briefs:
            if brief.right == 0 and brief.anchor in once:
                found.add((brief.step, brief.id))
            if brief.right:
                once.add(brief.anchor)
        return found

    def _page_group(self, line: dict) -> dict:
        known = self._run.names.get(line["super_category"], [line["names"]["anchor"]])
        group = {
            "step": int(line["step"]),
            "id": str(line["id"]),
            "anchor": str(line["photos"]["anchor"]),
            "super": str(line["super_category"]),
            "question": str(line["question"]),
            "kept": bool(line["kept"]),
            "why": str(line["why"]),
            "names": {role: str(line["names"][role]) for role in ROLES},
            "photos": {role: self._photo(line["photos"][role]) for role in ROLES},
            "responses": [_page_response(response, known) for response in line["responses"]],
        }
        if not group["responses"]:
            raise ValueError("no responses")
        return group

    def _photo(self, key: str) -> str:
        root = self._run.root or self._run.folder.absolute()
        whole = os.path.normpath(root / key)
        name = blake2b(whole.encode(errors="surrogateescape"), digest_size=8).hexdigest()
        self.photos[name] = whole
        return name


def _page_response(response: dict, known: Sequence[str]) -> dict:
    metrics = {str(name): float(value) for name, value in response["metrics"].items()}
    text = str(response["text"])
    answer = extract_answer(text, "first")
    return {
        "role": str(response["role"]),
        "text": text,
        "tokens": [str(token) for token in response["tokens"]],
        "reward": _finite(response["reward"]),
        "metrics": metrics,
        "advantage": None if response["advantage"] is None else _finite(response["advantage"]),
        "finish": str(response["finish_reason"]),
        "correct": is_correct(metrics) if "accuracy" in metrics else None,
        "said": names_in(text if answer is None else answer, known),
        **{name: response[name] for name in ROWS if isinstance(response[name], str)},
    }


def _finite(value: float) -> float:
    if not math.isfinite(value := float(value)):
        raise ValueError(f"{value} is not finite")
    return value


def brief_of(group: dict) -> Brief:
    """A group of the page in brief."""
    responses, truth = group["responses"], group["names"]["anchor"]
    marks = [response["correct"] for response in responses]
    rewards = [response["reward"] for response in responses]
    wrong = [n for r in responses for n in r["said"] if normal_form(n) != normal_form(truth)]
    return Brief(
        group["step"],
        group["id"],
        group["anchor"],
        group["super"],
        truth,
        None if None in marks else fmean(marks),
        fmean(rewards),
        pstdev(rewards),
        len(responses),
        tuple(wrong),
    )


def chosen(briefs: Iterable[Brief], seed: int) -> dict[int, list[str]]:
    """Ids by step of the groups that a page shows: best, worst, most disputed, one by the seed."""
    by_step: dict[int, list[Brief]] = {}
    for brief in briefs:
        by_step.setdefault(brief.step, []).append(brief)
    found = {}
    for step, of_step in by_step.items():
        ids = {
            max(of_step, key=lambda b: (b.reward, b.id)).id: None,
            min(of_step, key=lambda b: (b.reward, b.id)).id: None,
            max(of_step, key=lambda b: (b.spread, b.id)).id: None,
            seeded_order((b.id for b in of_step), seed, "report", step)[0]: None,
        }
        found[step] = [*ids]
    return found


def spread_out(steps: Sequence[int]) -> list[int]:
    """Steps in an order whose every beginning is spread over all of them: last, first, middle."""
    steps, found = sorted(steps), {}
    stride = max(1, len(steps) - 1)
    while len(found) < len(steps):
        found |= dict.fromkeys(steps[::-stride])
        stride = max(1, stride // 2)
    return [*found]


def confusion(briefs: Sequence[Brief]) -> dict:
    """How often a name was said for another one, over periods of the logged steps.

    Returns:
        `periods`: (first step, last step) of each; `pairs`: of those said most often, `super`,
        `truth`, `said`, how often in all, and in each period as a share of the responses about the
        truth (None: there are none).
    """
    steps = sorted({brief.step for brief in briefs})
    count = min(PERIODS, len(steps))
    bounds = [steps[len(steps) * k // count] for k in range(count)] if count else []
    of_step = {step: sum(step >= bound for bound in bounds) - 1 for step in steps}
    pairs: dict[tuple[str, str, str], Counter[int]] = {}
    asked: dict[tuple[str, str], Counter[int]] = {}
    for brief in briefs:
        period = of_step[brief.step]
        truth = (brief.super_category, brief.truth)
        asked.setdefault(truth, Counter())[period] += brief.responses
        for said in brief.said:
            pairs.setdefault((*truth, said), Counter())[period] += 1
    most = sorted(pairs, key=lambda pair: (-pairs[pair].total(), pair))[:PAIRS]
    last = [steps[len(steps) * (k + 1) // count - 1] for k in range(count)]
    return {
        "periods": [*zip(bounds, last, strict=True)],
        "pairs": [
            {
                "super": pair[0],
                "truth": pair[1],
                "said": pair[2],
                "total": pairs[pair].total(),
                "shares": [
                    pairs[pair][k] / asked[pair[:2]][k] if asked[pair[:2]][k] else None
                    for k in range(count)
                ],
            }
            for pair in most
        ],
    }


def _stamp(file: Path) -> tuple[int, int]:
    """Tells whether a file has changed; zeros where it was thinned out meanwhile."""
    try:
        found = file.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size
