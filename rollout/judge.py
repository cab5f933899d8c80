"""A judge: an OpenAI-compatible chat endpoint that looks at photos and answers or gives a score.

SGLang and vLLM serve such an endpoint for any multimodal model. Answers are cached in a file, so
that no question is asked twice, in this run or the next.
"""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import httpx

from tercet.core.data.vision import data_uri
from tercet.core.weighted_reward import PartFailed
from tercet.rollout.endpoint import BYTES_A_TOKEN, TRIES, SharedSession, bearer, pause
from tercet.rollout.exchange import SMALL_BYTES, Again, BadReply, Refused, check_address, exchange
from tercet.rollout.replies import Chat, read
from tercet.rollout.server import ServerError

MOST_DOUBLINGS = 6
"""Of the first pause, 0.5 s: the longest one is 32 s."""
GROWTH = 8
"""An answer that was cut off is asked for once more, with this many times the tokens."""
RESPONSE_CHARS = 100_000
"""Longer responses are cut before they are judged."""
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
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


@dataclass(frozen=True)
class _Answer:
    text: str
    reason: str | None
    """Why it ended; None: the endpoint does not say."""

    @property
    def is_whole(self) -> bool:
        return self.reason in (None, "stop")


class Judge:
    """Client of one endpoint.

    Args:
        url: base address, ending in /v1.
        model: name of the model that the endpoint serves.
        api_key: sent when given.
        concurrency: most questions in flight.
        timeout_s: longest that one answer may take, from connecting to its last byte.
        patience_s: how long to wait for an endpoint that is down.
        max_tokens: longest answer at the first attempt.
        cache: file that keeps the answers; None: they are kept in memory.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        concurrency: int = 16,
        timeout_s: float = 120.0,
        patience_s: float = 600.0,
        max_tokens: int = 16,
        cache: str | Path | None = None,
    ):
        self._url, self._model = check_address(url, "judge"), model
        self._timeout_s, self._patience_s, self._max_tokens = timeout_s, patience_s, max_tokens
        self._shared = SharedSession(concurrency, bearer(api_key))
        self._cache_path = cache or ":memory:"
        try:
            self._cache = sqlite3.connect(self._cache_path, timeout=30.0, isolation_level=None)
        except sqlite3.Error as error:
            raise self._cache_error(error) from None
        self._in_cache("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT)")

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

    def close(self) -> None:
        """Close the cache."""
        self._cache.close()

    async def _ask(self, question: str, images: Sequence[str]) -> _Answer:
        photos = [{"type": "image_url", "image_url": {"url": data_uri(i)}} for i in images]
        content = [*photos, {"type": "text", "text": question}]
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0.0,
            "max_tokens": self._max_tokens,
        }
        # The last word tells them from answers that were kept before they were checked.
        text = json.dumps([self._url, body, "whole"])
        key = blake2b(text.encode(), digest_size=16).hexdigest()
        if kept := self._in_cache("SELECT text FROM answers WHERE key = ?", key):
            return _Answer(kept[0][0], "stop")
        async with self._shared.use() as session, session.places:
            answer = await self._answer(session.client, body)
            if answer.reason == "length":
                body["max_tokens"] = GROWTH * self._max_tokens
                try:
                    answer = await self._answer(session.client, body)
                except ServerError as error:
                    if error.status is None:
                        raise
                    # More tokens than the endpoint gives: the first answer stands.
        if answer.is_whole and answer.text:
            self._in_cache("INSERT OR REPLACE INTO answers VALUES (?, ?)", key, answer.text)
        return answer

    async def _answer(self, client: httpx.AsyncClient, body: dict) -> _Answer:
        """One answer; waits for an endpoint that is down, and asks again for one that is bad."""
        url, deadline = f"{self._url}/chat/completions", time.monotonic() + self._patience_s
        attempt = bad = 0
        while True:
            try:
                seconds, most = self._timeout_s, SMALL_BYTES + BYTES_A_TOKEN * body["max_tokens"]
                reply = await exchange(client, "POST", url, body, seconds=seconds, most_bytes=most)
                return _read_answer(reply.content)
            except BadReply as error:
                bad, reason = bad + 1, str(error)
            except (Again, httpx.TransportError) as error:
                reason = f"{type(error).__name__}: {error}"
            except Refused as error:
                raise ServerError(f"judge: {error}", error.status) from None
            if bad == TRIES:
                raise ServerError(f"judge {self._url}: {TRIES} bad answers, the last one: {reason}")
            if time.monotonic() > deadline:
                raise ServerError(
                    f"judge {self._url}: no answer in {self._patience_s:.0f} s: {reason}"
                )
            await pause(min(attempt, MOST_DOUBLINGS))
            attempt += 1

    def _in_cache(self, command: str, *values: str) -> list[tuple]:
        try:
            return self._cache.execute(command, values).fetchall()
        except sqlite3.Error as error:
            raise self._cache_error(error) from None

    def _cache_error(self, error: sqlite3.Error) -> ValueError:
        return ValueError(f"judge: the cache {self._cache_path} cannot be used: {error}")


def _read_answer(content: bytes) -> _Answer:
    """The answer in a reply; raises Again where there is none."""
    choice = read(Chat, content).choices[0]
    answer = _Answer(choice.message.content or "", choice.finish_reason)
    if answer.is_whole and choice.message.content is None:
        raise BadReply("an answer without text")
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
        asked = [_score(judge, template, row, 0.0, 100.0) for row in rows]
        scores = await asyncio.gather(*asked, return_exceptions=True)
        for score in scores:
            if isinstance(score, BaseException) and not isinstance(score, ServerError):
                raise score
            if score is None or isinstance(score, ServerError):
                raise PartFailed(f"the judge gave no score: {score}")
        return scores

    return part


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
