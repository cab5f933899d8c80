"""HTTP to a server: time-outs, checked replies, and which faults may be tried again."""

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
    """A fault that can pass by itself: the request may be sent again. The message says why."""


async def pause(attempt: int) -> None:
    """Wait after attempt 0, 1, 2 ... for 0.5 s, 1 s, 2 s ..."""
    await asyncio.sleep(FIRST_PAUSE_S * 2**attempt)


def bearer(api_key: str | None) -> dict[str, str]:
    """The header that carries an API key; none without a key."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def _timeout(seconds: float) -> httpx.Timeout:
    return httpx.Timeout(seconds, connect=CONNECT_S)


@dataclass
class Session:
    """HTTP client and locks that requests share while they run in one event loop."""

    client: httpx.AsyncClient
    places: asyncio.Semaphore
    """Limits the requests in flight."""
    restarting: defaultdict[str, asyncio.Lock] = field(
        default_factory=lambda: defaultdict(asyncio.Lock)
    )
    """By address: held while that server is restarted."""
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while weights are sent: gathering them is a collective of all ranks, one at a time."""


class SharedSession:
    """A session that the first of several concurrent calls opens and the last one closes.

    Clients and locks belong to an event loop, and every step of a run has a loop of its own.

    Args:
        timeout_s: longest that a request may take.
        places: most requests in flight.
        headers: sent with every request.
    """

    def __init__(self, timeout_s: float, places: int, headers: dict[str, str] | None = None):
        self._timeout = _timeout(timeout_s)
        self._places, self._headers = places, headers
        self._session: Session | None = None
        self._users = 0

    @asynccontextmanager
    async def use(self) -> AsyncIterator[Session]:
        """The open session; opened and closed here where no other call uses it."""
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
    """Check a reply's status.

    Raises:
        Again: 429 or 5xx, which can pass by themselves.
        ServerError: any other status but 200.
    """
    if reply.status_code == 200:
        return
    text = (await reply.aread()).decode(errors="replace")[:500]
    if reply.status_code == 429 or reply.status_code >= 500:
        raise Again(f"status {reply.status_code}: {text}")
    raise ServerError(f"{reply.url} refused a request: {reply.status_code} {text}")


@dataclass
class Endpoint:
    """A running server, ours or not, and the requests that it takes over HTTP."""

    url: str
    server: Server | None
    """Our own process; None: the server was already running, and is never restarted."""
    headers: dict[str, str]
    timeout_s: float
    load: int = 0
    """Samples that wait for this server or run on it."""
    asleep: bool = False
    restarts: int = 0

    def check(self) -> None:
        """Raise ServerError, after a few seconds at most, where no server answers."""
        try:
            self.get("/model_info", CONNECT_S)
        except httpx.HTTPError as error:
            raise ServerError(f"rollout.urls: {self.url} does not answer: {error}") from None

    def restart(self) -> None:
        """Restart a server of ours; it then has the weights that it first started with."""
        self.server.restart()
        self.restarts += 1
        self.asleep = False

    def post(self, path: str, body: dict) -> dict:
        """The reply to a POST; empty where it is not JSON.

        Raises:
            ServerError: any status but 200, or a reply with `success: false`.
            httpx.HTTPError: no reply.
        """
        reply = httpx.post(
            self.url + path,
            json=body,
            headers=self.headers,
            timeout=_timeout(self.timeout_s),
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
        """The reply to a GET; httpx.HTTPError for any status but 200, or no reply."""
        reply = httpx.get(
            self.url + path,
            headers=self.headers,
            timeout=_timeout(timeout_s),
            trust_env=False,
        )
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
        """The whole reply to a POST; raises what `stream` raises."""
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
            Again: status 429 or 5xx, a message that is cut off, or one that reports an error.
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
        """Stop a request that nobody waits for; a server that does not answer is left alone."""
        try:
            await client.post(f"{self.url}/abort_request", json={"rid": rid}, timeout=CONNECT_S)
        except httpx.HTTPError:
            pass
