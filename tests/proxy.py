"""An HTTP proxy that delays, drops, cuts and changes the traffic of a real server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx


@dataclass
class Fault:
    """A fault in the next `times` requests for a path."""

    path: str = "/generate"
    times: int = 1
    delay_s: float = 0.0
    drop: bool = False
    """Close the connection without an answer."""
    status: int | None = None
    """Reply with this status, without asking the server."""
    keep: float | None = None
    """Share of the answer that is sent before the connection is closed."""
    change: Callable[[bytes], bytes] | None = None
    hits: int = 0


class Proxy:
    """Stands in front of the server at `target` while the block runs."""

    def __init__(self, target: str):
        self.target = target
        self.fault: Fault | None = None
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                proxy.handle(self)

            do_POST = do_GET

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def take(self, path: str) -> Fault:
        """The fault of this request; without one, a Fault that changes nothing."""
        with self._lock:
            fault = self.fault
            if fault is None or fault.path != path or fault.hits == fault.times:
                return Fault()
            fault.hits += 1
            return fault

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("content-length", 0)))
        fault = self.take(request.path)
        time.sleep(fault.delay_s)
        if fault.drop:
            request.close_connection = True
            return
        if fault.status is not None:
            content, status, kind = b"the proxy says no", fault.status, "text/plain"
        else:
            reply = httpx.request(
                request.command,
                self.target + request.path,
                content=body,
                headers={"content-type": "application/json"},
                timeout=120,
            )
            content, status = reply.content, reply.status_code
            kind = reply.headers.get("content-type", "")
        content = fault.change(content) if fault.change else content
        sent = content if fault.keep is None else content[: int(len(content) * fault.keep)]
        try:
            request.send_response(status)
            request.send_header("content-type", kind)
            request.send_header("content-length", str(len(content)))
            request.end_headers()
            request.wfile.write(sent)
        except OSError:
            pass  # the client has gone
        request.close_connection = True
