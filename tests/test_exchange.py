"""Exchanges end: deadlines, sizes, statuses, and what is raised for each."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest
from hostile import Hostile, as_json, bomb, dripping, endless, plain

from tercet.rollout import endpoint
from tercet.rollout.endpoint import Endpoint
from tercet.rollout.exchange import (
    SMALL_BYTES,
    Again,
    BadReply,
    Refused,
    check_address,
    exchange,
    open_client,
    submit,
    wait,
)
from tercet.rollout.replies import ModelInfo
from tercet.rollout.server import ServerError

pytestmark = pytest.mark.core
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.01)


def get(url: str, seconds: float = 5.0, **options):
    async def run():
        async with open_client() as client:
            return await exchange(client, "GET", url, seconds=seconds, **options)

    return asyncio.run(run())


SLOW = {
    "nothing": lambda: (time.sleep(9) for _ in range(1)),
    "one byte of the status at a time": lambda: dripping(b"HTTP/1.1 200 ", 0.1),
    "headers without end": lambda: dripping(HEAD + b"x-a: ", 0.1),
    "one byte of the body at a time": lambda: dripping(HEAD + b"\r\n[", 0.1),
    "an error's text at a time": lambda: dripping(b"HTTP/1.1 500 No\r\n\r\n", 0.1),
    "messages without end": lambda: dripping(HEAD + b"\r\ndata: {}\n\n", 0.1),
}


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("streamed", [False, True])
def test_the_deadline_is_one_for_the_whole_exchange(name, streamed):
    more = {"on_message": lambda message: None} if streamed else {}
    started = time.monotonic()
    with Hostile(lambda path, body: SLOW[name]()) as server:
        with pytest.raises(httpx.ReadTimeout, match="no whole reply in 0.5 s"):
            get(server.url, 0.5, **more)
    assert 0.4 < time.monotonic() - started < 5


def peak_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


@pytest.mark.parametrize("reply", [endless, bomb], ids=["endless", "gzip bomb"])
def test_what_is_received_is_bounded(reply):
    """Memory included: the peak grows by less than 48 MiB where 128 MiB and more are sent."""
    content = reply()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = peak_mib()
    with Hostile(lambda path, body: content) as server:
        with pytest.raises(BadReply, match="longer than 1048576 bytes|compressed"):
            get(server.url, 30.0)
    assert peak_mib() - before < 48


def test_a_message_without_an_end_is_bounded():
    with Hostile(lambda path, body: endless(b"data: ")) as server:
        with pytest.raises(BadReply, match="a message of the reply is longer than 1000000 bytes"):
            get(server.url, 30.0, most_bytes=1_000_000, on_message=lambda message: None)


def test_as_much_as_is_allowed_is_read():
    with Hostile(lambda path, body: plain(b"x" * SMALL_BYTES)) as server:
        assert len(get(server.url).content) == SMALL_BYTES
        with pytest.raises(BadReply, match="longer than"):
            get(server.url, most_bytes=SMALL_BYTES - 1)


@pytest.mark.parametrize("end", [b"\n\ndata: [DONE]\n\n", b"\r\n\r\ndata: [DONE]"])
def test_messages_are_those_of_the_stream_whatever_its_parts(end):
    content = b'data: {"a": "\xc3\xa9"}\n\n: a comment\n\ndata: 2' + end
    found = []

    def one_by_one(path, body):
        yield HEAD + b"\r\n"
        for byte in content:
            yield bytes([byte])

    with Hostile(one_by_one) as server:
        get(server.url, on_message=found.append)
    assert found == [b'{"a": "\xc3\xa9"}', b"2"]


RAW = {
    "no HTTP": (b"hello\r\n\r\n", httpx.TransportError),
    "empty": (b"", httpx.TransportError),
    "a header without a colon": (HEAD + b"nonsense\r\n\r\n[]", httpx.TransportError),
    "a header of 1 MiB": (HEAD + b"x: " + b"a" * (1 << 20) + b"\r\n\r\n", httpx.TransportError),
    "a negative length": (HEAD + b"content-length: -1\r\n\r\n", httpx.TransportError),
    "a length of 30 digits": (HEAD + b"content-length: " + b"9" * 30 + b"\r\n\r\n", Exception),
    "two lengths": (HEAD + b"content-length: 1\r\ncontent-length: 2\r\n\r\nab", Exception),
    "a shorter body": (HEAD + b"content-length: 9\r\n\r\nab", httpx.TransportError),
    "a bad chunk": (HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n", httpx.TransportError),
    "a chunk's size of 1 MB": (
        HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"0" * 1_000_000,
        httpx.TransportError,
    ),
    "no content": (b"HTTP/1.1 204 No\r\n\r\n", Again),
    "another protocol": (
        b"HTTP/1.1 101 Yes\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
        Exception,
    ),
    "a redirection": (b"HTTP/1.1 302 No\r\nlocation: /x\r\ncontent-length: 0\r\n\r\n", Again),
    "a redirection to nowhere": (
        b"HTTP/1.1 302 No\r\nlocation: http://[/\r\ncontent-length: 0\r\n\r\n",
        Exception,
    ),
    "a bad cookie": (plain("[]", more="set-cookie: \xff=;;;\r\n", status="503 No"), Again),
    "bad gzip": (plain(b"\x1f\x8bno", more="content-encoding: gzip\r\n"), BadReply),
    "br": (plain(b"no", more="content-encoding: br\r\n"), BadReply),
    "busy": (plain("wait", "429 No"), Again),
    "down": (plain(b"\xff" * 5000, "503 No"), Again),
    "refused": (plain("no such model", "400 No"), Refused),
    "no key": (plain("", "401 No"), Refused),
}


@pytest.mark.parametrize("name", RAW)
def test_every_fault_is_one_that_is_named(name):
    content, kind = RAW[name]
    with Hostile(lambda path, body: content) as server:
        with pytest.raises(kind) as caught:
            get(server.url, 5.0)
    assert isinstance(caught.value, (Again, Refused, httpx.TransportError)), caught.value
    assert str(caught.value).isprintable() or "\ufffd" in str(caught.value)


def test_a_wait_ends_where_the_run_is_to_stop():
    """From the main thread, and without the reply."""
    stop = threading.Event()

    def check():
        if stop.is_set():
            raise KeyError("stopped")

    server_end = Endpoint("", None, {}, 60.0, check)
    threading.Timer(0.3, stop.set).start()
    calls = {
        "post": lambda: server_end.post("/update_weights_from_disk", {}),
        "get": lambda: server_end.get("/model_info", ModelInfo),
        "drain": server_end.drain,
        "wake": server_end.wake,
    }
    server_end.asleep = True
    with Hostile(lambda path, body: dripping(HEAD, 0.1)) as server:
        server_end.url = server.url
        for call in calls.values():
            started = time.monotonic()
            with pytest.raises(KeyError, match="stopped"):
                call()
            assert time.monotonic() - started < 5


def test_a_wait_that_ends_gives_the_exchange_up():
    with Hostile(lambda path, body: dripping(HEAD, 0.05)) as server:
        client_end = Endpoint(server.url, None, {}, 60.0)
        future = client_end.begin_post("/x", {})
        with pytest.raises(ZeroDivisionError):
            wait(future, lambda: 1 / 0)
        assert future.cancelled()


def test_calls_are_asked_again_where_that_is_safe_and_named():
    def bad(path, body):
        return as_json([1])

    with Hostile(bad) as server:
        client_end = Endpoint(server.url, None, {}, 5.0)
        with pytest.raises(ServerError, match=f"{server.url}/model_info: the reply cannot be read"):
            client_end.version()
        assert server.asked == ["/model_info"] * 3
        with pytest.raises(ServerError, match="/server_info: the reply cannot be read"):
            client_end.ranks()
        with pytest.raises(ServerError, match="/update_weights_from_disk: the reply cannot"):
            client_end.post("/update_weights_from_disk", {})
        client_end.asleep = True
        client_end.wake()  # status 200 says it all
        assert not client_end.asleep


@pytest.mark.parametrize(
    "reply", [{"success": False, "message": "no"}, {"success": None}, [], 5, "x", {"success": 1}]
)
def test_an_update_counts_only_where_the_reply_says_so(reply):
    with Hostile(lambda path, body: as_json(reply)) as server:
        with pytest.raises(ServerError, match=r"/update_weights_from_disk: "):
            Endpoint(server.url, None, {}, 5.0).post("/update_weights_from_disk", {})


def test_a_key_is_in_no_text_about_a_server():
    assert "geheim" not in repr(Endpoint("http://x", None, endpoint.bearer("geheim"), 5.0))


@pytest.mark.parametrize(
    "url",
    ["", "x", "127.0.0.1:30000", "ftp://x", "http://", "http://x:99999", "http://x:port",
     "http://x:0", "http://[::1", "http://u:geheim@x", "http://u:geheim@x:port"],
)  # fmt: skip
def test_a_bad_address_is_named(url):
    with pytest.raises(ValueError, match=r"^rollout\.urls: ") as caught:
        check_address(url, "rollout.urls")
    assert "geheim" not in str(caught.value) and "\n" not in str(caught.value)


def test_no_socket_is_left_open_after_an_exchange():
    def sockets() -> int:
        found = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        return sum("socket:" in name for name in found)

    with Hostile(lambda path, body: as_json({"weight_version": "1"})) as server:
        client_end = Endpoint(server.url, None, {}, 5.0)
        client_end.version()
        before = sockets()
        for _ in range(20):
            client_end.version()
        time.sleep(0.2)  # the server's side
        assert sockets() <= before


def test_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ServerError, match=f"rollout.urls: {url} does not answer"):
            Endpoint(url, None, {}, 5.0).check()


def test_the_thread_of_exchanges_gives_results():
    async def four():
        return 4

    assert wait(submit(four())) == 4
