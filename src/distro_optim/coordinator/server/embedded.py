"""A coordinator inside a process that trains, for the participants of this process alone: no socket, the same rules.

An :class:`EmbeddedCoordinator` ticks a :class:`~.host.RunHost` and hands every new state to its participants. What a
message or a tick does is decided in one place, the host, which a server uses as well. A process that trains and also
takes clients from outside runs a :class:`~.server.CoordinatorServer` and joins with its
:meth:`~.server.CoordinatorServer.client`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable

from typing_extensions import override

from ...callbacks import SafeCallback
from ...errors import ConfigurationError
from ..client.interface import CoordinatorClient
from ..client.state_feed import StateFeed
from ..messages import ClientToServerMessage
from ..types import Coordinator, NodeIdentity
from .host import Event, Refused, RunHost
from .in_process import InProcessClient, InProcessCoordinator, LocalParticipants
from .server import TICK_SECONDS, unix_offset

__all__ = ["EmbeddedCoordinator"]

_log = logging.getLogger(__name__)


class EmbeddedCoordinator(InProcessCoordinator):
    """Drives a run and serves the participants of this process.

    Use it as ``async with EmbeddedCoordinator(host) as coordinator: ...``, which ticks in the background, or call
    :meth:`tick` yourself.

    Args:
        host: the run.
        clock: Unix time in seconds; by default the machine's, but setting that clock from now on moves no phase.
        tick_seconds: between two ticks.
        draw_seed: 64 fresh random bits. Seeds decide who trains what, so nobody should be able to guess them.
        on_events: is told what happens; what it raises is logged and stops nothing.

    Raises:
        ConfigurationError: ``tick_seconds`` is not above 0.
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
        self._now = 0.0
        self._tick_seconds = tick_seconds
        self._draw_seed = draw_seed
        self._on_events = SafeCallback(on_events, "on_events") if on_events is not None else None
        self._participants = LocalParticipants(host)
        self._published = host.state
        self._task: asyncio.Task[None] | None = None

    @property
    @override
    def state(self) -> Coordinator:
        return self.host.state

    def client(self, identity: NodeIdentity, run_id: str) -> CoordinatorClient:
        """A participant of this process that has not joined yet."""
        return InProcessClient(self, identity, run_id)

    def tick(self) -> None:
        """Brings the run to the time that the clock shows."""
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
        self._participants.end()

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
            self._participants.end(error)

    # -- what its participants call ------------------------------------------------------------------------------------

    @override
    def join(self, identity: NodeIdentity, run_id: str, feed: StateFeed) -> Coordinator:
        self._publish(self._participants.join(identity, run_id, feed, int(self._time()), self._draw_seed()))
        return self.host.state

    @override
    async def receive(self, identity: NodeIdentity, message: ClientToServerMessage) -> None:
        self._publish(self.host.receive(identity, message, self._time(), self._draw_seed()))
        await asyncio.sleep(0)

    @override
    def leave(self, identity: NodeIdentity) -> None:
        self._publish(self._participants.leave(identity))

    def _publish(self, events: list[Event]) -> None:
        events += self._participants.rejoin(events, int(self._now))
        for event in events:
            _log.log(logging.WARNING if isinstance(event, Refused) else logging.DEBUG, "%s", event)
        if self.host.state is not self._published:
            self._published = self.host.state
            self._participants.publish()
        if events and self._on_events is not None:
            self._on_events(events)

    def _time(self) -> float:
        self._now = max(self._now, self._clock())
        return self._now


def _unix_clock() -> Callable[[], float]:
    offset = unix_offset()
    return lambda: time.monotonic() + offset
