"""The coordinator of a run on our own endpoint, open to others: of a run that begins here, or was taken over."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Final

from ...comm.iroh.endpoint import Node
from ...comm.iroh.introduction import Introductions, VersionDesk
from ...comm.iroh.measuring import MeasuringPlace
from ...comm.iroh.rendezvous import Rendezvous
from ...comm.serving.limits import ServerLimits
from ...comm.streams import StreamListener
from ...coordinator.server.host import RunHost
from ...coordinator.server.ledger_file import LedgerFile
from ...coordinator.server.server import CoordinatorServer
from ...coordinator.server.service import CoordinatorService
from ...coordinator.server.store import StateStore

__all__ = ["LIMITS", "OpenCoordinator", "farewell", "open_coordinator"]

LIMITS: Final = ServerLimits(
    messages_per_second=400, messages_burst=2000, bytes_per_second=1 << 20, bytes_burst=4 << 20
)
"""Rounds of a hosted run may take milliseconds, and in each a client sends a report of a kilobyte."""

FAREWELL_SECONDS: Final = 2.0
"""How long the others may take to hear that the run is finished."""

FAREWELL_LOOK_SECONDS: Final = 0.02
"""Between two looks whether they have left."""


@dataclass(frozen=True)
class OpenCoordinator:
    """What is open, from the rules to the sockets."""

    host: RunHost
    service: CoordinatorService
    server: CoordinatorServer
    rendezvous: Rendezvous


async def open_coordinator(
    stack: AsyncExitStack,
    node: Node,
    make_host: Callable[[VersionDesk], RunHost],
    listeners: Sequence[StreamListener],
    *,
    unix_offset: float,
    on_note: Callable[[str], None],
    store: StateStore | None = None,
    ledger: LedgerFile | None = None,
) -> OpenCoordinator:
    """Opens a coordinator, and all that its clients may ask beside it.

    Args:
        stack: closes it.
        node: our endpoint.
        make_host: makes the rules; is given what is known of the versions of those who come.
        listeners: where they come from.
        unix_offset: Unix time of the run minus monotonic time, in seconds.
        on_note: told what people should know.
        store: where the run is kept.
        ledger: where it is written down what clients did.
    """
    desk = VersionDesk(on_note)
    introductions = Introductions(node, desk)
    stack.callback(introductions.close)
    host = make_host(desk)
    service = CoordinatorService(host, draw=os.urandom, unix_offset=unix_offset, limits=LIMITS)
    server = await stack.enter_async_context(CoordinatorServer(service, listeners, store=store, ledger=ledger))
    rendezvous = Rendezvous(node, service.meeting_place)
    stack.callback(rendezvous.close)
    stack.callback(MeasuringPlace(node).close)
    return OpenCoordinator(host, service, server, rendezvous)


async def farewell(opened: OpenCoordinator) -> None:
    """Waits until all others have heard that the run is finished and have left.

    What was sent just before the host closes may never arrive.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(FAREWELL_SECONDS):
            await opened.server.wait_finished()
            while len(opened.host.pending) > 1:
                await asyncio.sleep(FAREWELL_LOOK_SECONDS)
