"""A coordinator that clients reach over the network: Psyche's centralized server, on any kind of stream.

All decisions are those of :class:`~.service.CoordinatorService`. Here bytes are moved, a timer ticks and files are
written::

    async with CoordinatorServer(service, [await TcpListener.bind("0.0.0.0", 20000)]) as server:
        await server.wait_finished()
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final

from ..comm.streams import Stream, StreamListener
from ..errors import LimitExceededError
from .host import EpochEnded
from .service import CoordinatorService, ServiceEvent
from .session import Session
from .store import StateStore
from .types import Coordinator, RunState

__all__ = ["TICK_SECONDS", "CoordinatorServer", "unix_offset"]

TICK_SECONDS: Final = 0.5
"""Psyche's tick (``architectures/centralized/server/src/app.rs``)."""

READ_BYTES: Final = 16 * 1024
"""Taken from a client at once; small, so that one that floods is noticed before its messages cost much."""

FLUSH_SECONDS: Final = 2.0
"""How long a client that is shown the door may take to read why."""

_log = logging.getLogger(__name__)


def unix_offset() -> float:
    """Unix time minus monotonic time now, for :class:`~.service.CoordinatorService`."""
    return time.time() - time.monotonic()


class CoordinatorServer:
    """Serves a run until it is closed.

    Args:
        service: the run and its rules.
        listeners: where clients come from, such as TCP and iroh at once.
        store: where the run is kept; None keeps nothing.
        on_event: told of everything that happens, for people to look at.
        clock: monotonic seconds.
        tick_seconds: between two ticks.
    """

    def __init__(
        self,
        service: CoordinatorService,
        listeners: Sequence[StreamListener],
        *,
        store: StateStore | None = None,
        on_event: Callable[[ServiceEvent], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        tick_seconds: float = TICK_SECONDS,
    ) -> None:
        self.service = service
        self._listeners = listeners
        self._store = store
        self._on_event = on_event
        self._clock = clock
        self._tick_seconds = tick_seconds
        self._wakers: dict[Session, asyncio.Event] = {}
        self._readers: dict[Session, asyncio.Task[None]] = {}
        self._tasks: dict[asyncio.Task[None], Stream] = {}
        self._finished = asyncio.Event()
        self._unsaved = asyncio.Event()
        self._running: list[asyncio.Task[None]] = []

    # -- life ------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> CoordinatorServer:
        self._running = [asyncio.create_task(self._accept_from(listener)) for listener in self._listeners]
        self._running.append(asyncio.create_task(self._tick_for_ever()))
        if self._store is not None:
            self._running.append(asyncio.create_task(self._save_for_ever(self._store)))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def wait_finished(self) -> None:
        """Returns when the run has done all of its steps."""
        await self._finished.wait()

    async def close(self) -> None:
        """Saves, and lets everybody go. Calling it again does nothing."""
        running, self._running = self._running, []
        if not running:
            return
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        if self._store is not None:
            # Before the connections go: a client that leaves because we close must not be saved as gone.
            _save(self._store, self._snapshot())
        for listener in self._listeners:
            await listener.close()
        tasks = dict(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in tasks.values():
            await stream.close()  # a task that was cancelled before its first step has not done so

    # -- tasks -----------------------------------------------------------------------------------------------------

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
            session = self.service.connect(stream.peer, self._clock())
        except LimitExceededError as error:
            _log.warning("refused %s: %s", stream.peer, error)
            await stream.close()
            return
        waker = self._wakers[session] = asyncio.Event()
        reader = self._readers[session] = asyncio.create_task(self._read(session, stream))
        writer = asyncio.create_task(self._write(session, stream, waker))
        self._dispatch()
        try:
            done, _ = await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
            if reader in done and not writer.done():
                # What is in line still goes out: the last state tells the client why it is not wanted.
                await asyncio.wait({writer}, timeout=FLUSH_SECONDS)
        finally:
            for task in (reader, writer):
                task.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)
            del self._wakers[session], self._readers[session]
            self.service.disconnect(session)
            self._dispatch()
            await stream.close()

    async def _read(self, session: Session, stream: Stream) -> None:
        try:
            while data := await stream.read(READ_BYTES):
                self.service.receive(session, data, self._clock())
                self._dispatch()
        except OSError as error:
            self.service.disconnect(session, f"the connection broke: {error}")
        else:
            self.service.disconnect(session)
        self._dispatch()
        self._wakers[session].set()

    async def _write(self, session: Session, stream: Stream, waker: asyncio.Event) -> None:
        try:
            while True:
                frame = session.next_frame()
                if frame is not None:
                    await stream.write(frame)
                    session.sent(self._clock())
                elif self.service.has(session):
                    waker.clear()
                    await waker.wait()
                else:
                    return
        except OSError as error:
            self.service.disconnect(session, f"the connection broke: {error}")
            self._dispatch()

    async def _tick_for_ever(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            was_finished = self.service.host.state.run_state is RunState.FINISHED
            self.service.tick(self._clock())
            self._dispatch()
            if was_finished:  # and everybody has been told with the tick before
                self._finished.set()
            # Ticks that were missed are not made up for.
            due = max(due + self._tick_seconds, loop.time())
            await asyncio.sleep(due - loop.time())

    async def _save_for_ever(self, store: StateStore) -> None:
        while True:
            await self._unsaved.wait()
            self._unsaved.clear()
            job = asyncio.ensure_future(asyncio.to_thread(_save, store, self._snapshot()))
            try:
                await asyncio.shield(job)
            except asyncio.CancelledError:
                await asyncio.wait({job})  # two must not write at once, and the last is the one at closing
                raise

    # -- what the service wants done -------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        output = self.service.take_output()
        for session in output.writable:
            if session in self._wakers:
                self._wakers[session].set()
        for session in output.closing:
            if session in self._readers:
                self._readers[session].cancel()
                self._wakers[session].set()
        for event in output.events:
            if isinstance(event, EpochEnded):
                self._unsaved.set()
            if self._on_event is not None:
                self._on_event(event)

    def _snapshot(self) -> Coordinator:
        return self.service.host.snapshot(self.service.unix_time(self._clock()))


def _save(store: StateStore, state: Coordinator) -> None:
    try:
        store.save(state)
    except OSError as error:
        _log.error("the state could not be saved: %s", error)
