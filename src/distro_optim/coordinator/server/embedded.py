"""The coordinator inside a process that trains: no socket, the same rules.

An :class:`EmbeddedCoordinator` ticks a :class:`~.host.RunHost` and hands every new state to the clients of its own
process. What a message or a tick does is decided in one place, the host, which a server uses as well.

A process that trains and also takes clients from outside runs a :class:`~.server.CoordinatorServer` with a
:class:`~distro_optim.comm.streams.MemoryListener` beside its other listeners, and a
:class:`~.client.RemoteCoordinator` on that.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable

from typing_extensions import override

from ...errors import ConfigurationError, CoordinatorLinkError, JoinRefusedError
from ..client import CoordinatorClient, StateFeed
from ..messages import ClientToServerMessage, Join
from ..types import Coordinator, NodeIdentity, RunState
from .host import Event, PhaseChanged, Refused, RunHost
from .server import TICK_SECONDS, unix_offset

__all__ = ["EmbeddedClient", "EmbeddedCoordinator"]

_log = logging.getLogger(__name__)


class EmbeddedCoordinator:
    """Drives a run and serves the clients of this process.

    To be used as ``async with EmbeddedCoordinator(host) as coordinator: ...``, which ticks in the background; or call
    :meth:`tick` yourself.

    Args:
        host: the run.
        clock: Unix time in seconds.
        tick_seconds: between two ticks.
        draw_seed: 64 fresh random bits. Seeds decide who trains what: nobody should be able to guess them.
        on_events: is told what happens.
    """

    def __init__(
        self,
        host: RunHost,
        *,
        clock: Callable[[], float] | None = None,
        tick_seconds: float = TICK_SECONDS,
        draw_seed: Callable[[], int] = lambda: secrets.randbits(64),
        on_events: Callable[[list[Event]], None] | None = None,
    ) -> None:
        if not tick_seconds > 0:
            raise ConfigurationError(
                f"tick_seconds must be above 0, got {tick_seconds}", name="tick_seconds", value=tick_seconds
            )
        self.host = host
        self._clock = clock or _unix_clock()
        self._now = 0
        self._tick_seconds = tick_seconds
        self._draw_seed = draw_seed
        self._on_events = on_events
        self._feeds: dict[NodeIdentity, StateFeed] = {}
        self._published = host.state
        self._task: asyncio.Task[None] | None = None

    @property
    def state(self) -> Coordinator:
        return self.host.state

    def client(self, identity: NodeIdentity, run_id: str) -> EmbeddedClient:
        """A participant of this process, still to join."""
        return EmbeddedClient(self, identity, run_id)

    def tick(self) -> None:
        """Lets the time go on to what the clock says."""
        self._publish(self.host.tick(self._time(), self._draw_seed()))

    async def __aenter__(self) -> EmbeddedCoordinator:
        self._task = asyncio.create_task(self._keep_ticking(), name="embedded coordinator")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stops ticking; the streams of states end."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        for feed in self._feeds.values():
            feed.end()

    async def _keep_ticking(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        try:
            while True:
                self.tick()
                # Ticks that were missed are not made up for.
                due = max(due + self._tick_seconds, loop.time())
                await asyncio.sleep(due - loop.time())
        except Exception as error:
            _log.exception("the embedded coordinator stopped")
            for feed in self._feeds.values():
                feed.end(error)

    # -- what its clients call -----------------------------------------------------------------------------------------

    def join(self, identity: NodeIdentity, run_id: str, feed: StateFeed) -> None:
        """Takes a client in, or raises JoinRefusedError."""
        if identity in self._feeds:
            raise ConfigurationError(f"client {identity} is in this run already", name="identity", value=identity)
        events = self.host.receive(identity, Join(run_id), self._time(), self._draw_seed())
        for event in events:
            if isinstance(event, Refused):
                hosted = self.host.state.run_id
                raise JoinRefusedError(
                    f"{event.reason} (asked for {run_id!r})",
                    wanted=run_id,
                    hosted=hosted if hosted != run_id else None,
                )
        self._feeds[identity] = feed
        feed.put(self.host.state)
        self._publish(events)

    def receive(self, identity: NodeIdentity, message: ClientToServerMessage) -> None:
        """Passes a message on."""
        self._publish(self.host.receive(identity, message, self._time(), self._draw_seed()))

    def leave(self, identity: NodeIdentity) -> None:
        """Lets a client go."""
        if self._feeds.pop(identity, None) is not None:
            self._publish(self.host.disconnect(identity))

    def _publish(self, events: list[Event]) -> None:
        if any(isinstance(e, PhaseChanged) and e.after is RunState.WAITING_FOR_MEMBERS for e in events):
            for identity in self._feeds:
                # Whom the run has dropped asks again, as a remote client does.
                events += self.host.receive(identity, Join(self.state.run_id), self._now, 0)
        for event in events:
            _log.log(logging.WARNING if isinstance(event, Refused) else logging.DEBUG, "%s", event)
        if self.host.state is not self._published:
            self._published = self.host.state
            for feed in self._feeds.values():
                feed.put(self._published)
        if events and self._on_events is not None:
            self._on_events(events)

    def _time(self) -> int:
        self._now = max(self._now, int(self._clock()))
        return self._now


def _unix_clock() -> Callable[[], float]:
    """Unix time, but setting the machine's clock from now on moves no phase."""
    offset = unix_offset()
    return lambda: time.monotonic() + offset


class EmbeddedClient(CoordinatorClient):
    """A participant in the coordinator's own process; see :meth:`EmbeddedCoordinator.client`."""

    def __init__(self, coordinator: EmbeddedCoordinator, identity: NodeIdentity, run_id: str) -> None:
        self.run_id = run_id
        self.identity = identity
        self._coordinator = coordinator
        self._feed = StateFeed()
        self._joined = False
        self._closed = False

    @property
    @override
    def state(self) -> Coordinator | None:
        return self._feed.latest

    @override
    async def join(self) -> Coordinator:
        if self._joined or self._closed:
            raise ConfigurationError("join() is called once, before close()")
        self._coordinator.join(self.identity, self.run_id, self._feed)
        self._joined = True
        return self._coordinator.state

    @override
    def states(self) -> AsyncIterator[Coordinator]:
        return self._feed.read()

    @override
    async def send(self, message: ClientToServerMessage) -> None:
        if not self._joined or self._closed:
            raise CoordinatorLinkError(
                "no message can go to the coordinator: " + ("closed" if self._closed else "not joined")
            )
        self._coordinator.receive(self.identity, message)

    @override
    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._feed.end()
        if self._joined:
            self._coordinator.leave(self.identity)
