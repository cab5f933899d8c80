"""One SGLang server as its clients see it: HTTP with time-outs, and what may be tried again."""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx

from tercet.rollout.server import Server, ServerError

CONNECT_S = 5.0
TRIES = 5
FIRST_PAUSE_S = 0.5
DRAIN_S = 30.0
POLL_S = 0.1


class Again(Exception):
    """A request that must be sent again; says why."""


async def pause(attempt: int) -> None:
    """Wait after attempt 0, 1, 2 ... for 0.5 s, 1 s, 2 s ..."""
    await asyncio.sleep(FIRST_PAUSE_S * 2**attempt)


@dataclass
class Session:
    """What the requests that run at one time share; it belongs to one event loop."""

    client: httpx.AsyncClient
    places: asyncio.Semaphore
    """Bounds the requests in flight."""
    restarting: defaultdict[str, asyncio.Lock] = field(
        default_factory=lambda: defaultdict(asyncio.Lock)
    )
    """Held while the server of that address is restarted."""
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while weights go to one: all ranks of a sharded policy put them together."""


class SharedSession:
    """A session that the first of several calls opens and the last one closes.

    Args:
        timeout_s: longest that a request may take.
        places: most requests in flight.
        headers: sent with every request.
    """

    def __init__(self, timeout_s: float, places: int, headers: dict[str, str] | None = None):
        self._timeout = httpx.Timeout(timeout_s, connect=CONNECT_S)
        self._places, self._headers = places, headers
        self._session: Session | None = None
        self._users = 0

    @asynccontextmanager
    async def use(self) -> AsyncIterator[Session]:
        if self._session is None:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=self._places)
            client = httpx.AsyncClient(
                timeout=self._timeout, limits=limits, headers=self._headers, trust_env=False
            )
            self._session = Session(client, asyncio.Semaphore(self._places))
        session = self._session
        self._users += 1
        try:
            yield session
        finally:
            self._users -= 1
            if not self._users:
                self._session = None
                await session.client.aclose()


async def refuse(reply: httpx.Response) -> None:
    """Raises Again for a status that can pass by itself (429, 5xx), ServerError for another."""
    if reply.status_code == 200:
        return
    text = (await reply.aread()).decode(errors="replace")[:500]
    if reply.status_code == 429 or reply.status_code >= 500:
        raise Again(f"status {reply.status_code}: {text}")
    raise ServerError(f"{reply.url} refused a request: {reply.status_code} {text}")


@dataclass
class Endpoint:
    """A server that is asked over HTTP, ours or not."""

    url: str
    server: Server | None
    """None: it was running already, and is never restarted."""
    headers: dict[str, str]
    timeout_s: float
    load: int = 0
    """Samples that wait for it or run on it."""
    asleep: bool = False
    restarts: int = 0

    def check(self) -> None:
        """Raises ServerError, in seconds, where no server answers."""
        try:
            self.get("/model_info", CONNECT_S)
        except httpx.HTTPError as error:
            raise ServerError(f"rollout.urls: {self.url} does not answer: {error}") from None

    def restart(self) -> None:
        """Restart a server of ours; it then has the weights of its folder."""
        self.server.restart()
        self.restarts += 1
        self.asleep = False

    def post(self, path: str, body: dict) -> dict:
        """The reply to a POST; ServerError for any status but 200, or a reply that says no."""
        reply = httpx.post(
            self.url + path,
            json=body,
            headers=self.headers,
            timeout=httpx.Timeout(self.timeout_s, connect=CONNECT_S),
            trust_env=False,
        )
        if reply.status_code != 200:
            said = f"{self.url}{path}: {reply.status_code} {reply.text[:500]}"
            raise ServerError(said, reply.status_code)
        if not reply.headers.get("content-type", "").startswith("application/json"):
            return {}
        found = self._read(reply, path) or {}
        if not found.get("success", True):
            raise ServerError(f"{self.url}{path}: {found.get('message')}")
        return found

    def get(self, path: str, timeout_s: float = 30.0) -> dict:
        """The reply to a GET."""
        timeout = httpx.Timeout(timeout_s, connect=CONNECT_S)
        reply = httpx.get(self.url + path, headers=self.headers, timeout=timeout, trust_env=False)
        reply.raise_for_status()
        return self._read(reply, path)

    def _read(self, reply: httpx.Response, path: str):
        try:
            return reply.json()
        except json.JSONDecodeError as error:
            raise ServerError(f"{self.url}{path}: the reply cannot be read: {error}") from None

    def sleep(self) -> None:
        """Let the server release its memory, once it is idle."""
        self.drain()
        self.post("/release_memory_occupation", {})
        self.asleep = True

    def wake(self) -> None:
        """Let a sleeping server take its memory back."""
        if self.asleep:
            self.post("/resume_memory_occupation", {})
            self.asleep = False

    def drain(self) -> None:
        """Abort what runs and wait until the server is idle."""
        self.post("/abort_request", {"abort_all": True})
        deadline = time.monotonic() + DRAIN_S
        while True:
            try:
                self.post("/flush_cache", {})  # refused while anything runs
                return
            except ServerError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(POLL_S)

    async def ask(self, client: httpx.AsyncClient, path: str, body: dict) -> dict:
        """The reply to a POST in one piece; raises what `stream` does."""
        reply = await client.post(self.url + path, json=body)
        await refuse(reply)
        try:
            found = reply.json()
        except json.JSONDecodeError:
            raise Again("the reply is cut") from None
        if not isinstance(found, dict):
            raise Again("the reply is no object")
        return found

    async def stream(self, client: httpx.AsyncClient, path: str, body: dict) -> AsyncIterator[dict]:
        """The messages of a streamed reply.

        Raises:
            Again: status 429 or 5xx, a message that is cut, or one that reports an error.
            ServerError: another status.
            httpx.TransportError: the connection failed or took too long.
        """
        async with client.stream("POST", self.url + path, json=body) as reply:
            await refuse(reply)
            async for line in reply.aiter_lines():
                if line == "data: [DONE]":
                    return
                if not line.startswith("data: "):
                    continue
                try:
                    message = json.loads(line.removeprefix("data: "))
                except json.JSONDecodeError:
                    raise Again("the reply is cut") from None
                if "error" in message:
                    raise Again(str(message["error"])[:300])
                yield message
        raise Again("the reply is cut")

    async def abort(self, client: httpx.AsyncClient, rid: str) -> None:
        """Stop a request that nobody waits for; a server that cannot be told has its limits."""
        try:
            await client.post(f"{self.url}/abort_request", json={"rid": rid}, timeout=CONNECT_S)
        except httpx.HTTPError:
            pass
