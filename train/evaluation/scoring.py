"""Answers to scores, and scores to cells: a figure with its interval."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np

from tercet.core.names import names_in
from tercet.core.prompts import extract_answer
from tercet.core.types import EvalQuestion
from tercet.train.evaluation.answer_file import Answer, Mode
from tercet.train.evaluation.error_kinds import error_kind
from tercet.train.evaluation.intervals import bootstrap, standard_error, wilson
from tercet.train.evaluation.metrics import (
    closed_world_correct,
    closed_world_exact,
    open_world_exact,
    open_world_included,
    options_named,
    relative_similarity,
    released_answer,
    released_word,
)
from tercet.train.evaluation.questions import Questions, shown_in
from tercet.train.evaluation.styles import STYLES, Style, scored_text
from tercet.train.evaluation.text_similarity import Embeddings

Item = TypeVar("Item")
DomainWords = Literal["released", "super_category"]
SCORES: dict[str, Mode] = {
    "closed": "closed",
    "closed_strict": "closed",
    "similarity": "open",
    "inclusion": "open",
    "inclusion_strict": "open",
}
"""Every score, in the order of the tables, and the mode whose answers have it."""


@dataclass
class Scored:
    """An answer with its scores; also a question that got none and counts as wrong."""

    question: EvalQuestion
    answer: Answer
    missing: bool = False
    """Nothing was asked: its photo is missing."""
    text: str = ""
    """Its output as the rules read it (see `scored_text`)."""
    named: list[str] = field(default_factory=list)
    """Known names in the answer: options in closed mode, names of the data set in open mode."""
    scores: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    """Kind of error, a key of KINDS; None where it is right or was not asked."""

    @property
    def shown(self) -> tuple[str, ...]:
        """The options in the order of the prompt."""
        return shown_in(self.question, self.answer.order).options


def domain_word(question: EvalQuestion, words: DomainWords) -> tuple[str, bool]:
    """The word for a question's super-category, and whether the rule for cars' names applies."""
    if words == "released":
        word = released_word(question.path)
        return word, word == "car"
    return question.super_category or "object", question.super_category in ("car", "cars")


def score_all(
    answers: Sequence[Answer],
    questions: Questions,
    *,
    words: DomainWords = "released",
    missing_are_wrong: bool = False,
    style: Style = STYLES["released"],
) -> list[Scored]:
    """Score answers in everything but similarity, in the order of the questions.

    Args:
        answers: to these questions.
        questions: with the known names.
        words: where the word for the super-category comes from.
        missing_are_wrong: questions without an answer score 0, in every mode and trial that other
            answers of their file have.
        style: of the prompts.
    """
    place = {(q.file, q.line): n for n, q in enumerate(questions.all)}
    scored = [Scored(questions.all[place[a.file, a.line]], a) for a in answers]
    if missing_are_wrong:
        scored += [Scored(*pair, missing=True) for pair in _unanswered(answers, questions)]
    scored.sort(key=lambda s: (place[s.answer.file, s.answer.line], *s.answer.key[2:]))
    for s in scored:
        s.text = scored_text(s.answer.output, s.shown if s.answer.mode == "closed" else (), style)
        if s.missing:
            of_mode = [name for name, mode in SCORES.items() if mode == s.answer.mode]
            s.scores = {name: 0.0 for name in of_mode if name != "similarity"}
        elif s.answer.mode == "closed":
            _score_closed(s)
        else:
            _score_open(s, questions.names[s.question.dataset], words)
    return scored


def _unanswered(
    answers: Iterable[Answer], questions: Questions
) -> list[tuple[EvalQuestion, Answer]]:
    known, kinds = {a.key[:4] for a in answers}, defaultdict(set)
    for file, _, mode, trial in known:
        kinds[file].add((mode, trial))
    wanted = [
        (q, Answer(q.file, q.line, mode, trial, "", q.path))
        for q in questions.all
        for mode, trial in kinds[q.file]
    ]
    return [(q, a) for q, a in wanted if a.key[:4] not in known]


def _score_closed(s: Scored) -> None:
    output, q = s.text, s.question
    s.named = options_named(extract_answer(output, "longest") or "", s.shown)
    s.scores = {
        "closed": float(closed_world_correct(output, q.truth)),
        "closed_strict": float(closed_world_exact(output, q.truth, s.shown)),
    }
    s.error = error_kind(output, s.answer.finish, q.truth, s.shown)


def _score_open(s: Scored, names: tuple[str, ...], words: DomainWords) -> None:
    output, q = s.text, s.question
    _, cars = domain_word(q, words)
    s.named = names_in(extract_answer(output, "longest") or "", names)
    s.scores = {
        "inclusion": float(open_world_included(output, q.truth, cars)),
        "inclusion_strict": float(open_world_exact(output, q.truth, names)),
    }
    s.error = error_kind(output, s.answer.finish, q.truth, names, cars)


def add_similarity(scored: Sequence[Scored], words: DomainWords, embeddings: Embeddings) -> None:
    """Give open-world answers their similarity; questions that got none have 0."""
    asked = [s for s in scored if s.answer.mode == "open"]
    said = [released_answer(s.text) for s in asked]
    truths = [s.question.truth for s in asked]
    supers = [domain_word(s.question, words)[0] for s in asked]
    embeddings.add([*supers, *truths, *said])
    found = relative_similarity(
        embeddings.similarities(said, truths), embeddings.similarities(supers, truths)
    )
    for s, value in zip(asked, found.tolist(), strict=True):
        s.scores["similarity"] = 0.0 if s.missing else value


@dataclass(frozen=True)
class Cell:
    """A figure in percent with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int
    """Questions."""
    trials: int
    error: float | None
    """Standard error of the mean over trials; None for a single one."""


def cell(scored: Sequence[Scored], score: str) -> Cell | None:
    """Mean of a score: that of the trials' means; None where no answer has it.

    A question that was asked with its options in several orders counts by the mean over them.

    The interval is Wilson's for a share and bootstrapped for the similarity, over the questions.
    """
    by_question, by_trial = defaultdict(list), defaultdict(lambda: defaultdict(list))
    for s in scored:
        if (value := s.scores.get(score)) is not None:
            question = s.answer.file, s.answer.line
            by_question[question].append(value)
            by_trial[s.answer.trial][question].append(value)
    if not by_question:
        return None
    trials = [float(np.mean([sum(v) / len(v) for v in of.values()])) for of in by_trial.values()]
    value, n = float(np.mean(trials)), len(by_question)
    if score == "similarity":
        low, high = bootstrap([float(np.mean(values)) for values in by_question.values()])
    else:
        low, high = wilson(value, n)
    error = standard_error(trials)
    return Cell(
        100 * value, 100 * low, 100 * high, n, len(trials), None if error is None else 100 * error
    )


def grouped(
    items: Iterable[Item], key: Callable[[Item], tuple[str, ...]]
) -> Mapping[tuple[str, ...], list[Item]]:
    """Scored answers, or the like, by a key, in the order in which the keys come first."""
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups
