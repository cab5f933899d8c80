"""HTTP exchanges that end: a deadline for the whole of each and a limit on the size of its reply.

A time-out of httpx is one of a single read; here the deadline counts from connecting to the last
byte. Replies are asked for uncompressed and a compressed one does not count, so that what is
received is what is held in memory.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import ssl
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import httpx

Value = TypeVar("Value")
CONNECT_S = 5.0
POLL_S = 0.2
"""How often a waiting thread looks whether the run is to stop."""
SMALL_BYTES = 1 << 20
"""Most bytes of a reply without samples: a status, a server's options."""
ERROR_BYTES = 2000
"""Of an error's text this much is read."""
PASSING = (408, 425, 429)
"""Statuses below 500 that can pass by themselves."""


class Again(Exception):
    """A fault that can pass by itself: the request may be sent again. The message says why."""


class BadReply(Again):
    """A reply came, but it does not count."""


class Refused(Exception):
    """A server refuses a request for good."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Reply:
    """A whole reply with status 200."""

    content: bytes
    kind: str
    """Its content type."""


def check_address(url: str, option: str) -> str:
    """A server's address without a slash at its end.

    Raises:
        ValueError: naming the option, where it is none or holds a password.
    """
    shown = repr(url) if "@" not in url else "the address"
    try:
        found = httpx.URL(url)
        port = 1 if found.port is None else found.port
        good = found.scheme in ("http", "https") and found.host and 0 < port < 65536
    except httpx.InvalidURL:
        good = False
    if not good:
        raise ValueError(f"{option}: {shown} must be like http://127.0.0.1:30000")
    if found.userinfo:
        raise ValueError(f"{option}: an address must not hold a user or a password")
    return url.rstrip("/")


def open_client(headers: dict[str, str] | None = None, places: int = 1) -> httpx.AsyncClient:
    """A client that sends these headers and keeps `places` connections open."""
    return httpx.AsyncClient(
        # Each exchange has its own deadline.
        timeout=httpx.Timeout(None, connect=CONNECT_S),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=places),
        headers=(headers or {}) | {"accept-encoding": "identity"},
        verify=_certificates(),
        trust_env=False,
    )


@cache
def _certificates() -> ssl.SSLContext:
    return httpx.create_ssl_context()


async def exchange(
    client: httpx.AsyncClient,
    method: str,
    url: str,
    body: dict | None = None,
    *,
    seconds: float,
    most_bytes: int = SMALL_BYTES,
    on_message: Callable[[bytes], None] | None = None,
) -> Reply:
    """Send a request and receive its whole reply.

    Args:
        client: made by `open_client`.
        method, url, body: of the request; the body is sent as JSON.
        seconds: deadline for the whole exchange.
        most_bytes: most bytes of the reply, or of one message of a streamed one.
        on_message: for a streamed reply: called with each of its messages, but not with the end
            mark. The Reply is empty then.

    Raises:
        Again: a status that can pass by itself.
        BadReply: the reply is too large, compressed or cut.
        Refused: any other status but 200.
        httpx.TransportError: no connection, or the deadline passed.
    """
    content = None if body is None else json.dumps(body).encode()
    headers = {} if body is None else {"content-type": "application/json"}
    request = client.build_request(method, url, content=content, headers=headers)
    try:
        async with asyncio.timeout(seconds):
            reply = await client.send(request, stream=True)
            try:
                await _check_status(reply)
                kind = reply.headers.get("content-type", "")
                if on_message is None:
                    return Reply(await _read(reply, most_bytes), kind)
                await _follow(reply, most_bytes, on_message)
                return Reply(b"", kind)
            finally:
                await reply.aclose()
    except TimeoutError:
        raise httpx.ReadTimeout(f"no whole reply in {seconds:g} s") from None


async def _check_status(reply: httpx.Response) -> None:
    status = reply.status_code
    if status == 200:
        coding = reply.headers.get("content-encoding", "identity")
        if coding.strip().lower() not in ("", "identity"):
            raise BadReply(f"the reply is compressed ({coding[:40]!r}), which was not asked for")
        return
    start = bytearray()
    async for chunk in reply.aiter_raw():
        start += chunk[:ERROR_BYTES]
        if len(start) >= ERROR_BYTES:
            break
    text = start.decode(errors="replace")[:500]
    if 400 <= status < 500 and status not in PASSING:
        raise Refused(f"{reply.url} refused a request: {status} {text}", status)
    raise Again(f"status {status}: {text}")


async def _read(reply: httpx.Response, most_bytes: int) -> bytes:
    content = bytearray()
    async for chunk in reply.aiter_raw():
        content += chunk
        if len(content) > most_bytes:
            raise BadReply(f"the reply is longer than {most_bytes} bytes")
    return bytes(content)


async def _follow(
    reply: httpx.Response, most_bytes: int, on_message: Callable[[bytes], None]
) -> None:
    """Read server-sent events up to their end mark."""
    rest = b""
    async for chunk in reply.aiter_raw():
        *lines, rest = (rest + chunk).split(b"\n")
        if max(map(len, [*lines, rest])) > most_bytes:
            raise BadReply(f"a message of the reply is longer than {most_bytes} bytes")
        for line in lines:
            message = line.rstrip(b"\r")
            if message == b"data: [DONE]":
                return
            if message.startswith(b"data: "):
                on_message(message.removeprefix(b"data: "))
    if rest.rstrip(b"\r") != b"data: [DONE]":
        raise BadReply("the reply is cut")


def submit(work: Coroutine[None, None, Value]) -> concurrent.futures.Future[Value]:
    """Start an exchange beside the calling thread, in a thread that all of them share."""
    return asyncio.run_coroutine_threadsafe(work, _loop(os.getpid()))


def wait(
    future: concurrent.futures.Future[Value], check: Callable[[], None] = lambda: None
) -> Value:
    """Its result; `check` is called while it is waited for, and an exception of its ends it."""
    try:
        while not future.done():
            check()
            concurrent.futures.wait([future], POLL_S)
        return future.result()
    except BaseException:
        future.cancel()
        raise


@cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """The event loop of a process (a forked one needs its own)."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="exchanges", daemon=True).start()
    return loop
