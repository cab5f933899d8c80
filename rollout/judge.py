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
from hashlib import blake2b
from pathlib import Path

import httpx

from tercet.core.data.vision import data_uri
from tercet.rollout.endpoint import Again, SharedSession, bearer, pause, refuse
from tercet.rollout.server import ServerError

MOST_DOUBLINGS = 6
"""Of the first pause, 0.5 s: the longest one is 32 s."""
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def read_number(text: str, low: float = 0.0, high: float = 100.0) -> float | None:
    """The score in an answer: `85`, `Score: 85`, `85/100`, `85 out of 100`.

    Args:
        text: the judge's answer.
        low, high: allowed range.

    Returns:
        The number before `/ high` or `out of high`, else the last number; None without a number, or
        with one outside the range.
    """
    of_all = re.search(rf"({_NUMBER.pattern})\s*(?:/|out of)\s*{high:g}\b", text)
    found = of_all.group(1) if of_all else (_NUMBER.findall(text) or [None])[-1]
    return float(found) if found is not None and low <= float(found) <= high else None


class Judge:
    """Client of one endpoint.

    Args:
        url: base address, ending in /v1.
        model: name of the model that the endpoint serves.
        api_key: sent when given.
        concurrency: most questions in flight.
        timeout_s: longest that one answer may take.
        patience_s: how long to wait for an endpoint that is down.
        max_tokens: longest answer.
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
        self._url, self._model = url.rstrip("/"), model
        self._patience_s, self._max_tokens = patience_s, max_tokens
        self._shared = SharedSession(timeout_s, concurrency, bearer(api_key))
        self._cache = sqlite3.connect(cache or ":memory:", timeout=30.0, isolation_level=None)
        self._cache.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT)")

    async def ask(self, question: str, images: Sequence[str] = ()) -> str:
        """The most likely answer to a question about photos.

        Args:
            question: text that follows the photos.
            images: image keys (see core.data.vision.load_image).

        Raises:
            ServerError: the endpoint refuses the question, or is down for longer than patience_s.
        """
        photos = [{"type": "image_url", "image_url": {"url": data_uri(i)}} for i in images]
        content = [*photos, {"type": "text", "text": question}]
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0.0,
            "max_tokens": self._max_tokens,
        }
        key = blake2b(json.dumps([self._url, body]).encode(), digest_size=16).hexdigest()
        kept = self._cache.execute("SELECT text FROM answers WHERE key = ?", (key,)).fetchone()
        if kept:
            return kept[0]
        async with self._shared.use() as session, session.places:
            text = await self._answer(session.client, body)
        self._cache.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, text))
        return text

    async def score(
        self, question: str, images: Sequence[str] = (), low: float = 0.0, high: float = 100.0
    ) -> float | None:
        """The number in the answer, in [low, high]; None without one (see `read_number`)."""
        return read_number(await self.ask(question, images), low, high)

    def close(self) -> None:
        """Close the cache."""
        self._cache.close()

    async def _answer(self, client: httpx.AsyncClient, body: dict) -> str:
        deadline = time.monotonic() + self._patience_s
        attempt = 0
        while True:
            try:
                reply = await client.post(f"{self._url}/chat/completions", json=body)
                await refuse(reply)
                return reply.json()["choices"][0]["message"]["content"] or ""
            except (Again, httpx.TransportError) as error:
                reason = f"{type(error).__name__}: {error}"
            except (json.JSONDecodeError, LookupError, TypeError) as error:
                reason = f"an answer that cannot be read: {error!r}"
            if time.monotonic() > deadline:
                raise ServerError(
                    f"judge {self._url}: no answer in {self._patience_s:.0f} s: {reason}"
                )
            await pause(min(attempt, MOST_DOUBLINGS))
            attempt += 1


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
        to [0, 1]. Where the answer holds no score, `overall` is 0 and `unreadable` is 1.
    """

    async def judge_one(row: dict) -> dict:
        fields = {name: row[name] for name in ("question", "response", "ground_truth")}
        score = await judge.score(template.format(**fields), row["images"], low, high)
        scaled = 0.0 if score is None else (score - low) / (high - low)
        return {"overall": scaled, "unreadable": float(score is None)}

    async def reward(rows: list[dict]) -> list[dict]:
        return list(await asyncio.gather(*(judge_one(row) for row in rows)))

    return reward
