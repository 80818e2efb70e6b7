"""A swarm between real processes with the weather of a bad network: announcements are lost, peers are cut off.

:class:`~distro_optim.testing.swarm.MemoryNetwork` has weather of its own, for peers of one process. Here it lies around
any swarm and is read from a file, so that the program that runs the processes can change it while they train::

    write_weather(path, Weather(loss=0.3, groups=((alice,), (bob, carol))))  # from outside
    swarm = WeatheredSwarm(swarm, WeatherFile(path))  # in each peer

What is lost here is lost behind the gossip of the real network, which would have repaired it.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from typing_extensions import override

from ..comm.addresses import EndpointAddr
from ..comm.announcements import Announcement, InboxCounts
from ..comm.swarm import Channel, PeerInfo, Swarm
from ..comm.tickets import BlobTicket
from ..errors import BlobUnavailableError

__all__ = ["CLEAR", "Weather", "WeatherFile", "WeatheredSwarm", "write_weather"]


@dataclass(frozen=True, kw_only=True)
class Weather:
    """How bad it is.

    Attributes:
        loss: chance that an announcement does not reach one peer.
        groups: sets of public keys that hear and reach only each other; those not named form one group more.
    """

    loss: float = 0.0
    groups: tuple[tuple[bytes, ...], ...] = ()

    def are_connected(self, one: bytes, other: bytes) -> bool:
        """Whether two peers reach each other."""
        return self._group(one) == self._group(other)

    def _group(self, peer: bytes) -> int:
        return next((number for number, group in enumerate(self.groups) if peer in group), -1)


CLEAR: Final = Weather()
"""Everything arrives."""


def write_weather(path: Path, weather: Weather) -> None:
    """Changes the weather for all who look at ``path``, at once."""
    record = {"loss": weather.loss, "groups": [[peer.hex() for peer in group] for group in weather.groups]}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(record))
    os.replace(temporary, path)


class WeatherFile:
    """The weather that :func:`write_weather` makes; clear if the file is missing. Call it for the present one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read: tuple[int, int] | None = None
        self._weather = CLEAR

    def __call__(self) -> Weather:
        try:
            status = os.stat(self._path)
            version = (status.st_mtime_ns, status.st_ino)
            if version != self._read:
                record: dict[str, Any] = json.loads(self._path.read_text())
                groups = tuple(tuple(bytes.fromhex(peer) for peer in group) for group in record["groups"])
                self._weather, self._read = Weather(loss=record["loss"], groups=groups), version
        except FileNotFoundError:
            self._weather, self._read = CLEAR, None
        return self._weather


class SwarmAround(Swarm):
    """Passes everything on to another swarm; for those that change one thing."""

    def __init__(self, inner: Swarm) -> None:
        self.inner = inner

    @property
    @override
    def peer_id(self) -> bytes:
        return self.inner.peer_id

    @property
    @override
    def address(self) -> EndpointAddr:
        return self.inner.address

    @override
    async def publish(self, data: bytes, tag: str) -> BlobTicket:
        return await self.inner.publish(data, tag)

    @override
    def forget(self, unwanted: Callable[[str], bool]) -> int:
        return self.inner.forget(unwanted)

    @override
    async def announce(self, data: bytes, *, channel: Channel = Channel.RUN, carrying: bytes | None = None) -> None:
        await self.inner.announce(data, channel=channel, carrying=carrying)

    @override
    def announcements(self, channel: Channel = Channel.RUN) -> AsyncIterator[Announcement]:
        return self.inner.announcements(channel)

    @override
    def at_hand(self, ticket: BlobTicket, *, max_size: int, tag: str) -> bytes | None:
        return self.inner.at_hand(ticket, max_size=max_size, tag=tag)

    @override
    async def fetch(
        self, ticket: BlobTicket, providers: Iterable[bytes] = (), *, max_size: int, tag: str | None = None
    ) -> bytes:
        return await self.inner.fetch(ticket, providers, max_size=max_size, tag=tag)

    @override
    def peers(self) -> Sequence[PeerInfo]:
        return self.inner.peers()

    @override
    async def join(self, peers: Iterable[EndpointAddr]) -> None:
        await self.inner.join(peers)

    @override
    def set_allowed(self, peers: Iterable[bytes] | None) -> None:
        self.inner.set_allowed(peers)

    @property
    @override
    def counts(self) -> InboxCounts:
        return self.inner.counts

    @override
    async def aclose(self) -> None:
        await self.inner.aclose()


class WeatheredSwarm(SwarmAround):
    """See the module.

    Args:
        inner: the swarm that carries everything.
        weather: gives the present one.
        rng: decides what is lost.

    Attributes:
        lost: announcements that were.
        cut: fetches and announcements that a partition stopped.
    """

    def __init__(self, inner: Swarm, weather: Callable[[], Weather], rng: random.Random) -> None:
        super().__init__(inner)
        self._weather = weather
        self._rng = rng
        self.lost = 0
        self.cut = 0

    @override
    async def announcements(self, channel: Channel = Channel.RUN) -> AsyncIterator[Announcement]:
        async for announcement in self.inner.announcements(channel):
            weather = self._weather()
            if not weather.are_connected(self.peer_id, announcement.sender):
                self.cut += 1
            elif self._rng.random() < weather.loss:
                self.lost += 1
            else:
                yield announcement

    @override
    async def fetch(
        self, ticket: BlobTicket, providers: Iterable[bytes] = (), *, max_size: int, tag: str | None = None
    ) -> bytes:
        weather = self._weather()
        everybody = list(dict.fromkeys([ticket.addr.id, *providers]))
        reached = [peer for peer in everybody if weather.are_connected(self.peer_id, peer)]
        if not reached:
            self.cut += 1
            raise BlobUnavailableError(f"blob {ticket.hash.hex()}: the network is cut between us and all who have it")
        if reached[0] != ticket.addr.id:  # a ticket's own peer is always asked
            ticket = BlobTicket.raw(EndpointAddr(reached[0]), ticket.hash)
        return await self.inner.fetch(ticket, reached[1:], max_size=max_size, tag=tag)
