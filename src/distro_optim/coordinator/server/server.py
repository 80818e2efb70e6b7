"""A coordinator that clients reach over the network: Psyche's centralized server, on any kind of stream.

All decisions are those of :class:`~.service.CoordinatorService`; :class:`~.stream_server.StreamServer` moves the
bytes. Here the run is kept in files::

    async with CoordinatorServer(service, [await TcpListener.bind("0.0.0.0", 20000)]) as server:
        await server.wait_finished()
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from typing_extensions import override

from ...comm.serving.stream_server import TICK_SECONDS, StreamServer
from ...comm.streams import StreamListener
from ..types import Coordinator, RunState
from .host import EpochEnded
from .service import CoordinatorService, ServiceEvent
from .store import StateStore

__all__ = ["TICK_SECONDS", "CoordinatorServer", "unix_offset"]

_log = logging.getLogger(__name__)


def unix_offset() -> float:
    """Unix time minus monotonic time now, for :class:`~.service.CoordinatorService`."""
    return time.time() - time.monotonic()


class CoordinatorServer(StreamServer):
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
        super().__init__(service, listeners, on_event=on_event, clock=clock, tick_seconds=tick_seconds)
        self.service = service
        self._store = store
        self._finished = asyncio.Event()
        self._unsaved = asyncio.Event()

    async def wait_finished(self) -> None:
        """Returns when the run has done all of its steps."""
        await self._finished.wait()

    @override
    def _background(self) -> list[Coroutine[Any, Any, None]]:
        return [] if self._store is None else [self._save_for_ever(self._store)]

    @override
    def _before_closing(self) -> None:
        # Before the connections go: a client that leaves because we close must not be saved as gone.
        if self._store is not None:
            _save(self._store, self._snapshot())

    @override
    def _tick(self) -> None:
        was_finished = self.service.host.state.run_state is RunState.FINISHED
        super()._tick()
        if was_finished:  # and everybody has been told with the tick before
            self._finished.set()

    @override
    def _note(self, event: ServiceEvent) -> None:
        if isinstance(event, EpochEnded):
            self._unsaved.set()

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

    def _snapshot(self) -> Coordinator:
        return self.service.host.snapshot(self.service.unix_time(self._clock()))


def _save(store: StateStore, state: Coordinator) -> None:
    try:
        store.save(state)
    except OSError as error:
        _log.error("the state could not be saved: %s", error)
