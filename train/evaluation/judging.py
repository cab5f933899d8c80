"""The Reasoning-Answer protocol (ReFine-RFT): a judge scores each answer in three respects.

The protocol's prompt is not published: PROMPT is ours.
"""

from __future__ import annotations

import asyncio
import csv
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tercet.core.data.cells import table_of
from tercet.core.data.vision import data_uri
from tercet.rollout.at_once import at_once
from tercet.rollout.chat import photo_item
from tercet.rollout.judge import RESPONSE_CHARS, Judge
from tercet.train.evaluation.intervals import bootstrap
from tercet.train.evaluation.scoring import Scored, grouped

RESPECTS = {"accuracy": "RSC_A", "usefulness": "RSC_U", "obedience": "RSC_O"}
"""What is judged, and its name in the paper."""
PROMPT = (
    "You judge an answer to a question about the photo above.\n"
    "Question: {question}\n{options}Right answer: {truth}\n\n"
    "The answer to judge stands between the lines of equals signs.\n"
    "==========\n{response}\n==========\n\n"
    "Give three whole numbers from 0 to 100. accuracy: is the final answer the right one? "
    "usefulness: is the reasoning factual, relevant and helpful for the final answer? obedience: "
    "does the answer keep to the format and the options that it was asked for? Reply with one "
    "line and nothing else:\naccuracy: NUMBER, usefulness: NUMBER, obedience: NUMBER"
)
TEXT_ONLY = PROMPT.replace(" about the photo above", " about a photo that is not shown")
AGAIN = "\n\n(Attempt {attempt}: reply with that one line only, three numbers from 0 to 100.)"
ATTEMPTS = 3
"""How often a reply that cannot be read is asked for."""
REPLY_CHARS = 10_000
_LABELLED = re.compile(
    r"\b(accuracy|usefulness|obedience)\b[^\w\n-]{0,20}(-?\d{1,6}(?:\.\d{1,6})?)", re.IGNORECASE
)

Verdict = tuple[float, float, float]
"""Accuracy, usefulness and obedience, 0 to 100."""


def read_verdict(reply: str) -> Verdict | None:
    """The three scores in a judge's reply; None where they are not there, or not from 0 to 100.

    They stand behind their names in any order, each once, or alone: three whole numbers and no
    others. Thoughts before `</think>` do not count. The time is linear in the text.
    """
    text = reply[-REPLY_CHARS:].rpartition("</think>")[2]
    if "<think>" in text:
        return None
    for range_ in ("(0-100)", "(0–100)", "(0 to 100)"):
        text = text.replace(range_, "")
    found = [(name.lower(), float(number)) for name, number in _LABELLED.findall(text)]
    if not found:
        bare = re.findall(r"\d+", text)
        found = list(zip(RESPECTS, map(float, bare), strict=False)) if len(bare) == 3 else []
        if "-" in text:
            return None
    scores = dict(found)
    if len(found) != 3 or len(scores) != 3 or not all(0 <= x <= 100 for x in scores.values()):
        return None
    return tuple(scores[name] for name in RESPECTS)


@dataclass(frozen=True)
class Judged:
    """An answer with the judge's verdict; None where no reply could be read."""

    scored: Scored
    verdict: Verdict | None
    photo: bool
    """Whether the judge saw the photo."""


def judge_all(
    judge: Judge,
    scored: Sequence[Scored],
    concurrency: int,
    on_judged: Callable[[], None] = lambda: None,
) -> list[Judged]:
    """Ask about every answer; replies that cannot be read are asked for again.

    Args:
        judge: its cache keeps the replies.
        scored: answers that were asked for; a photo is shown where its file is there.
        concurrency: most questions in flight.
        on_judged: called for each.

    Raises:
        ServerError: the endpoint refuses, is down for too long, or gives no reply at all.
    """

    async def one(place: int) -> tuple[int, Judged]:
        return place, await _judge(judge, scored[place])

    async def every() -> dict[int, Judged]:
        found = {}
        async for place, judged in at_once(range(len(scored)), concurrency, one):
            found[place] = judged
            on_judged()
        return found

    found = asyncio.run(every())
    return [found[place] for place in range(len(scored))]


async def _judge(judge: Judge, s: Scored) -> Judged:
    shown = f"Options: {list(s.shown)}\n" if s.answer.mode == "closed" else ""
    image = s.question.image
    photo = os.path.isfile(table_of(image) or image)
    text = (PROMPT if photo else TEXT_ONLY).format(
        question=s.question.question,
        options=shown,
        truth=s.question.truth,
        response=s.answer.output[:RESPONSE_CHARS],
    )
    photos = [photo_item(data_uri(image))] if photo else []
    for attempt in range(1, ATTEMPTS + 1):
        asked = text + (AGAIN.format(attempt=attempt) if attempt > 1 else "")
        content = [*photos, {"type": "text", "text": asked}]
        said = await judge.chat([{"role": "user", "content": content}])
        if said.is_whole and (verdict := read_verdict(said.text)):
            return Judged(s, verdict, photo)
    return Judged(s, None, photo)


def means(judged: Sequence[Judged]) -> dict[str, tuple[float, float, float]]:
    """Mean and 95 % interval of each respect, over the verdicts that could be read."""
    rows = np.array([j.verdict for j in judged if j.verdict])
    if not len(rows):
        return {}
    return {
        name: (float(column.mean()), *bootstrap(column))
        for name, column in zip(RESPECTS.values(), rows.T, strict=True)
    }


def write_judged(judged: Sequence[Judged], folder: Path) -> None:
    """Write judged.jsonl, a line for each answer, and judge.csv, a row for each file and mode."""
    with open(folder / "judged.jsonl", "w", encoding="utf-8") as file:
        for j in judged:
            a = j.scored.answer
            line = {"file": a.file, "line": a.line, "mode": a.mode, "trial": a.trial}
            line |= {"order": a.order, "photo": j.photo}
            scores = zip(RESPECTS.values(), j.verdict or (None,) * 3, strict=True)
            file.write(json.dumps(line | dict(scores)) + "\n")
    names = [name + end for name in RESPECTS.values() for end in ("", "_low", "_high")]
    with open(folder / "judge.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["questions", "mode", "answers", "unreadable", *names])
        for (stem, mode), group in _groups(judged):
            figures = [f"{x:.4f}" for found in means(group).values() for x in found]
            unreadable = sum(j.verdict is None for j in group)
            writer.writerow([stem, mode, len(group), unreadable, *figures])


def _groups(judged: Sequence[Judged]):
    return grouped(judged, lambda j: (j.scored.answer.file, j.scored.answer.mode)).items()


def print_judged(judged: Sequence[Judged], judge: str, console: Console) -> None:
    """The same in the terminal."""
    unseen = sum(not j.photo for j in judged)
    caption = [f"judge: {judge}; 0 to 100; our wording of ReFine-RFT's Reasoning-Answer protocol"]
    if unseen:
        caption.append(f"{unseen:,} answers were judged without their photo")
    table = Table(caption="\n".join(caption), box=SIMPLE_HEAD)
    for name in ("questions", "mode"):
        table.add_column(name)
    for name in ("answers", "unreadable", *RESPECTS.values()):
        table.add_column(name, justify="right")
    for (stem, mode), group in _groups(judged):
        found = means(group).values()
        figures = [f"{mean:.1f} [{low:.1f}, {high:.1f}]" for mean, low, high in found]
        unreadable = sum(j.verdict is None for j in group)
        table.add_row(stem, mode, str(len(group)), str(unreadable), *figures)
    console.print(table)
