"""A page that shows a run live: one HTML file, and the run's picture by server-sent events.

The page asks nobody but this server for anything, which its content security policy enforces. On this machine's own
addresses everybody here may look; whoever acts, or looks from elsewhere, needs the key, which is the part of the page's
address behind ``#`` and so is never sent by itself. Other sites that a browser shows cannot look: requests with another
``Host`` are refused, and those that act need the key in a header.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from aiohttp import web

from ...comm.loop import LoopThread
from ...coordinator.server.acting import Act
from ...errors import ConfigurationError, DistroError
from .history import History
from .picture import point_of

__all__ = ["PageServer", "parse_place"]

LOOK_SECONDS: Final = 1.0
"""Between two pictures."""

MAX_WATCHERS: Final = 32
"""Browsers at a time. Chosen arbitrarily."""

MAX_BODY: Final = 1024
"""Bytes of a request that acts."""

KEY_BYTES: Final = 18
"""Of randomness in the key."""

CLOSE_SECONDS: Final = 2.0
"""How long closing may take."""

_HTML: Final = Path(__file__).with_name("page.html")

_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def parse_place(place: int | str) -> tuple[str, int]:
    """``8080``, ``"8080"`` or ``"host:port"`` as host and port; without a host it is this machine alone.

    Raises:
        ConfigurationError: it is none of these.
    """
    host, _, port = str(place).rpartition(":")
    if not port.isascii() or not port.isdigit() or int(port) > 65535 or isinstance(place, bool):
        raise ConfigurationError(
            f"web={place!r}: give a port such as 8080, or host:port, such as 0.0.0.0:8080", name="web", value=place
        )
    return host.strip("[]") or "127.0.0.1", int(port)


class PageServer:
    """Serves the page from its making to :meth:`close`, or as a context manager; in a thread of its own.

    Args:
        place: see :func:`parse_place`.
        picture: what is to be shown, see :mod:`.picture`; called about once a second from that thread.
        acts: what can be done to the run, by name; called in threads that may wait.

    Attributes:
        url: to open, with the key where one is needed.
        key: as above.

    Raises:
        ConfigurationError: ``place`` is wrong or taken.
    """

    def __init__(
        self, place: int | str, picture: Callable[[], dict[str, Any]], acts: Mapping[str, Act] | None = None
    ) -> None:
        self._host, port = parse_place(place)
        self._picture, self._acts = picture, dict(acts or {})
        self._is_local = _is_loopback(self._host)
        self.key = secrets.token_urlsafe(KEY_BYTES)
        self._history = History()
        self._watchers: set[asyncio.Queue[str]] = set()
        self._html = _HTML.read_text(encoding="utf-8")
        self._loop = LoopThread("distro-optim-page")
        try:
            self.port = self._loop.run(self._start(port), CLOSE_SECONDS * 10)
        except OSError as error:
            self._loop.stop(CLOSE_SECONDS)
            raise ConfigurationError(
                f"web: {self._host}:{port} cannot be opened: {error.strerror or error}; give another port",
                name="web",
                value=place,
            ) from None
        host = f"[{self._host}]" if ":" in self._host else self._host
        needs_key = bool(self._acts) or not self._is_local
        self.url = f"http://{host}:{self.port}/" + (f"#{self.key}" if needs_key else "")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Shows nothing any more. May be called again."""
        with suppress(DistroError, TimeoutError, RuntimeError):
            self._loop.run(self._stop(), CLOSE_SECONDS)
        self._loop.stop(CLOSE_SECONDS)

    # -- in the server's thread ----------------------------------------------------------------------------------------

    async def _start(self, port: int) -> int:
        app = web.Application(client_max_size=MAX_BODY, middlewares=[self._guard])
        app.router.add_get("/", self._page)
        app.router.add_get("/events", self._events)
        app.router.add_post("/act", self._act)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        try:
            site = web.TCPSite(self._runner, self._host, port)
            await site.start()
        except BaseException:
            await self._runner.cleanup()
            raise
        self._looking = asyncio.create_task(self._look())
        return int(self._runner.addresses[0][1])

    async def _stop(self) -> None:
        self._looking.cancel()
        for watcher in list(self._watchers):
            _offer(watcher, "")
        await self._runner.cleanup()

    async def _look(self) -> None:
        while True:
            try:
                self._see(self._picture())
            except DistroError:
                pass  # the run is not open yet, or not any more
            await asyncio.sleep(LOOK_SECONDS)

    def _see(self, picture: dict[str, Any]) -> None:
        thinned = self._history.thinned
        point = point_of(self._history, picture)
        messages = [_event("now", {**picture, "acts": sorted(self._acts)})]
        if self._history.thinned != thinned:
            messages.append(_event("history", self._history.record()))
        elif point is not None:
            messages.append(_event("point", asdict(point)))
        self._latest = messages[0]
        for watcher in list(self._watchers):
            for message in messages:
                _offer(watcher, message)

    _latest: str = ""

    # -- requests ------------------------------------------------------------------------------------------------------

    @web.middleware
    async def _guard(self, request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
        name = request.host.rpartition(":")[0] if request.host.rpartition(":")[2].isdigit() else request.host
        if self._is_local and not _is_loopback(name.strip("[]")):
            raise web.HTTPForbidden(text="this page is for this machine alone")
        answer: web.StreamResponse = await handler(request)
        return answer

    async def _page(self, request: web.Request) -> web.Response:
        nonce = secrets.token_urlsafe(KEY_BYTES)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        return web.Response(
            text=self._html.replace("{{nonce}}", nonce),
            content_type="text/html",
            headers={**_HEADERS, "Content-Security-Policy": policy},
        )

    async def _events(self, request: web.Request) -> web.StreamResponse:
        if not self._is_local and not self._has_key(request.query.get("key", "")):
            raise web.HTTPForbidden(text="open the page with the whole address, its part behind # included")
        if len(self._watchers) >= MAX_WATCHERS:
            raise web.HTTPServiceUnavailable(text="too many look at this run already")
        answer = web.StreamResponse(headers={**_HEADERS, "Content-Type": "text/event-stream"})
        watcher: asyncio.Queue[str] = asyncio.Queue(maxsize=64)
        self._watchers.add(watcher)
        try:
            await answer.prepare(request)
            await answer.write((_event("history", self._history.record()) + self._latest).encode())
            while message := await watcher.get():
                await answer.write(message.encode())
        except (ConnectionError, asyncio.CancelledError):
            pass  # the browser has gone, or we go
        finally:
            self._watchers.discard(watcher)
        return answer

    async def _act(self, request: web.Request) -> web.Response:
        if not self._has_key(request.headers.get("X-Key", "")):
            raise web.HTTPForbidden(text="open the page with the whole address, its part behind # included")
        try:
            asked = json.loads(await request.text())
            act, peer = self._acts[asked["act"]], asked.get("peer", "")
            if not isinstance(peer, str):
                raise TypeError(peer)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise web.HTTPBadRequest(text="there is nothing like that to do") from None
        try:
            return web.Response(text=await asyncio.to_thread(act, peer), headers=_HEADERS)
        except DistroError as error:
            raise web.HTTPConflict(text=str(error)) from None

    def _has_key(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self.key.encode())


def _event(kind: str, data: object) -> str:
    # `allow_nan`: what is no number would break the page.
    return f"event: {kind}\ndata: {json.dumps(data, allow_nan=False)}\n\n"


def _offer(watcher: asyncio.Queue[str], message: str) -> None:
    """To a browser that does not keep up, the oldest is lost."""
    if watcher.full():
        watcher.get_nowait()
    watcher.put_nowait(message)


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
