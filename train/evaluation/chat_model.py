"""Any model behind an OpenAI-compatible chat endpoint, asked as our own are."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tercet.core.data.vision import data_uri
from tercet.core.prompts import IMAGE_MARKER
from tercet.core.tool_config import ChatConfig
from tercet.rollout.at_once import at_once
from tercet.rollout.chat import photo_item
from tercet.rollout.engine import Sampling, sample_seed
from tercet.rollout.exchange import check_address
from tercet.rollout.judge import Judge
from tercet.rollout.launch import read_api_key
from tercet.rollout.server import ServerError
from tercet.train.evaluation.answer_file import Answer
from tercet.train.evaluation.asking import Asked, request_id
from tercet.train.evaluation.questions import shown_in
from tercet.train.evaluation.styles import Wording

UNFIT = (400, 413, 422)
"""Statuses that can be about one question, such as a photo that a filter refuses."""
REFUSED = "refused"
"""Why such an answer ended: it is empty."""
JUDGE_TOKENS = 256
"""Longest reply of a judge at the first attempt; one that is cut off gets eight times as many."""
SEED_BITS = 31
"""Of the seeds that endpoints take."""


@dataclass
class ChatAsker:
    """An endpoint with everything that an answer depends on."""

    endpoint: Judge
    wording: Wording
    sampling: Sampling
    system_prompt: str | None = None
    seed: int = 0
    concurrency: int = 16
    answered: bool = False
    """Whether any answer came: only then a refusal is about its question."""

    async def answers(self, wanted: Sequence[Asked]) -> AsyncIterator[Answer]:
        """Yield each answer as soon as it is there, in any order.

        Raises:
            ServerError: the endpoint is down for too long, gives bad replies, or refuses questions
                before it has answered one.
        """
        async for answer in at_once(wanted, self.concurrency, self._answer):
            yield answer

    async def _answer(self, asked: Asked) -> Answer:
        turns, photos = self.wording.turns(shown_in(asked.question, asked.order), asked.mode)
        if self.system_prompt is not None:
            turns = [{"role": "system", "content": self.system_prompt}, *turns]
        seed = None
        if self.sampling.temperature:
            drawn = sample_seed(self.seed, asked.trial, request_id(asked), 0)
            seed = drawn % (1 << SEED_BITS)
        try:
            said = await self.endpoint.chat(
                chat_messages(turns, photos),
                temperature=self.sampling.temperature,
                seed=seed,
                max_tokens=self.sampling.max_tokens,
            )
        except ServerError as error:
            if error.status not in UNFIT or not self.answered:
                raise
            text, finish = "", REFUSED
        else:
            self.answered, text, finish = True, said.text, said.reason or ""
        return Answer(*asked.key[:-1], text, asked.question.path, finish, asked.order)


def open_endpoint(config: ChatConfig, option: str, cache: Path | None = None) -> Judge:
    """The client of an endpoint; answers are kept in the file `cache`, if there is one.

    Raises:
        ValueError: naming the option, for an address or a key that cannot be used.
    """
    return Judge(
        check_address(config.url, f"{option}.url"),
        config.model,
        api_key=read_api_key(config.api_key_file, f"{option}.api_key_file"),
        concurrency=config.concurrency,
        timeout_s=config.timeout_s,
        patience_s=config.patience_s,
        max_tokens=JUDGE_TOKENS,
        cache=cache,
    )


def chat_messages(turns: Sequence[dict[str, str]], photos: Sequence[str]) -> list[dict]:
    """Messages of OpenAI's API: each `<image>` becomes the next photo.

    Args:
        turns: {"role", "content"} with one `<image>` for each photo.
        photos: their keys, in order.
    """
    left, messages = iter(photos), []
    for turn in turns:
        first, *others = turn["content"].split(IMAGE_MARKER)
        content: list[dict] = [{"type": "text", "text": first}] if first else []
        for text in others:
            content.append(photo_item(data_uri(next(left))))
            content += [{"type": "text", "text": text}] if text else []
        messages.append({"role": turn["role"], "content": content if others else first})
    return messages
