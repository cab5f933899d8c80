"""One server and the requests that it takes over HTTP, each with a deadline."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import httpx
from pydantic import BaseModel

from tercet.rollout import exchange
from tercet.rollout.exchange import CONNECT_S, Again, Refused
from tercet.rollout.replies import Done, ModelInfo, ServerInfo, read
from tercet.rollout.server import Server, ServerError

Info = TypeVar("Info", bound=BaseModel)
Value = TypeVar("Value")
TRIES = 5
FIRST_PAUSE_S = 0.5
CLOSE_S = 5.0
"""Longest wait for a reply while the run ends."""
DRAIN_S = 30.0
POLL_S = 0.1
GET_TRIES = 3
UPDATES = ("/update_weights", "/begin_weight", "/end_weight", "/init_weights", "/destroy_weights")
"""Calls whose reply says whether they succeeded."""
BYTES_A_TOKEN = 1024
"""Most bytes of a reply for each token asked for: id, log-prob and its text."""


async def pause(attempt: int) -> None:
    """Wait after attempt 0, 1, 2 ... for 0.5 s, 1 s, 2 s ..."""
    await asyncio.sleep(FIRST_PAUSE_S * 2**attempt)


def bearer(api_key: str | None) -> dict[str, str]:
    """The header that carries an API key; none without a key."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


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
        places: most requests in flight.
        headers: sent with every request.
    """

    def __init__(self, places: int, headers: dict[str, str] | None = None):
        self._places, self._headers = places, headers
        self._session: Session | None = None
        self._users = 0

    @asynccontextmanager
    async def use(self) -> AsyncIterator[Session]:
        """The open session; opened and closed here where no other call uses it."""
        if self._session is None:
            client = exchange.open_client(self._headers, self._places)
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


@dataclass
class Endpoint:
    """A running server, ours or not.

    Calls without `async` may be made from any thread. While they wait they call `check`, which
    raises where the run is to stop.
    """

    url: str
    server: Server | None
    """Our own process; None: the server was already running, and is never restarted."""
    headers: dict[str, str] = field(repr=False)
    """They hold the API key."""
    timeout_s: float
    """Longest that one request may take, from connecting to the last byte of the reply."""
    check_stop: Callable[[], None] = lambda: None
    load: int = 0
    """Samples that wait for this server or run on it."""
    asleep: bool = False
    restarts: int = 0

    def check(self) -> None:
        """Raise ServerError, after a few seconds at most, where no server answers."""
        try:
            self.get("/model_info", ModelInfo, CONNECT_S)
        except (httpx.HTTPError, ServerError) as error:
            raise ServerError(f"rollout.urls: {self.url} does not answer: {error}") from None

    def restart(self) -> None:
        """Restart a server of ours; it then has the weights that it first started with."""
        self.server.restart()
        self.restarts += 1
        self.asleep = False

    def hurry(self) -> None:
        """Wait for nothing long from now on: the run ends."""
        self.timeout_s, self.check_stop = min(self.timeout_s, CLOSE_S), lambda: None

    def begin_post(self, path: str, body: dict) -> Future[None]:
        """A POST that runs beside the calling thread; its result is `post`'s."""
        return exchange.submit(
            self._insist(path, lambda: self._post(path, body, self.timeout_s), 1)
        )

    def post(self, path: str, body: dict, timeout_s: float | None = None, tries: int = 1) -> None:
        """Ask a server to do something, and wait until it is done.

        Raises:
            ServerError: any status but 200, `success: false`, or a reply that cannot be read.
            httpx.TransportError: no whole reply in time.
        """
        seconds = timeout_s or self.timeout_s
        work = self._insist(path, lambda: self._post(path, body, seconds), tries)
        exchange.wait(exchange.submit(work), self.check_stop)

    def get(self, path: str, kind: type[Info], timeout_s: float = 30.0) -> Info:
        """What a server says of itself; asked again where the reply cannot be read.

        Raises:
            ServerError: any status but 200, or no reply that can be read.
            httpx.TransportError: no whole reply in time.
        """
        work = self._insist(path, lambda: self._get(path, kind, timeout_s), GET_TRIES)
        return exchange.wait(exchange.submit(work), self.check_stop)

    def generate(self, body: dict, take: Callable[[bytes], Value]) -> Value:
        """What `take` finds in the reply to /generate; asked again where it raises Again.

        Raises:
            ServerError, httpx.TransportError: as `get`.
        """

        async def ask() -> Value:
            async with exchange.open_client(self.headers) as client:
                return take(await self.ask(client, "/generate", body))

        insisting = self._insist("/generate", ask, TRIES)
        return exchange.wait(exchange.submit(insisting), self.check_stop)

    def ranks(self) -> int:
        """Number of processes over which it spreads its weights (tensor parallelism)."""
        return self.get("/server_info", ServerInfo).tp_size

    def version(self) -> str:
        """Name of the weights that it has."""
        return str(self.get("/model_info", ModelInfo).weight_version)

    async def _post(self, path: str, body: dict, timeout_s: float) -> None:
        async with exchange.open_client(self.headers) as client:
            url = self.url + path
            reply = await exchange.exchange(client, "POST", url, body, seconds=timeout_s)
        # Other replies have nothing to say, and 200 says that it is done.
        if path.startswith(UPDATES) and reply.kind.startswith("application/json"):
            done = read(Done, reply.content)
            if not done.success:
                raise ServerError(f"{self.url}{path}: {str(done.message)[:500]}")

    async def _get(self, path: str, kind: type[Info], timeout_s: float) -> Info:
        async with exchange.open_client(self.headers) as client:
            url = self.url + path
            return read(
                kind, (await exchange.exchange(client, "GET", url, seconds=timeout_s)).content
            )

    async def _insist(self, path: str, call: Callable[[], Awaitable[Value]], tries: int) -> Value:
        """What a call gives within some tries; its faults become errors that name the path."""
        reason = ""
        for attempt in range(tries):
            if attempt:
                await pause(attempt - 1)
            try:
                return await call()
            except Again as error:
                reason = str(error)
            except Refused as error:
                raise ServerError(str(error), error.status) from None
        raise ServerError(f"{self.url}{path}: {reason}")

    def sleep(self) -> None:
        """Let the server release its memory, once it is idle."""
        self.drain()
        self.post("/release_memory_occupation", {}, tries=TRIES)
        self.asleep = True

    def wake(self) -> None:
        """Let a sleeping server take its memory back."""
        if self.asleep:
            self.post("/resume_memory_occupation", {}, tries=TRIES)
            self.asleep = False

    def drain(self) -> None:
        """Abort what runs and wait until the server is idle."""
        deadline = time.monotonic() + DRAIN_S
        self.post("/abort_request", {"abort_all": True}, DRAIN_S, TRIES)
        while True:
            try:
                self.post("/flush_cache", {}, DRAIN_S)  # refused while anything runs
                return
            except ServerError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(POLL_S)

    async def ask(self, client: httpx.AsyncClient, path: str, body: dict) -> bytes:
        """The whole reply to a POST for a sample; raises what `exchange` raises."""
        return (await self._sample(client, path, body)).content

    async def stream(
        self, client: httpx.AsyncClient, path: str, body: dict, on_first: Callable[[], None]
    ) -> bytes:
        """The last message of a streamed reply; `on_first` is called when the first one comes.

        Raises:
            Again: there is no message, and all that `exchange` raises.
        """
        last = b""

        def keep(message: bytes) -> None:
            nonlocal last
            last = message
            on_first()

        await self._sample(client, path, body, keep)
        if not last:
            raise Again("the reply is empty")
        return last

    async def _sample(
        self,
        client: httpx.AsyncClient,
        path: str,
        body: dict,
        on_message: Callable[[bytes], None] | None = None,
    ) -> exchange.Reply:
        return await exchange.exchange(
            client,
            "POST",
            self.url + path,
            body,
            seconds=self.timeout_s,
            most_bytes=_most_bytes(body),
            on_message=on_message,
        )

    async def abort(self, client: httpx.AsyncClient, rid: str) -> None:
        """Stop a request that nobody waits for; a server that does not answer is left alone."""
        try:
            await exchange.exchange(
                client, "POST", f"{self.url}/abort_request", {"rid": rid}, seconds=CONNECT_S
            )
        except (Again, Refused, httpx.HTTPError):
            pass


def _most_bytes(body: dict) -> int:
    return exchange.SMALL_BYTES + BYTES_A_TOKEN * body["sampling_params"]["max_new_tokens"]
