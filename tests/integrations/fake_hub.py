"""As much of the Hugging Face hub as an upload needs, on loopback: repositories are made, and hold commits."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from typing_extensions import override


class FakeHub:
    """See the module.

    Attributes:
        repos: what was committed, by repository and path.
        requests: what was asked, as ``"METHOD /path"``.
        tokens: with which.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.tokens: set[str] = set()
        self.url = ""

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
            self.repos.setdefault(name, {})
            return {"url": f"{self.url}/{name}", "name": name, "id": name}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if match := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return {"files": files}
        if match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    self.repos[match[1]][item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            oid = f"{len(self.requests):040x}"
            return {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{match[1]}/commit/{oid}"}
        raise LookupError(path)


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            hub.requests.append(f"POST {path}")
            hub.tokens.add(self.headers.get("Authorization", ""))
            try:
                status, answer = 200, hub.answer(path, body)
            except LookupError:
                status, answer = 404, {"error": "not found"}
            self._send(status, json.dumps(answer).encode())

        def do_GET(self) -> None:
            hub.requests.append(f"GET {self.path}")
            self._send(404, b'{"error": "not found"}')

        do_HEAD = do_GET

        def _send(self, status: int, data: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        @override
        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
