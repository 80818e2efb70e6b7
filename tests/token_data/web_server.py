"""A real web server on this machine that can be told how to misbehave."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections import defaultdict
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from typing_extensions import override

Trick = Callable[["Handler"], None]
"""Answers one request in its own way."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    @override
    def setup(self) -> None:
        super().setup()
        self.server.web.connections.append(self.connection)

    @override
    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def answer(self) -> None:
        web = self.server.web
        with web.lock:
            web.requests.append((self.command, self.path, self.headers.get("Range")))
            tricks = web.tricks[self.command]
            trick = tricks.pop(0) if tricks else web.always.get(self.command)
        if trick is not None:
            trick(self)
        else:
            self.serve()

    @property
    def content(self) -> bytes | None:
        return self.server.web.files.get(self.path.partition("?")[0])

    @property
    def range(self) -> tuple[int, int] | None:
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        return (int(match[1]), int(match[2])) if match else None

    def serve(self) -> None:
        """As a web server should."""
        content = self.content
        if content is None:
            self.reply(404, b"no such file")
        elif self.range is None:
            self.reply(200, content)
        elif self.range[0] >= len(content):
            self.reply(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        else:
            first, last = self.range[0], min(self.range[1], len(content) - 1)
            self.reply(206, content[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(content)}"})

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        fields = {"Content-Length": str(len(body)), **(headers or {})}
        self.send_response(status)
        for name, value in fields.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


class Server(ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = True
    web: WebServer

    @override
    def handle_error(self, *_: Any) -> None:
        """Clients that go away in the middle are part of the game."""


class WebServer:
    """Serves ``files`` by path. ``tricks`` answer the next requests of a method, ``always`` all others."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.requests: list[tuple[str, str, str | None]] = []
        self.tricks: dict[str, list[Trick]] = defaultdict(list)
        self.always: dict[str, Trick] = {}
        self.lock = threading.Lock()
        self.ended = threading.Event()
        self.connections: list[socket.socket] = []
        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.web = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def asked(self, method: str) -> list[str | None]:
        """The ranges of all requests of a method so far."""
        with self.lock:
            return [wanted for one, _, wanted in self.requests if one == method]

    def __enter__(self) -> WebServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._server.shutdown()
        self._thread.join()
        for connection in self.connections:
            # Clients may keep theirs open.
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()


# -- tricks --------------------------------------------------------------------------------------------------------


def status(code: int, headers: dict[str, str] | None = None) -> Trick:
    return lambda handler: handler.reply(code, b"", headers)


def says(code: int, body: bytes, headers: dict[str, str]) -> Trick:
    return lambda handler: handler.reply(code, body, headers)


def cut(after: int) -> Trick:
    """Sends so many bytes of the right answer's body, and hangs up."""

    def trick(handler: Handler) -> None:
        content, span = handler.content, handler.range
        assert content is not None
        assert span is not None
        body = content[span[0] : span[1] + 1]
        handler.send_response(206)
        handler.send_header("Content-Length", str(len(body)))
        handler.send_header("Content-Range", f"bytes {span[0]}-{span[1]}/{len(content)}")
        handler.end_headers()
        handler.wfile.write(body[:after])
        handler.wfile.flush()
        handler.hang_up()

    return trick


def vanish(handler: Handler) -> None:
    """Hangs up without a word."""
    handler.hang_up()


def silent(handler: Handler) -> None:
    """Never answers."""
    handler.server.web.ended.wait()
    handler.hang_up()


def drip(handler: Handler) -> None:
    """Sends a byte of the headers now and then, so that no timeout between two bytes is ever reached."""
    handler.wfile.write(b"HTTP/1.1 206 Partial Content\r\nX-Patience: ")
    _dribble(handler)


def drip_body(handler: Handler) -> None:
    """The same with the body."""
    span, content = handler.range, handler.content
    assert span is not None
    assert content is not None
    handler.send_response(206)
    handler.send_header("Content-Length", str(span[1] - span[0] + 1))
    handler.send_header("Content-Range", f"bytes {span[0]}-{span[1]}/{len(content)}")
    handler.end_headers()
    _dribble(handler)


def _dribble(handler: Handler) -> None:
    try:
        while not handler.server.web.ended.wait(0.02):
            handler.wfile.write(b"x")
            handler.wfile.flush()
    except OSError:
        pass
    handler.close_connection = True


def garbage(handler: Handler) -> None:
    handler.wfile.write(b"220 mail.example ESMTP\r\n")
    handler.hang_up()


def endless_headers(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    try:
        for _ in range(100_000):
            handler.wfile.write(b"X-More: " + bytes(1000).replace(b"\0", b"y") + b"\r\n")
    except OSError:
        pass
    handler.close_connection = True
