"""A coordinator that clients reach over the network: Psyche's centralized server, on any kind of stream.

All decisions are those of :class:`~.service.CoordinatorService`; the
:class:`~distro_optim.comm.serving.stream_server.StreamServer` moves the bytes. Here the run is kept in files, and
participants of the same process join without a connection::

    async with CoordinatorServer(service, [await TcpListener.bind("0.0.0.0", 20000)]) as server:
        await server.client(identity, "my-run").join()
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
from ...comm.serving.watched_clock import WatchedClock
from ...comm.streams import StreamListener
from ...errors import CoordinatorLinkError
from ..client.interface import CoordinatorClient
from ..client.state_feed import StateFeed
from ..messages import ClientToServerMessage
from ..rules.points import EpochAccount
from ..types import Coordinator, NodeIdentity, RunState
from .control import ControlFolder
from .host import EpochEnded, PhaseChanged
from .in_process import InProcessClient, InProcessCoordinator
from .ledger_file import LedgerFile
from .service import CoordinatorService, ServiceEvent
from .store import StateStore

__all__ = ["TICK_SECONDS", "CoordinatorServer", "unix_offset"]

_log = logging.getLogger(__name__)


def unix_offset() -> float:
    """Unix time minus monotonic time now, for :class:`~.service.CoordinatorService`."""
    return time.time() - time.monotonic()


class CoordinatorServer(StreamServer, InProcessCoordinator):
    """Serves a run until it is closed.

    Args:
        service: the run and its rules.
        listeners: where clients come from, such as TCP and iroh at once.
        store: where the run is kept; None keeps nothing.
        ledger: where it is written down what clients did in each epoch, if the service's host keeps accounts.
        on_event: told of everything that happens, for people to look at. An exception of it is logged.
        clock: monotonic seconds.
        tick_seconds: between two ticks.
    """

    def __init__(
        self,
        service: CoordinatorService,
        listeners: Sequence[StreamListener],
        *,
        store: StateStore | None = None,
        ledger: LedgerFile | None = None,
        on_event: Callable[[ServiceEvent], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        tick_seconds: float = TICK_SECONDS,
    ) -> None:
        watched = WatchedClock(clock, service.woke)
        super().__init__(service, listeners, on_event=on_event, clock=watched, tick_seconds=tick_seconds)
        self.service = service
        self._store = store
        self._ledger = ledger
        self._accounts: list[tuple[EpochAccount, int]] = []
        self._control = None if store is None else ControlFolder(store.directory, store.run_id)
        self._finished = asyncio.Event()
        self._unsaved = asyncio.Event()

    async def wait_finished(self) -> None:
        """Returns when the run has done all of its steps."""
        await self._finished.wait()

    def client(self, identity: NodeIdentity, run_id: str) -> CoordinatorClient:
        """A participant of this process that has not joined yet; to be used on the server's event loop."""
        return InProcessClient(self, identity, run_id)

    @property
    @override
    def state(self) -> Coordinator:
        return self.service.host.state

    @override
    def join(self, identity: NodeIdentity, run_id: str, feed: StateFeed) -> Coordinator:
        self.service.join_locally(identity, run_id, feed, self._clock())
        self._dispatch()
        return self.service.host.state

    @override
    async def receive(self, identity: NodeIdentity, message: ClientToServerMessage) -> None:
        self.service.receive_locally(identity, message, self._clock())
        self._dispatch()
        await asyncio.sleep(0)

    @override
    def leave(self, identity: NodeIdentity) -> None:
        self.service.leave_locally(identity, self._clock())
        self._dispatch()

    @override
    def _background(self) -> list[Coroutine[Any, Any, None]]:
        return [] if self._store is None else [self._keep_saving(self._store)]

    @override
    def _before_closing(self) -> None:
        # Before the connections go: a client that leaves because we close must not be saved as gone.
        if self._store is not None:
            _save(self._store, self._snapshot())
        self._write_down()
        self.service.local.end()

    @override
    def _broken(self, error: BaseException) -> None:
        failure = CoordinatorLinkError(f"the coordinator in this process has stopped: {error}")
        failure.__cause__ = error
        self.service.local.end(failure)

    @override
    def _tick(self) -> None:
        if self._control is not None:
            now = self._clock()
            events = self._control.carry_out(self.service.host, self.service.unix_time(now))
            if events is not None:
                self.service.note(events, now)
                self._unsaved.set()
        was_finished = self.service.host.state.run_state is RunState.FINISHED
        super()._tick()
        if was_finished:  # so all clients were told with the tick before
            self._finished.set()

    @override
    def _note(self, event: ServiceEvent) -> None:
        is_pause = isinstance(event, PhaseChanged) and RunState.PAUSED in (event.before, event.after)
        if is_pause or isinstance(event, EpochEnded):
            if isinstance(event, EpochEnded) and event.account is not None:
                self._accounts.append((event.account, self.service.unix_time(self._clock())))
            self._unsaved.set()

    async def _keep_saving(self, store: StateStore) -> None:
        while True:
            await self._unsaved.wait()
            self._unsaved.clear()
            job = asyncio.ensure_future(asyncio.to_thread(self._keep, store, self._snapshot()))
            try:
                await asyncio.shield(job)
            except asyncio.CancelledError:
                await asyncio.wait({job})  # two must not write at once, and the one at closing has to be the last
                raise

    def _keep(self, store: StateStore, state: Coordinator) -> None:
        # In this order: a server that is killed in between forgets points, and never gives them twice.
        _save(store, state)
        self._write_down()

    def _write_down(self) -> None:
        """Appends to the ledger what is not there yet."""
        while self._ledger is not None and self._accounts:
            account, now = self._accounts[0]
            try:
                self._ledger.append(account, now)
            except OSError as error:
                _log.error("the ledger could not be written: %s", error)
                return
            del self._accounts[0]

    def _snapshot(self) -> Coordinator:
        return self.service.host.snapshot(self.service.unix_time(self._clock()))


def _save(store: StateStore, state: Coordinator) -> None:
    try:
        store.save(state)
    except OSError as error:
        _log.error("the state could not be saved: %s", error)
