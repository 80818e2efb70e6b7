"""A swarm within one process, with the weather of a real network: latency, loss, partitions, liars.

::

    network = MemoryNetwork(latency=(0.01, 0.05), loss=0.02, seed=7)
    alice, bob = network.join(), network.join()
    network.partition([alice.peer_id], [bob.peer_id])
    network.corrupt(bob.peer_id)

Everything runs on the event loop of the test; the weather is drawn from the seed.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Final

from blake3 import blake3
from typing_extensions import override

from ..comm.addresses import EndpointAddr
from ..comm.announcements import Announcement, AnnouncementInbox, InboxCounts, InboxLimits
from ..comm.meter import RateMeter
from ..comm.signing import SecretKey, SignedMessage
from ..comm.swarm import AnnouncementStream, Channel, PeerInfo, Swarm, check_announcement, provider_order
from ..comm.tickets import BlobTicket
from ..errors import (
    BlobUnavailableError,
    ConfigurationError,
    ConnectionLostError,
    DistroError,
    HashMismatchError,
    LimitExceededError,
    NodeClosedError,
    PeerRefusedError,
    PeerUnreachableError,
    StoreFullError,
)

__all__ = ["MemoryNetwork", "MemorySwarm"]

BITS_PER_BYTE: Final = 8


class MemoryNetwork:
    """What lies between the peers.

    Args:
        latency: one-way seconds, drawn evenly between the two for each message.
        loss: chance that an announcement does not reach one peer, or that a fetch from one provider fails.
        bandwidth: bits per second of each peer's line, in each direction; None is unlimited. What a peer sends or
            receives waits until the line is free.
        seed: of the weather and of the keys that :meth:`join` makes.

    Raises:
        ConfigurationError: an argument is out of its range.
    """

    def __init__(
        self,
        *,
        latency: tuple[float, float] = (0.0, 0.0),
        loss: float = 0.0,
        bandwidth: float | None = None,
        seed: int = 0,
    ) -> None:
        low, high = latency
        if not 0 <= low <= high:
            raise ConfigurationError(f"latency is a pair 0 <= low <= high, got {latency}", name="latency")
        if not 0 <= loss <= 1:
            raise ConfigurationError(f"loss is a chance between 0 and 1, got {loss}", name="loss", value=loss)
        if bandwidth is not None and not bandwidth > 0:
            raise ConfigurationError(f"bandwidth must be above 0, got {bandwidth}", name="bandwidth", value=bandwidth)
        self.latency = latency
        self.loss = loss
        self.bandwidth = bandwidth
        # When each peer's line is free again, by direction.
        self._sending_until: defaultdict[bytes, float] = defaultdict(float)
        self._receiving_until: defaultdict[bytes, float] = defaultdict(float)
        self._rng = random.Random(seed)
        self._members: dict[bytes, MemorySwarm] = {}
        self._groups: dict[bytes, int] = {}
        self._corrupt: set[bytes] = set()

    def join(
        self,
        *,
        secret_key: SecretKey | None = None,
        allowed: Iterable[bytes] | None = None,
        max_bytes: int | None = None,
        inbox_limits: InboxLimits | None = None,
    ) -> MemorySwarm:
        """A new peer, connected to all others at once; its key comes from the seed if none is given."""
        key = secret_key if secret_key is not None else SecretKey(self._rng.randbytes(32))
        swarm = MemorySwarm(self, key, self._rng.randbytes(16), allowed, max_bytes, inbox_limits)
        self._members[key.public] = swarm
        return swarm

    def partition(self, *groups: Iterable[bytes]) -> None:
        """Cuts the network in ``groups`` of peers; those not named form one group more. Replaces the last cut."""
        self._groups = {peer: number for number, group in enumerate(groups) for peer in group}

    def heal(self) -> None:
        """Ends the partition."""
        self._groups = {}

    def corrupt(self, peer: bytes) -> None:
        """From now on, what is fetched from ``peer`` arrives with one bit flipped."""
        self._corrupt.add(peer)

    def transit(self, sender: bytes, receiver: bytes, size: int) -> float:
        """Seconds until ``size`` bytes that are sent now have arrived; takes up both lines meanwhile.

        Each line serves in order what it gets. A sender's goes on while bytes wait for a receiver's that is busy.
        """
        if self.bandwidth is None:
            return self._delay()
        now = asyncio.get_running_loop().time()
        seconds = BITS_PER_BYTE * size / self.bandwidth
        sent = max(now, self._sending_until[sender]) + seconds
        # The first byte comes out as soon as it was sent, not only when the last one was.
        received = max(sent, self._receiving_until[receiver] + seconds)
        self._sending_until[sender], self._receiving_until[receiver] = sent, received
        return received - now + self._delay()

    # -- for MemorySwarm -----------------------------------------------------------------------------------------------

    def _other_members(self, me: bytes) -> list[MemorySwarm]:
        return [swarm for peer, swarm in self._members.items() if peer != me]

    def _leave(self, peer: bytes) -> None:
        self._members.pop(peer, None)

    def _is_connected(self, one: bytes, other: bytes) -> bool:
        return self._groups.get(one, -1) == self._groups.get(other, -1)

    def _delay(self) -> float:
        return self._rng.uniform(*self.latency)

    def _is_lost(self) -> bool:
        return self._rng.random() < self.loss

    def _provider(self, me: bytes, peer: bytes) -> MemorySwarm:
        """The peer, if a connection to it can be made; raises ExchangeError."""
        other = self._members.get(peer)
        if other is None or not self._is_connected(me, peer):
            raise PeerUnreachableError(f"{peer.hex()[:10]} cannot be reached")
        if not other._allows(me):
            raise PeerRefusedError(f"{peer.hex()[:10]} does not allow us")
        return other

    def _in_transit(self, peer: bytes, data: bytes) -> bytes:
        if peer not in self._corrupt or not data:
            return data
        at = self._rng.randrange(len(data))
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


class MemorySwarm(Swarm):
    """One peer of a :class:`MemoryNetwork`; made by :meth:`MemoryNetwork.join`."""

    def __init__(
        self,
        network: MemoryNetwork,
        secret_key: SecretKey,
        salt: bytes,
        allowed: Iterable[bytes] | None,
        max_bytes: int | None,
        inbox_limits: InboxLimits | None,
    ) -> None:
        self._network = network
        self._key = secret_key
        self._allowed = None if allowed is None else frozenset(allowed)
        self._max_bytes = max_bytes
        self._blobs: dict[bytes, bytes] = {}
        self._tags: dict[str, bytes] = {}
        self._sent: defaultdict[bytes, RateMeter] = defaultdict(RateMeter)
        self._received: defaultdict[bytes, RateMeter] = defaultdict(RateMeter)
        self._closed = False
        self._streams = {
            channel: AnnouncementStream(
                AnnouncementInbox(secret_key.public, salt=salt, allowed=allowed, limits=inbox_limits)
            )
            for channel in Channel
        }

    @property
    @override
    def peer_id(self) -> bytes:
        return self._key.public

    @property
    @override
    def counts(self) -> InboxCounts:
        return self._streams[Channel.RUN].inbox.counts

    @property
    @override
    def address(self) -> EndpointAddr:
        return EndpointAddr(self.peer_id)

    @override
    async def publish(self, data: bytes, tag: str) -> BlobTicket:
        self._check_open()
        return BlobTicket.raw(EndpointAddr(self.peer_id), self._keep(bytes(data), tag))

    @override
    def forget(self, unwanted: Callable[[str], bool]) -> int:
        tags = [tag for tag in self._tags if unwanted(tag)]
        for tag in tags:
            del self._tags[tag]
        self._drop_untagged()
        return len(tags)

    @override
    async def announce(self, data: bytes, *, channel: Channel = Channel.RUN, carrying: bytes | None = None) -> None:
        self._check_open()
        check_announcement(data)
        sealed = SignedMessage.seal(self._key, data)
        loop = asyncio.get_running_loop()
        for other in self._network._other_members(self.peer_id):
            if not self._network._is_lost():
                delay = self._network.transit(self.peer_id, other.peer_id, len(sealed))
                loop.call_later(delay, self._deliver, other, sealed, channel)

    @override
    def announcements(self, channel: Channel = Channel.RUN) -> AsyncIterator[Announcement]:
        return aiter(self._streams[channel])

    @override
    async def fetch(
        self, ticket: BlobTicket, providers: Iterable[bytes] = (), *, max_size: int, tag: str | None = None
    ) -> bytes:
        self._check_open()
        data = self._blobs.get(ticket.hash)
        attempts: list[tuple[str, Exception]] = []
        if data is None:
            for peer in provider_order(ticket, providers, self.peer_id, {}, self._network._rng):
                await asyncio.sleep(self._network._delay())
                try:
                    data = self._fetch_from(peer, ticket.hash, max_size)
                    await asyncio.sleep(self._network.transit(peer, self.peer_id, len(data)))
                    break
                except DistroError as error:
                    attempts.append((peer.hex(), error))
        self._check_open()
        if data is None:
            told = "; ".join(f"{peer[:10]}: {error}" for peer, error in attempts) or "there was nobody to ask"
            raise BlobUnavailableError(f"blob {ticket.hash.hex()}: {told}", attempts=tuple(attempts))
        if tag is not None:
            self._keep(data, tag)
        return data

    @override
    def peers(self) -> Sequence[PeerInfo]:
        now = asyncio.get_running_loop().time()
        found = []
        for other in self._network._other_members(self.peer_id):
            peer = other.peer_id
            connected = self._connected(other)
            sent, received = self._sent[peer], self._received[peer]
            if connected or sent.total or received.total:
                found.append(
                    PeerInfo(
                        id=peer,
                        is_neighbor=connected,
                        path="direct" if connected else "none",
                        rtt=sum(self._network.latency) if connected else None,
                        bytes_sent=sent.total,
                        bytes_received=received.total,
                        send_rate=sent.rate(now),
                        receive_rate=received.rate(now),
                    )
                )
        return found

    @override
    async def join(self, peers: Iterable[EndpointAddr]) -> None:
        # All members of a memory network know each other already.
        self._check_open()

    @override
    def set_allowed(self, peers: Iterable[bytes] | None) -> None:
        self._allowed = None if peers is None else frozenset(peers)
        for stream in self._streams.values():
            stream.inbox.set_allowed(self._allowed)

    @override
    async def aclose(self) -> None:
        self._closed = True
        self._network._leave(self.peer_id)
        for stream in self._streams.values():
            stream.close()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise NodeClosedError("the swarm is closed")

    def _allows(self, peer: bytes) -> bool:
        return self._allowed is None or peer in self._allowed

    def _connected(self, other: MemorySwarm) -> bool:
        return (
            not other._closed
            and self._network._is_connected(self.peer_id, other.peer_id)
            and self._allows(other.peer_id)
            and other._allows(self.peer_id)
        )

    def _deliver(self, other: MemorySwarm, sealed: bytes, channel: Channel) -> None:
        # Looked at on arrival: what is on its way when the network is cut is lost.
        if self._connected(other):
            self._count(self, other, len(sealed))
            other._streams[channel].deliver(sealed)

    def _fetch_from(self, peer: bytes, root: bytes, max_size: int) -> bytes:
        if not self._allows(peer):
            raise PeerRefusedError(f"{peer.hex()[:10]} is not on the allow-list")
        provider = self._network._provider(self.peer_id, peer)
        if self._network._is_lost():
            raise ConnectionLostError("the connection is lost")
        data = provider._blobs.get(root)
        if data is None:
            raise ConnectionLostError("the peer does not have the blob")
        if len(data) > max_size:
            raise LimitExceededError(f"the blob has {len(data)} bytes, at most {max_size} are accepted")
        data = self._network._in_transit(peer, data)
        self._count(provider, self, len(data))
        if blake3(data).digest() != root:
            raise HashMismatchError("the data does not fit the hash", at=0)
        return data

    @staticmethod
    def _count(sender: MemorySwarm, receiver: MemorySwarm, size: int) -> None:
        now = asyncio.get_running_loop().time()
        sender._sent[receiver.peer_id].add(size, now)
        receiver._received[sender.peer_id].add(size, now)

    def _keep(self, data: bytes, tag: str) -> bytes:
        root = blake3(data).digest()
        used = sum(map(len, (blob for name, blob in self._blobs.items() if name != root)))
        if self._max_bytes is not None and used + len(data) > self._max_bytes:
            raise StoreFullError(f"{len(data)} bytes do not fit: {used} of {self._max_bytes} are in use")
        self._blobs[root] = data
        self._tags[tag] = root
        self._drop_untagged()
        return root

    def _drop_untagged(self) -> None:
        wanted = set(self._tags.values())
        self._blobs = {root: data for root, data in self._blobs.items() if root in wanted}
