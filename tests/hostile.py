"""A server whose replies a test writes byte by byte: what no honest server sends."""

from __future__ import annotations

import json
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Reply = Callable[[str, dict], bytes | Iterable[bytes]]


def plain(content: bytes | str, status: str = "200 OK", kind="application/json", more="") -> bytes:
    """A whole HTTP reply."""
    content = content.encode() if isinstance(content, str) else content
    head = f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\n{more}"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


def as_json(value) -> bytes:
    return plain(json.dumps(value))


def dripping(content: bytes, seconds: float):
    """A reply that sends one byte at a time, for ever."""
    yield content
    while True:
        time.sleep(seconds)
        yield b" "


def endless(start: bytes = b"[", block: bytes = b"1," * 32_768):
    """A body without an end."""
    yield b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n" + start
    while True:
        yield block


def bomb(mib: int = 128) -> bytes:
    """A small body that is large once it is unpacked."""
    packer = zlib.compressobj(wbits=31)
    packed = b"".join(packer.compress(b" " * (1 << 20)) for _ in range(mib)) + packer.flush()
    return plain(packed, more="content-encoding: gzip\r\n")


class Hostile:
    """Serves `reply(path, body)` while the block runs; `asked` are the paths so far."""

    def __init__(self, reply: Reply):
        self.reply, self.asked, self.bodies = reply, [], []
        self.headers: list[dict] = []
        hostile = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hostile.handle(self)

            do_POST = do_GET

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # the client hung up
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Hostile:
        threading.Thread(target=self._server.serve_forever, args=[0.02], daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        content = request.rfile.read(int(request.headers.get("content-length", 0)))
        body = json.loads(content or b"{}")
        self.asked.append(request.path)
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        reply = self.reply(request.path, body)
        request.close_connection = True
        try:
            for part in [reply] if isinstance(reply, bytes) else reply:
                request.wfile.write(part)
                request.wfile.flush()
        except OSError:
            pass  # the client hung up
