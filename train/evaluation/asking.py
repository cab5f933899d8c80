"""Questions to a model: prompts, requests to an engine, and answers as they come."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from tercet.core.prompts import (
    answer_opening,
    chat_ids,
    closed_world_text,
    open_world_text,
    stage2_text,
)
from tercet.core.types import EvalQuestion, PolicyParts, Request
from tercet.rollout.engine import Engine, Sampling
from tercet.train.evaluation.answer_file import Answer, Mode

AT_ONCE = 2048
"""Requests that an engine is given at once: they and their random numbers are in memory."""

PROMPTS: dict[str, Callable[[EvalQuestion], str]] = {
    "stage2": lambda q: stage2_text(q.question),
    "open_world": lambda q: open_world_text(q.question),
    "closed_world": lambda q: closed_world_text(q.question, list(q.options)),
}
Prompt = Literal["stage2", "open_world", "closed_world"]


@dataclass(frozen=True)
class Asked:
    """One answer that is wanted."""

    question: EvalQuestion
    mode: Mode
    trial: int = 0

    @property
    def key(self) -> tuple[str, int, Mode, int]:
        """As that of its `Answer`."""
        return self.question.file, self.question.line, self.mode, self.trial


def every_answer(
    questions: Iterable[EvalQuestion], modes: Sequence[Mode], trials: int
) -> list[Asked]:
    """All answers that are wanted, those about one photo in a row."""
    return [Asked(q, mode, trial) for q in questions for mode in modes for trial in range(trials)]


@dataclass(frozen=True)
class Asker:
    """An engine with everything that a prompt depends on."""

    engine: Engine
    parts: PolicyParts
    prompts: dict[Mode, Prompt]
    """Wording in each mode."""
    sampling: Sampling
    system_prompt: str | None = None
    seed: int = 0

    async def answers(self, wanted: Sequence[Asked]) -> AsyncIterator[Answer]:
        """Yield each answer as soon as it is there, in any order."""
        for start in range(0, len(wanted), AT_ONCE):
            part = wanted[start : start + AT_ONCE]
            by_id = {_id(asked): asked for asked in part}
            requests = [self._request(asked) for asked in part]
            tokenizer = self.parts.tokenizer
            openings = {r.id: answer_opening(tokenizer, r.prompt_ids) for r in requests}
            async for completion in self.engine.generate(requests, self.sampling):
                asked = by_id[completion.request_id]
                text = openings[completion.request_id]
                text += tokenizer.decode(completion.token_ids, skip_special_tokens=True)
                yield Answer(*asked.key, text, asked.question.path, completion.finish_reason)

    def _request(self, asked: Asked) -> Request:
        question = asked.question
        text = PROMPTS[self.prompts[asked.mode]](question)
        ids = chat_ids(
            self.parts.tokenizer,
            [{"role": "user", "content": "<image>" + text}],
            1,
            system_prompt=self.system_prompt,
        )
        # One group a question: a server computes its photo once for all prompts.
        group = f"{question.file}/{question.line}"
        return Request(
            _id(asked), group, tuple(ids), (question.image,), n=1, seed=self.seed, step=asked.trial
        )


def _id(asked: Asked) -> str:
    return "/".join(map(str, asked.key))
