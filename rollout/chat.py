"""A client of an OpenAI-compatible chat endpoint: SGLang and vLLM serve one for any model.

It waits for an endpoint that is down or busy, asks again for replies that cannot be read, and keeps
what it was told in a file, so that nothing is asked twice, in this run or the next.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

import httpx

from tercet.rollout.endpoint import BYTES_A_TOKEN, TRIES, SharedSession, bearer, pause
from tercet.rollout.exchange import SMALL_BYTES, Again, BadReply, Refused, check_address, exchange
from tercet.rollout.replies import Chat, Embeddings, read
from tercet.rollout.server import ServerError

Value = TypeVar("Value")
MOST_DOUBLINGS = 6
"""Of the first pause, 0.5 s: the longest one is 32 s."""
ANSWERED = 200
"""Status of errors about replies that came, but could not be read."""
BYTES_AN_EMBEDDING = 1 << 18
"""Most bytes of a reply for each text embedded: 8,192 numbers of 32 characters."""


@dataclass(frozen=True)
class Answer:
    text: str
    reason: str | None
    """Why it ended; None: the endpoint does not say."""
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def is_whole(self) -> bool:
        return self.reason in (None, "stop")


class ChatClient:
    """Client of one endpoint.

    Args:
        url: base address, ending in /v1.
        model: name of the model that the endpoint serves.
        what: what the endpoint is to the caller, which errors begin with.
        api_key: sent when given.
        concurrency: most requests in flight.
        timeout_s: longest that one answer may take, from connecting to its last byte.
        patience_s: how long to wait for an endpoint that is down.
        cache: file that keeps the answers; None: they are kept in memory.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        what: str = "endpoint",
        api_key: str | None = None,
        concurrency: int = 16,
        timeout_s: float = 120.0,
        patience_s: float = 600.0,
        cache: str | Path | None = None,
    ):
        self._url, self._model, self._what = check_address(url, what), model, what
        self._timeout_s, self._patience_s = timeout_s, patience_s
        self._shared = SharedSession(concurrency, bearer(api_key))
        self.answered_at = 0.0
        """When a reply last came that could be read, by time.monotonic()."""
        self._cache_path = cache or ":memory:"
        try:
            self._cache = sqlite3.connect(self._cache_path, timeout=30.0, isolation_level=None)
        except sqlite3.Error as error:
            raise self._cache_error(error) from None
        self._in_cache("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT)")
        self._in_cache("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT)")

    def close(self) -> None:
        """Close the cache."""
        self._cache.close()

    async def sample(
        self,
        question: str,
        photos: Sequence[str] = (),
        *,
        index: int = 0,
        temperature: float = 1.0,
        max_tokens: int,
    ) -> tuple[Answer, bool]:
        """Sample number `index` of the answers to a question about photos.

        Args:
            question: text that follows the photos.
            photos: data URIs (see core.data.vision.data_uri).
            index: another one gives another sample; it is sent as the seed.
            temperature: of sampling.
            max_tokens: longest answer.

        Returns:
            The answer, whole or not, and whether it was asked for only now. Another address of the
            endpoint does not make it another answer.

        Raises:
            ServerError: as `_answer` does.
        """
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": content_of(question, photos)}],
            "temperature": temperature,
            "max_tokens": max_tokens,
            "seed": index,
        }
        key = _key(["sample", body])
        if kept := self._kept(key):
            return Answer(**kept), False
        async with self._shared.use() as session, session.places:
            answer = await self._answer(session.client, body)
        self._keep(key, asdict(answer))
        return answer, True

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """The endpoint's embeddings of texts, in their order.

        Raises:
            ServerError: as `_answer` does.
        """
        body = {"model": self._model, "input": list(texts)}
        key = _key(["embed", body])
        if kept := self._kept(key):
            return kept

        def take(content: bytes) -> list[list[float]]:
            rows = sorted(read(Embeddings, content).data, key=lambda row: row.index)
            if [row.index for row in rows] != list(range(len(texts))):
                raise BadReply(f"{len(rows)} embeddings for {len(texts)} texts")
            if len({len(row.embedding) for row in rows}) > 1:
                raise BadReply("embeddings of several sizes")
            return [row.embedding for row in rows]

        most = SMALL_BYTES + BYTES_AN_EMBEDDING * len(texts)
        async with self._shared.use() as session, session.places:
            rows = await self._insist(session.client, "/embeddings", body, most, take)
        self._keep(key, rows)
        return rows

    async def _answer(self, client: httpx.AsyncClient, body: dict) -> Answer:
        """One answer; waits for an endpoint that is down, and asks again for one that is bad.

        Raises:
            ServerError: the endpoint refuses the question (with its status), is down for longer
                than patience_s, or gives no answer that can be read in TRIES attempts.
        """
        most = SMALL_BYTES + BYTES_A_TOKEN * body["max_tokens"]
        return await self._insist(client, "/chat/completions", body, most, _read_answer)

    async def _insist(
        self,
        client: httpx.AsyncClient,
        path: str,
        body: dict,
        most_bytes: int,
        take: Callable[[bytes], Value],
    ) -> Value:
        url, deadline = f"{self._url}{path}", time.monotonic() + self._patience_s
        who = f"{self._what} {self._url}"
        attempt = bad = 0
        while True:
            try:
                seconds = self._timeout_s
                reply = await exchange(
                    client, "POST", url, body, seconds=seconds, most_bytes=most_bytes
                )
                taken = take(reply.content)
                self.answered_at = time.monotonic()
                return taken
            except BadReply as error:
                bad, reason = bad + 1, str(error)
            except (Again, httpx.TransportError) as error:
                reason = f"{type(error).__name__}: {error}"
            except Refused as error:
                raise ServerError(f"{self._what}: {error}", error.status) from None
            if bad == TRIES:
                raise ServerError(f"{who}: {TRIES} bad answers, the last one: {reason}", ANSWERED)
            if time.monotonic() > deadline:
                raise ServerError(f"{who}: no answer in {self._patience_s:.0f} s: {reason}")
            await pause(min(attempt, MOST_DOUBLINGS))
            attempt += 1

    def _kept(self, key: str):
        rows = self._in_cache("SELECT reply FROM replies WHERE key = ?", key)
        return json.loads(rows[0][0]) if rows else None

    def _keep(self, key: str, reply: object) -> None:
        self._in_cache("INSERT OR REPLACE INTO replies VALUES (?, ?)", key, json.dumps(reply))

    def _in_cache(self, command: str, *values: str) -> list[tuple]:
        try:
            return self._cache.execute(command, values).fetchall()
        except sqlite3.Error as error:
            raise self._cache_error(error) from None

    def _cache_error(self, error: sqlite3.Error) -> ValueError:
        return ValueError(f"{self._what}: the cache {self._cache_path} cannot be used: {error}")


def content_of(question: str, photos: Sequence[str]) -> list[dict]:
    """A user message: photos as data URIs, then the question."""
    return [*map(photo_item, photos), {"type": "text", "text": question}]


def photo_item(photo: str) -> dict:
    """A photo, as a data URI, as an item of a message's content."""
    return {"type": "image_url", "image_url": {"url": photo}}


def _key(content: list) -> str:
    return blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def _read_answer(content: bytes) -> Answer:
    """The answer in a reply; raises Again where there is none."""
    reply = read(Chat, content)
    choice, usage = reply.choices[0], reply.usage
    counts = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
    answer = Answer(choice.message.content or "", choice.finish_reason, *counts)
    if answer.is_whole and choice.message.content is None:
        raise BadReply("an answer without text")
    return answer
