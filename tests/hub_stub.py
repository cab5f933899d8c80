"""The part of the Hugging Face hub's API that an upload needs, on loopback: LFS, and one commit."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

TOKEN = "hf_right"


@dataclass
class Hub:
    """What was uploaded."""

    url: str = ""
    repositories: list[dict] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    """LFS objects by their SHA-256."""
    files: dict[str, bytes] = field(default_factory=dict)
    """By path, after the commit."""
    cards: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> Path:
        """The repository as a folder."""
        for path, content in self.files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        return folder


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_) -> None: ...

    def _reply(self, content: dict, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def do_GET(self) -> None:
        self._reply({"id": "somebody/birds", "sha": "0" * 40, "siblings": []})

    def do_PUT(self) -> None:
        content = self._body()
        name = self.path.rpartition("/")[2]
        right = hashlib.sha256(content).hexdigest() == name
        if right:
            self.hub.objects[name] = content
        self._reply({}, 200 if right else 400)

    def do_POST(self) -> None:
        body, hub = self._body(), self.hub
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self._reply({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            hub.repositories.append(json.loads(body))
            return self._reply({"url": f"{hub.url}/somebody/birds"})
        if self.path == "/api/validate-yaml":
            hub.cards.append(json.loads(body)["content"])
            return self._reply({"warnings": [], "errors": []})
        if "/preupload/" in self.path:
            return self._reply({"files": [_mode(file) for file in json.loads(body)["files"]]})
        if self.path.endswith("/objects/batch"):
            return self._reply({"transfer": "basic", "objects": self._actions(json.loads(body))})
        if "/commit/" in self.path:
            self._commit(body)
            answer = {"success": True, "commitOid": "1" * 40}
            return self._reply(answer | {"commitUrl": f"{hub.url}/somebody/birds/commit/1"})
        self._reply({}, 200 if self.path == "/verify" else 404)

    def _actions(self, asked: dict) -> list[dict]:
        url = self.hub.url
        return [
            o
            | {
                "actions": {
                    "upload": {"href": f"{url}/lfs/{o['oid']}"},
                    "verify": {"href": f"{url}/verify"},
                }
            }
            for o in asked["objects"]
        ]

    def _commit(self, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.files[value["path"]] = self.hub.objects[value["oid"]]


def _mode(file: dict) -> dict:
    large = file["path"].endswith((".safetensors", ".png"))
    mode = "lfs" if large else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}


@contextmanager
def serve_hub(monkeypatch) -> Iterator[Hub]:
    """A hub that huggingface_hub speaks to for the length of the block, without Xet."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
        server.shutdown()
