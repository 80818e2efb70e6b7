"""What a training client needs of a network of peers, in one object.

A peer puts megabytes where others can fetch them (:meth:`Swarm.publish`), tells everybody in a few hundred bytes
(:meth:`Swarm.announce`), listens (:meth:`Swarm.announcements`), and gets what others put there (:meth:`Swarm.fetch`).
:class:`~distro_optim.comm.iroh.swarm.IrohSwarm` does it over the internet,
:class:`~distro_optim.testing.swarm.MemorySwarm` within one process; both keep the promises made here, which
:mod:`distro_optim.testing.swarm_checks` checks.
"""

from __future__ import annotations

import asyncio
import enum
import random
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Self

from ..errors import ConfigurationError
from .addresses import EndpointAddr
from .announcements import MAX_ANNOUNCEMENT, Announcement, AnnouncementInbox, InboxCounts
from .tickets import BlobTicket

__all__ = [
    "FULL_MESH",
    "MAX_ANNOUNCEMENT",
    "Announcement",
    "AnnouncementStream",
    "Channel",
    "PeerInfo",
    "Swarm",
    "provider_order",
]


FULL_MESH: Final = 16
"""Others in a swarm, up to which a peer should be connected to each of them. A peer has connections to all others in
any case, for their results. With more, what each says to all would take more messages than a tree that bundles them."""


class Channel(enum.Enum):
    """Which listeners get an announcement. What is announced on one channel is never heard on another."""

    RUN = "everybody in the run, Psyche's clients included"
    OWN_KIND = "peers of our own kind, which Psyche's clients are not"


@dataclass(frozen=True, kw_only=True)
class PeerInfo:
    """What is known about another peer.

    Attributes:
        id: its public key.
        is_neighbor: whether announcements are passed to and from it directly.
        path: how it is reached at the moment; "none" if it is not connected.
        rtt: round-trip time in seconds; None if not measured.
        bytes_sent, bytes_received: since the swarm was joined.
        send_rate, receive_rate: bytes a second over the last 15 seconds.
    """

    id: bytes
    is_neighbor: bool
    path: Literal["direct", "relayed", "none"]
    rtt: float | None
    bytes_sent: int
    bytes_received: int
    send_rate: float
    receive_rate: float


