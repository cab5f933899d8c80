"""A judge: an OpenAI-compatible chat endpoint that looks at photos and answers or gives a score.

SGLang and vLLM serve such an endpoint for any multimodal model. Answers are cached in a file, so
that no question is asked twice, in this run or the next.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from hashlib import blake2b

from tercet.core.data.vision import data_uri
from tercet.core.prompts import extract_answer
from tercet.core.rewards import SPECIFICITY, best_of_rollouts
from tercet.core.weighted_reward import PartFailed
from tercet.rollout.chat import ANSWERED, Answer, ChatClient, content_of
from tercet.rollout.server import ServerError

GROWTH = 8
"""An answer that was cut off is asked for once more, with this many times the tokens."""
RESPONSE_CHARS = 100_000
"""Longer responses are cut before they are judged."""
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_CATEGORY = re.compile("|".join(SPECIFICITY))  # `specific` stands behind `more specific`
_OF = re.compile(r"\s*(?:/|out of)\s*")


def read_number(text: str, low: float = 0.0, high: float = 100.0) -> float | None:
    """The score in an answer: `85`, `Score: 85`, `85/100`, `85 out of 100`.

    Thoughts before `</think>` do not count. The time is linear in the text.

    Args:
        text: the judge's answer.
        low, high: allowed range.

    Returns:
        The number before `/ high` or `out of high`, else the last number; None without a number,
        with one outside the range, or where a thought does not end.
    """
    text = text.rpartition("</think>")[2]
    if "<think>" in text:
        return None
    found = ""
    for number in _NUMBER.finditer(text):
        found = number[0]
        of = _OF.match(text, number.end())
        if of and (top := _NUMBER.match(text, of.end())) and _same(top[0], high):
            break
    return float(found) if found and low <= float(found) <= high else None


def _same(digits: str, number: float) -> bool:
    return len(digits) < 20 and float(digits) == number


class Judge(ChatClient):
    """Client of one endpoint whose most likely answers are scores.

    Args:
        url: base address, ending in /v1.
        model: name of the model that the endpoint serves.
        max_tokens: longest answer at the first attempt.
        options: of ChatClient.
    """

    def __init__(self, url: str, model: str, *, max_tokens: int = 16, **options):
        super().__init__(url, model, what="judge", **options)
        self._max_tokens = max_tokens

    async def ask(self, question: str, images: Sequence[str] = ()) -> str:
        """The most likely answer to a question about photos.

        Args:
            question: text that follows the photos.
            images: image keys (see core.data.vision.load_image).

        Raises:
            ServerError: the endpoint refuses the question, is down for longer than patience_s, or
                gives no answer that can be read in TRIES attempts.
        """
        return (await self._ask(question, images)).text

    async def score(
        self, question: str, images: Sequence[str] = (), low: float = 0.0, high: float = 100.0
    ) -> float | None:
        """The number in the answer, in [low, high]; None without one (see `read_number`)."""
        answer = await self._ask(question, images)
        return read_number(answer.text, low, high) if answer.is_whole else None

    async def _ask(self, question: str, images: Sequence[str]) -> Answer:
        content = content_of(question, [data_uri(image) for image in images])
        return await self.chat([{"role": "user", "content": content}])

    async def chat(
        self,
        messages: Sequence[dict],
        *,
        temperature: float = 0.0,
        seed: int | None = None,
        max_tokens: int | None = None,
    ) -> Answer:
        """The answer to a conversation.

        Args:
            messages: in the form of OpenAI's API.
            temperature, seed: of sampling; the seed is sent where there is one.
            max_tokens: longest answer; None: the judge's own, and more where that cuts it off.

        Raises:
            ServerError: as `ask`.
        """
        body = {
            "model": self._model,
            "messages": list(messages),
            "temperature": temperature,
            "max_tokens": max_tokens or self._max_tokens,
            **({} if seed is None else {"seed": seed}),
        }
        # The last word tells them from answers that were kept before they were checked.
        text = json.dumps([self._url, body, "whole"])
        key = blake2b(text.encode(), digest_size=16).hexdigest()
        if kept := self._in_cache("SELECT text FROM answers WHERE key = ?", key):
            return Answer(kept[0][0], "stop")
        async with self._shared.use() as session, session.places:
            answer = await self._answer(session.client, body)
            if answer.reason == "length" and max_tokens is None:
                body["max_tokens"] = GROWTH * self._max_tokens
                try:
                    answer = await self._answer(session.client, body)
                except ServerError as error:
                    if error.status in (None, ANSWERED):
                        raise
                    # More tokens than the endpoint gives: the first answer stands.
        if answer.is_whole and answer.text:
            self._in_cache("INSERT OR REPLACE INTO answers VALUES (?, ?)", key, answer.text)
        return answer


def judged(
    judge: Judge, template: str, *, low: float = 0.0, high: float = 100.0
) -> Callable[[list[dict]], Awaitable[list[dict]]]:
    """A reward function that asks a judge about every response.

    Args:
        judge: the judge to ask.
        template: question with placeholders {question}, {response} and {ground_truth}.
        low, high: range of the judge's scores.

    Returns:
        A coroutine function from rows to results (see core.rewards): `overall` is the score scaled
        to [0, 1], and `unreadable` is 1 where the answer holds no score. `overall` is then 0 for
        all rows, so that the group, whose rewards cannot be compared, teaches nothing.
    """

    async def reward(rows: list[dict]) -> list[dict]:
        asked = [_score(judge, template, row, low, high) for row in rows]
        scores = await asyncio.gather(*asked)
        whole = None not in scores
        return [
            {"overall": score if whole else 0.0, "unreadable": float(score is None)}
            for score in scores
        ]

    return reward


def judged_part(judge: Judge, template: str) -> Callable[[list[dict]], Awaitable[list[float]]]:
    """A part of a weighted reward: a judge's score of every response of a group.

    Args:
        judge: the judge to ask.
        template: question with placeholders {question}, {response} and {ground_truth}.

    Returns:
        A coroutine function from a group's rows to scores in [0, 1]. It raises PartFailed where the
        judge gives no answer, or none with a score in two attempts, for any of the responses.
    """

    async def part(rows: list[dict]) -> list[float]:
        return await _all_of([_score(judge, template, row, 0.0, 100.0) for row in rows])

    return part


def verified_part(judge: Judge, template: str) -> Callable[[list[dict]], Awaitable[list[float]]]:
    """A part of a weighted reward: which answers of a group are as specific as its best one.

    Args:
        judge: says how specific an answer is (see core.rewards.SPECIFICITY).
        template: question with placeholders {ground_truth} and {answer}.

    Returns:
        A coroutine function from a group's rows to 0 or 1 each (see `best_of_rollouts`). It raises
        PartFailed where the judge gives no answer, or none that can be read in two attempts.
    """

    async def part(rows: list[dict]) -> list[float]:
        answers = [extract_answer(row["response"], "first") or None for row in rows]
        pairs = [(row["ground_truth"], a) for row, a in zip(rows, answers, strict=True)]
        distinct = [pair for pair in dict.fromkeys(pairs) if pair[1]]
        found = await _all_of([_category(judge, template, *pair) for pair in distinct])
        categories = dict(zip(distinct, found, strict=True))
        return best_of_rollouts([categories.get(pair) for pair in pairs])

    return part


async def _all_of(asked: Sequence[Awaitable]) -> list:
    """What a judge says to several questions; PartFailed where it says nothing to one of them."""
    found = await asyncio.gather(*asked, return_exceptions=True)
    for value in found:
        if isinstance(value, BaseException) and not isinstance(value, ServerError):
            raise value
        if value is None or isinstance(value, ServerError):
            raise PartFailed(f"the judge gave no answer that can be read: {value}")
    return found


async def _category(judge: Judge, template: str, truth: str, answer: str) -> str | None:
    """How specific a judge finds an answer; None where it does not say in two attempts."""
    question = template.format(ground_truth=truth, answer=answer[:RESPONSE_CHARS])
    for again in ("", f"\n{', '.join(SPECIFICITY)}: say one of these."):
        said = (await judge.ask(question + again)).rpartition("</think>")[2].lower()
        if "<think>" not in said and (found := _CATEGORY.findall(said)):
            return found[-1]
    return None


async def _score(judge: Judge, template: str, row: dict, low: float, high: float) -> float | None:
    """A judge's score of a response, scaled to [0, 1]; None without one in two attempts."""
    fields = {name: row[name] for name in ("question", "ground_truth")}
    question = template.format(**fields, response=row["response"][:RESPONSE_CHARS])
    # Answers are kept: what is asked again is asked in other words.
    for again in ("", f"\nSay nothing but a number from {low:g} to {high:g}."):
        score = await judge.score(question + again, row["images"], low, high)
        if score is not None:
            return (score - low) / (high - low)
    return None
