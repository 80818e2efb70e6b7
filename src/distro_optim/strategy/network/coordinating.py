"""The coordinator of a run on our own endpoint, open to others: of a run that begins here, or was taken over."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ...comm.iroh.endpoint import Node
from ...comm.iroh.introduction import Introductions, VersionDesk
from ...comm.iroh.measuring import MeasuringPlace
from ...comm.iroh.rendezvous import Rendezvous
from ...comm.iroh.swarm import IrohSwarm
from ...comm.loop import LoopThread
from ...comm.serving.limits import ServerLimits
from ...comm.signing import SecretKey
from ...comm.streams import StreamListener
from ...coordinator.rules.checkpoints import audit_fraction_of
from ...coordinator.rules.points import Account, ClientAccount
from ...coordinator.server.acting import HostActs, ServiceActs
from ...coordinator.server.host import RunHost
from ...coordinator.server.ledger_file import LedgerFile
from ...coordinator.server.server import CoordinatorServer
from ...coordinator.server.service import CoordinatorService
from ...coordinator.server.store import StateStore
from ...coordinator.types import ClientState, Coordinator, NodeIdentity, WitnessMetadata
from ..rounds.trust.estate import MAX_KEYS, Estate, LedgerEnd

__all__ = ["LIMITS", "Books", "HostingPeer", "OpenCoordinator", "farewell", "open_books", "open_coordinator"]

LIMITS: Final = ServerLimits(
    messages_per_second=400, messages_burst=2000, bytes_per_second=1 << 20, bytes_burst=4 << 20
)
"""Rounds of a hosted run may take milliseconds, and in each a client sends a report of a kilobyte."""

FAREWELL_SECONDS: Final = 2.0
"""How long the others may take to hear that the run is finished."""

FAREWELL_LOOK_SECONDS: Final = 0.02
"""Between two looks whether they have left."""


@dataclass(frozen=True, kw_only=True)
class HostingPeer:
    """The peer that hosts a run, or may have to.

    Attributes:
        node: its endpoint.
        key: its key.
        loop: the network's.
        folder: where states and a ledger go if it takes a run over; None keeps none.
        keep_banned: see :class:`~distro_optim.coordinator.server.acting.ServiceActs`.
    """

    node: Node
    key: SecretKey
    loop: LoopThread
    folder: Path | None = None
    keep_banned: Callable[[Collection[bytes]], bool] | None = None

    @property
    def identity(self) -> NodeIdentity:
        """As a client of the run."""
        return NodeIdentity.from_single_key(self.key.public)


@dataclass(frozen=True)
class Books:
    """Where a host writes down what goes on."""

    store: StateStore
    ledger: LedgerFile


def open_books(
    stack: AsyncExitStack,
    directory: str | os.PathLike[str],
    run_id: str,
    key: SecretKey,
    *,
    after: LedgerEnd | None = None,
) -> Books:
    """Opens the folder with a run's states and its ledger.

    Args:
        stack: closes it.
        directory: the folder.
        run_id: the run.
        key: of the host, which signs the ledger.
        after: the end of the ledger of the host before.

    Raises:
        ConfigurationError: the folder cannot be used, or the ledger is damaged.
    """
    store = stack.enter_context(StateStore(directory, run_id))
    return Books(store, LedgerFile(store.directory, run_id, key, follows=None if after is None else after.line.hex()))


@dataclass(frozen=True, kw_only=True)
class OpenCoordinator:
    """What is open, from the rules to the sockets, and what a host sees and does there.

    Attributes:
        peer: that hosts.
        ledger: of the run; None if none is kept.
        keeps_books: whether whoever hosts next should write things down, whether or not that can be done here.
        joiner_wait_time: see :class:`~distro_optim.coordinator.server.host.RunHost`.
        acts: for people.
    """

    peer: HostingPeer
    host: RunHost
    service: CoordinatorService
    server: CoordinatorServer
    rendezvous: Rendezvous
    ledger: LedgerFile | None
    keeps_books: bool
    joiner_wait_time: int | None
    acts: HostActs

    @property
    def estate(self) -> Estate:
        """What the next host has to know."""
        allowed, banned, ledger = self.host.allowed, self.host.banned, self.ledger
        last = None if ledger is None else ledger.last
        return Estate(
            allowed=None if allowed is None else tuple(sorted(allowed))[:MAX_KEYS],
            banned=tuple(sorted(banned))[:MAX_KEYS],
            joiner_wait_time=self.joiner_wait_time,
            keeps_books=self.keeps_books,
            ledger=None if last is None else LedgerEnd(self.peer.key.public, bytes.fromhex(last)),
        )

    def go_on(self, gone: NodeIdentity | None) -> None:
        """The state is that of another host, or of our own before it was started again: its clients are ours, and have
        some seconds to come.

        Args:
            gone: the other host, which is not in the epoch any more; or we, as we have lost what we had.
        """
        me, state, now = self.peer.identity, self.host.state, time.monotonic()
        members = [client.id for client in state.epoch_state.clients if client.state is ClientState.HEALTHY]
        self.host.trust(me)
        self.host.take_over(gone, self.service.unix_time(now))
        self.service.expect([client for client in members if client not in (me, gone)], now)

    @property
    def reports(self) -> Mapping[NodeIdentity, WitnessMetadata]:
        """What clients last reported."""
        return self.host.reports

    @property
    def waiting(self) -> int:
        """Others that wait for the next epoch."""
        members = {self.peer.identity, *(client.id for client in self.host.state.epoch_state.clients)}
        return sum(client not in members for client in self.host.pending)

    @property
    def points(self) -> Mapping[bytes, ClientAccount] | None:
        """Of each client so far; None if nobody counts."""
        return self.host.points

    def on_audit(self, peer: bytes, passed: bool) -> bool:
        """Auditors have decided about a peer; returns whether one that failed was taken out."""
        return self.service.audited(peer, time.monotonic(), passed=passed)


async def open_coordinator(
    stack: AsyncExitStack,
    peer: HostingPeer,
    state: Coordinator,
    listeners: Sequence[StreamListener],
    *,
    estate: Estate,
    unix_offset: float,
    on_note: Callable[[str], None],
    swarm: Callable[[], IrohSwarm | None],
    may_end_round: Callable[[Coordinator], bool] = lambda state: True,
    may_begin: Callable[[Collection[NodeIdentity]], bool] = lambda clients: True,
    peers_to_start: int = 1,
    books: Books | None = None,
    watchers: frozenset[bytes] = frozenset(),
) -> OpenCoordinator:
    """Opens a coordinator, and all that its clients may ask beside it. For a run that begins, and one taken over.

    Args:
        stack: closes it.
        peer: hosts it.
        state: where the run begins, or goes on.
        listeners: where clients come from.
        estate: what it decides by.
        unix_offset: Unix time of the run minus monotonic time, in seconds.
        on_note: told what people should know.
        swarm: of the run, once there is one.
        may_end_round, may_begin, peers_to_start: see :class:`~distro_optim.coordinator.server.host.RunHost`.
        books: where the run is written down; None does not.
        watchers: public keys of those that may look at the run without being in it.
    """
    node, own = peer.node, peer.key.public
    desk = VersionDesk(on_note)
    introductions = Introductions(node, desk)
    stack.callback(introductions.close)

    def received() -> dict[bytes, int]:
        ours = swarm()
        return {} if ours is None else {one.id: one.bytes_received for one in ours.peers()}

    counts = books is not None or audit_fraction_of(state.model.checkpoint)
    host = RunHost(
        state,
        allowed=estate.allowed,
        banned=estate.banned,
        why_not=lambda public: None if public == own else desk.why_not(public),
        joiner_wait_time=estate.joiner_wait_time,
        peers_to_start=peers_to_start,
        max_pending=LIMITS.connections,
        account=Account(received) if counts else None,
        may_begin=may_begin,
        may_end_round=may_end_round,
    )
    service = CoordinatorService(host, draw=os.urandom, unix_offset=unix_offset, limits=LIMITS, watchers=watchers)
    store, ledger = (None, None) if books is None else (books.store, books.ledger)
    server = await stack.enter_async_context(CoordinatorServer(service, listeners, store=store, ledger=ledger))
    rendezvous = Rendezvous(node, service.meeting_place)
    stack.callback(rendezvous.close)
    stack.callback(MeasuringPlace(node).close)
    acts = ServiceActs(service, time.monotonic, peer.loop.submit, own=own, keep=peer.keep_banned)
    return OpenCoordinator(
        peer=peer,
        host=host,
        service=service,
        server=server,
        rendezvous=rendezvous,
        ledger=ledger,
        keeps_books=books is not None or estate.keeps_books,
        joiner_wait_time=estate.joiner_wait_time,
        acts=acts,
    )


async def farewell(opened: OpenCoordinator) -> None:
    """Waits until all others have heard that the run is finished and have left.

    What was sent just before the host closes may never arrive.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(FAREWELL_SECONDS):
            await opened.server.wait_finished()
            while len(opened.host.pending) > 1:
                await asyncio.sleep(FAREWELL_LOOK_SECONDS)