class Swarm(ABC):
    """One peer's view of the swarm. All methods belong to one event loop; an ``async with`` block closes it."""

    @property
    @abstractmethod
    def peer_id(self) -> bytes:
        """The own public key, 32 bytes."""

    @property
    @abstractmethod
    def address(self) -> EndpointAddr:
        """Where peers reach us, as far as it is known at this moment."""

    @abstractmethod
    async def publish(self, data: bytes, tag: str) -> BlobTicket:
        """Makes ``data`` available to peers, for as long as the tag stays, and returns a ticket that leads here.

        A tag names one blob; using it again releases what it named before.

        Raises:
            StoreFullError: it does not fit in the store.
            NodeClosedError: the swarm is closed.
        """

    @abstractmethod
    def forget(self, unwanted: Callable[[str], bool]) -> int:
        """Takes off the tags for which ``unwanted(tag)`` holds; their blobs may vanish. Returns how many."""

    @abstractmethod
    async def announce(self, data: bytes, *, channel: Channel = Channel.RUN, carrying: bytes | None = None) -> None:
        """Signs ``data`` and sends it to all peers that listen to ``channel``.

        Delivery is very likely, not certain: say important things again. The same bytes from the same peer are
        delivered once, so what is said again needs another content, such as a counter. The own announcements do not
        come back.

        Args:
            data: at most :data:`MAX_ANNOUNCEMENT` bytes.
            channel: who is to hear it.
            carrying: a published blob that ``data`` names, in a swarm where all are of our own kind and listen to both
                channels. It may go along, so that who hears ``data`` has it already when it fetches it.

        Raises:
            ConfigurationError: longer than :data:`MAX_ANNOUNCEMENT` bytes.
            NodeClosedError: the swarm is closed.
        """

    @abstractmethod
    def announcements(self, channel: Channel = Channel.RUN) -> AsyncIterator[Announcement]:
        """What peers announce on ``channel``, each once, in the order of arrival; ends when the swarm is closed.

        Unread announcements wait in a bounded queue, in which new ones displace old ones of the same peer.
        """

    @abstractmethod
    async def fetch(
        self, ticket: BlobTicket, providers: Iterable[bytes] = (), *, max_size: int, tag: str | None = None
    ) -> bytes:
        """The bytes of a ticket, verified against its hash.

        The ticket's peer and ``providers`` are tried one after the other, the nearest first. Cancelling is safe.

        Args:
            ticket: of one raw blob.
            providers: further peers that may have it.
            max_size: bytes; a larger blob is refused.
            tag: keeps the blob, and so offers it to others; None keeps it no longer than this call.

        Raises:
            BlobUnavailableError: no provider sent it.
            StoreFullError: there is no room for it.
            NodeClosedError: the swarm is closed.
        """

    def at_hand(self, ticket: BlobTicket, *, max_size: int, tag: str) -> bytes | None:
        """What :meth:`fetch` would return, if it is here already since it came along with its announcement; None if it
        has to be fetched."""
        return None

    @abstractmethod
    def peers(self) -> Sequence[PeerInfo]:
        """Peers that are or were connected."""

    @abstractmethod
    async def join(self, peers: Iterable[EndpointAddr]) -> None:
        """Gets in touch with the swarm through ``peers``; returns without waiting for it."""

    @abstractmethod
    def set_allowed(self, peers: Iterable[bytes] | None) -> None:
        """Replaces the peers that may connect, be dialled and be heard; None allows everybody."""

    def set_watchers(self, watchers: Iterable[bytes]) -> None:  # noqa: B027 - not every network has any
        """Replaces those that may fetch what peers publish, the model, and hear announcements, beside those that are
        allowed. Nothing that they say is heard."""

    @property
    @abstractmethod
    def counts(self) -> InboxCounts:
        """What became of the announcements that arrived on :attr:`Channel.RUN`."""

    @abstractmethod
    async def aclose(self) -> None:
        """Leaves the swarm. Idempotent."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def provider_order(
    ticket: BlobTicket, providers: Iterable[bytes], me: bytes, rtts: Mapping[bytes, float], rng: random.Random
) -> list[bytes]:
    """In which order to ask for a blob: those with a known round-trip time first, the nearest of them first.

    Peers of unknown distance are shuffled, so that a swarm does not turn to one peer all at once. As Psyche's clients
    do it (``shared/network/src/latency_sorted.rs``).
    """
    candidates = list(dict.fromkeys([ticket.addr.id, *providers]))
    candidates = [peer for peer in candidates if peer != me]
    rng.shuffle(candidates)
    return sorted(candidates, key=lambda peer: rtts.get(peer, float("inf")))


def check_announcement(data: bytes) -> None:
    """Raises ConfigurationError if ``data`` is too long to be announced."""
    if len(data) > MAX_ANNOUNCEMENT:
        raise ConfigurationError(
            f"an announcement has at most {MAX_ANNOUNCEMENT} bytes, got {len(data)}; publish it, announce its ticket",
            name="data",
        )


class AnnouncementStream:
    """An inbox that can be waited for. On one loop; for implementations of :class:`Swarm`."""

    def __init__(self, inbox: AnnouncementInbox) -> None:
        self.inbox = inbox
        self._arrived = asyncio.Event()
        self._closed = False

    def deliver(self, sealed: bytes | memoryview, via: bytes | None = None) -> bool:
        """Takes in what arrived for everybody; whether it is one that was not here before, of a peer that counts.
        ``via`` as for :meth:`.AnnouncementInbox.open`."""
        if self._closed or self.inbox.receive(sealed, via) is None:
            return False
        self._arrived.set()
        return True

    def open(self, sealed: bytes | memoryview, via: bytes | None = None) -> Announcement | None:
        """What :meth:`deliver` would take in; it is not taken in yet."""
        return None if self._closed else self.inbox.open(sealed, via)

    def push(self, announcement: Announcement) -> bool:
        """Takes in what :meth:`open` gave; True."""
        self.inbox.push(announcement)
        self._arrived.set()
        return True

    def admit(self, announcement: Announcement) -> bool:
        """Takes in what was said on another channel; whether it was not here before."""
        if not self.inbox.admit(announcement):
            return False
        self._arrived.set()
        return True

    def close(self) -> None:
        """Lets the iterators end once they have read what is there."""
        self._closed = True
        self._arrived.set()

    async def __aiter__(self) -> AsyncIterator[Announcement]:
        while True:
            while (announcement := self.inbox.take()) is not None:
                yield announcement
            if self._closed:
                return
            self._arrived.clear()
            await self._arrived.wait()
