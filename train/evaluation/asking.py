"""Questions to a model: prompts, requests to an engine, and answers as they come."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass

from tercet.core.prompts import answer_opening, chat_ids
from tercet.core.types import EvalQuestion, PolicyParts, Request
from tercet.rollout.engine import Engine, Sampling
from tercet.train.evaluation.answer_file import Answer, Key, Mode
from tercet.train.evaluation.questions import OptionOrder, Order, orders_of, shown_in
from tercet.train.evaluation.styles import Wording

AT_ONCE = 2048
"""Requests that an engine is given at once: they and their random numbers are in memory."""


@dataclass(frozen=True)
class Asked:
    """One answer that is wanted."""

    question: EvalQuestion
    mode: Mode
    trial: int = 0
    order: Order = ()

    @property
    def key(self) -> Key:
        """As that of its `Answer`."""
        return self.question.file, self.question.line, self.mode, self.trial, self.order


def every_answer(
    questions: Iterable[EvalQuestion],
    modes: Sequence[Mode],
    trials: int,
    options: OptionOrder = "released",
    seed: int = 0,
) -> list[Asked]:
    """All answers that are wanted, those about one photo in a row (see `orders_of`)."""
    return [
        Asked(q, mode, trial, order)
        for q in questions
        for mode in modes
        for trial in range(trials)
        for order in (orders_of(q, options, seed) if mode == "closed" else [()])
    ]


@dataclass(frozen=True)
class Asker:
    """An engine with everything that a prompt depends on."""

    engine: Engine
    parts: PolicyParts
    wording: Wording
    sampling: Sampling
    system_prompt: str | None = None
    seed: int = 0

    async def answers(self, wanted: Sequence[Asked]) -> AsyncIterator[Answer]:
        """Yield each answer as soon as it is there, in any order."""
        for start in range(0, len(wanted), AT_ONCE):
            part = wanted[start : start + AT_ONCE]
            by_id = {request_id(asked): asked for asked in part}
            requests = [self._request(asked) for asked in part]
            tokenizer = self.parts.tokenizer
            openings = {r.id: answer_opening(tokenizer, r.prompt_ids) for r in requests}
            async for completion in self.engine.generate(requests, self.sampling):
                asked = by_id[completion.request_id]
                text = openings[completion.request_id]
                text += tokenizer.decode(completion.token_ids, skip_special_tokens=True)
                about = (asked.question.path, completion.finish_reason, asked.order)
                yield Answer(*asked.key[:-1], text, *about)

    def _request(self, asked: Asked) -> Request:
        question = shown_in(asked.question, asked.order)
        turns, photos = self.wording.turns(question, asked.mode)
        ids = chat_ids(self.parts.tokenizer, turns, len(photos), system_prompt=self.system_prompt)
        # One group a question: a server computes its photo once for all prompts.
        group = f"{question.file}/{question.line}"
        name = request_id(asked)
        return Request(name, group, tuple(ids), photos, n=1, seed=self.seed, step=asked.trial)


def request_id(asked: Asked) -> str:
    """Name of a request; seeds are drawn from it."""
    return "/".join(map(str, (*asked.key[:-1], *asked.order)))
