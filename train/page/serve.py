"""The report page served live, to browsers on this machine alone."""

from __future__ import annotations

import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tercet.train.page.build import Report, script_json, thumbnail_bytes

LOOPBACK = "127.0.0.1"
TIMEOUT_S = 30.0
HTML, JSON, JPEG = "text/html; charset=utf-8", "application/json", "image/jpeg"


class LiveServer(ThreadingHTTPServer):
    """Serves one report.

    Args:
        report: whose runs are read again for every request of news.
        port: 0: any that is free.

    Raises:
        OSError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, report: Report, port: int):
        self.report = report
        self.reading = threading.Lock()
        """A report is read by one request at a time."""
        super().__init__((LOOPBACK, port), Handler)

    @property
    def address(self) -> str:
        return f"http://{LOOPBACK}:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    """/, /data.json, /groups/RUN/STEP and /photo/NAME; nothing else is read from the disk."""

    timeout = TIMEOUT_S

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in (LOOPBACK, "localhost"):  # a page elsewhere whose name leads here
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        found = self._found([part for part in self.path.partition("?")[0].split("/") if part])
        if found is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        kind, content = found
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "max-age=3600" if kind == JPEG else "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content)

    def _found(self, parts: list[str]) -> tuple[str, bytes] | None:
        """Content type and content of a path; None where there is none."""
        report = self.server.report
        with self.server.reading:
            if parts == []:
                report.refresh()
                return HTML, report.page(live=True).encode()
            if parts == ["data.json"]:
                report.refresh()
                return JSON, script_json(report.data()).encode()
            if len(parts) == 3 and parts[0] == "groups" and all(p.isdigit() for p in parts[1:]):
                groups = self._groups(int(parts[1]), int(parts[2]))
                return None if groups is None else (JSON, script_json(groups).encode())
            keys = {name: key for logged in report.groups for name, key in logged.photos.items()}
        if len(parts) == 2 and parts[0] == "photo" and parts[1] in keys:
            content = thumbnail_bytes(keys[parts[1]])
            return (JPEG, content) if content else None
        return None

    def _groups(self, number: int, step: int) -> list[dict] | None:
        """All groups of a step of a run; None where there are none."""
        report = self.server.report
        if number >= len(report.runs) or step not in report.runs[number].group_files:
            return None
        return [group | {"run": number} for group in report.groups[number].read(step)]

    def log_message(self, format: str, *arguments: object) -> None: ...


def serve(report: Report, port: int) -> None:
    """Serve a report until Ctrl-C."""
    with LiveServer(report, port) as server:
        print(
            f"{server.address} shows {', '.join(run.name for run in report.runs)}; Ctrl-C ends it"
        )
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
