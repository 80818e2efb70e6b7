"""The sockets of any server of connections: it moves bytes, keeps one timer and decides nothing."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Final, Self

from ...errors import LimitExceededError
from ..streams import Stream, StreamListener
from .connection import Connection
from .service import CLOSED_BY_CLIENT, ConnectionService, Output

__all__ = ["TICK_SECONDS", "StreamServer"]

TICK_SECONDS: Final = 0.5
"""Psyche's tick (``architectures/centralized/server/src/app.rs``)."""

READ_BYTES: Final = 16 * 1024
"""Read from a client at once; small, so that a flood is noticed before its messages cost much."""

FLUSH_SECONDS: Final = 2.0
"""How long a client that is being cut off may take to read why."""

_log = logging.getLogger(__name__)


class StreamServer:
    """Serves until it is closed; used as an asynchronous context manager.

    Args:
        service: the rules.
        listeners: where clients come from, such as TCP and iroh at once.
        on_event: told of everything that happens. An exception of it is logged.
        clock: monotonic seconds.
        tick_seconds: between two ticks.
    """

    def __init__(
        self,
        service: ConnectionService,
        listeners: Sequence[StreamListener],
        *,
        on_event: Callable[[Any], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        tick_seconds: float = TICK_SECONDS,
    ) -> None:
        self._service = service
        self._listeners = listeners
        self._on_event = on_event
        self._clock = clock
        self._tick_seconds = tick_seconds
        self._wakers: dict[Connection, asyncio.Event] = {}
        self._readers: dict[Connection, asyncio.Task[None]] = {}
        self._tasks: dict[asyncio.Task[None], Stream] = {}
        self._running: list[asyncio.Task[None]] = []
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # -- life ----------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._running = [asyncio.create_task(self._accept_from(listener)) for listener in self._listeners]
        self._running.append(asyncio.create_task(self._keep_ticking()))
        self._running += [asyncio.create_task(work) for work in self._background()]
        for task in self._running:
            task.add_done_callback(self._watch)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes all connections. Calling it again does nothing."""
        running, self._running = self._running, []
        if not running:
            return
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        self._before_closing()
        for listener in self._listeners:
            await listener.close()
        tasks = dict(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in tasks.values():
            await stream.close()  # a task that was cancelled before its first step has not done so

    async def wait_failed(self) -> None:
        """Never returns; raises the error that broke the server, if one of its own tasks breaks."""
        await asyncio.shield(self._failed)

    def _watch(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._failed.done():
            _log.error("the server broke", exc_info=error)
            self._failed.set_exception(error)
            self._failed.exception()  # marks it as seen: nobody has to wait for it
            self._broken(error)

    # -- tasks ---------------------------------------------------------------------------------------------------------

    async def _accept_from(self, listener: StreamListener) -> None:
        while True:
            try:
                stream = await listener.accept()
            except ConnectionError:
                return
            task = asyncio.create_task(self._serve(stream))
            self._tasks[task] = stream
            task.add_done_callback(self._tasks.pop)

    async def _serve(self, stream: Stream) -> None:
        try:
            connection = self._service.connect(stream.peer, self._clock(), stream.place)
        except LimitExceededError as error:
            _log.debug("refused %s: %s", stream.peer, error)  # no more: strangers must not fill the log
            await stream.close()
            return
        waker = self._wakers[connection] = asyncio.Event()
        reader = self._readers[connection] = asyncio.create_task(self._read(connection, stream))
        writer = asyncio.create_task(self._write(connection, stream, waker))
        self._dispatch()
        try:
            done, _ = await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
            if reader in done and not writer.done():
                # What is in line still goes out: the last state shows the client why it is refused.
                await asyncio.wait({writer}, timeout=FLUSH_SECONDS)
        finally:
            for task in (reader, writer):
                task.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)
            del self._wakers[connection], self._readers[connection]
            self._gone(connection)
            self._dispatch()
            await stream.close()

    async def _read(self, connection: Connection, stream: Stream) -> None:
        try:
            while data := await stream.read(READ_BYTES):
                self._service.receive(connection, data, self._clock())
                self._dispatch()
        except OSError as error:
            self._gone(connection, f"the connection broke: {error}")
        else:
            self._gone(connection)
        self._dispatch()
        self._wakers[connection].set()

    async def _write(self, connection: Connection, stream: Stream, waker: asyncio.Event) -> None:
        try:
            while True:
                frame = connection.next_frame()
                if frame is not None:
                    await stream.write(frame)
                    connection.sent(self._clock())
                elif self._service.has(connection):
                    waker.clear()
                    await waker.wait()
                else:
                    return
        except OSError as error:
            self._gone(connection, f"the connection broke: {error}")
            self._dispatch()

    def _gone(self, connection: Connection, reason: str = CLOSED_BY_CLIENT) -> None:
        self._clock()  # first: if we have slept, it is not the client who was silent
        self._service.disconnect(connection, reason)

    async def _keep_ticking(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            self._tick()
            # Ticks that were missed are not made up for.
            due = max(due + self._tick_seconds, loop.time())
            await asyncio.sleep(due - loop.time())

    # -- what the service wants done -----------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        self._handle(self._service.take_output())

    def _handle(self, output: Output) -> None:
        for connection in output.writable:
            if connection in self._wakers:
                self._wakers[connection].set()
        for connection in output.closing:
            if connection in self._readers:
                self._readers[connection].cancel()
                self._wakers[connection].set()
        for event in output.events:
            self._note(event)
            if self._on_event is not None:
                try:
                    self._on_event(event)
                except Exception:
                    # An observer must not be able to stop what it observes.
                    _log.exception("on_event failed at %s", event)

    # -- what a server may add -----------------------------------------------------------------------------------------

    def _background(self) -> list[Coroutine[Any, Any, None]]:
        """More tasks that run as long as the server."""
        return []

    def _broken(self, error: BaseException) -> None:
        """One of the server's own tasks has broken."""

    def _before_closing(self) -> None:
        """Called while all clients are still connected."""

    def _tick(self) -> None:
        self._service.tick(self._clock())
        self._dispatch()

    def _note(self, event: Any) -> None:
        """Something happened."""
