"""A swarm over iroh: announcements by gossip, data by verified blobs, between peers anywhere on the internet.

::

    node = Node(secret_key="identity.key").start()
    swarm = IrohSwarm(node, topic_of_run("my-run"))
    node.submit(swarm.join([ticket.addr])).result()
    node.submit(swarm.announce(b"hello")).result()

Peers of Psyche understand it: same topic, same envelope, same blobs (PsycheFoundation/psyche ``shared/network``).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import random
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from itertools import count
from typing import Final

from typing_extensions import override

from ...errors import ConfigurationError, NodeClosedError, ProtocolError
from ..addresses import EndpointAddr
from ..announcements import MAX_ANNOUNCEMENT, Announcement, AnnouncementInbox, InboxCounts, InboxLimits
from ..carrying import MAX_CARRIED, MAX_CARRYING, CarriedBlobs, carries, pack, unpack
from ..serving.limits import Bucket
from ..signing import SignedMessage
from ..swarm import AnnouncementStream, Channel, PeerInfo, Swarm, check_announcement, provider_order
from ..tickets import BlobFormat, BlobTicket
from .blobs.net import BlobService
from .blobs.request import ALPN as BLOBS_ALPN
from .blobs.store import BlobStore, MemoryStore
from .connection import Way
from .endpoint import Node
from .gossip.config import SWARM_GOSSIP, GossipConfig, max_message_size
from .gossip.feed import FEED_ALPN, FeedDesk
from .gossip.gate import AnnouncementGate
from .gossip.net import GossipService, Topic
from .pool import ConnectionPool
from .sharing.messages import ALPN as MODEL_ALPN
from .traffic import TrafficMonitor

__all__ = ["IrohSwarm", "topic_of_run"]

_log = logging.getLogger(__name__)

# Between two looks at the counters of all connections; a fifteenth of the window of a rate.
_SAMPLE_SECONDS: Final = 1.0
_TOPIC_PREFIX: Final = b"psyche gossip"
_CHANNEL_PREFIX: Final = b"distro-optim own kind 3"
"""The number changes with what peers of our own kind say there, so that those that say it otherwise never hear them."""
_SALT_SIZE: Final = 16
_HASHED_AT_ONCE: Final = 64 << 10
"""Bytes that are hashed in less time than it takes to have another thread do it."""
_CARRIED_PER_SECOND: Final = 32.0 * 1024
_CARRIED_BURST: Final = 512.0 * 1024
"""Bytes of blobs that go along with announcements, half of what others pass on of one author
(:class:`~.gossip.gate.GateLimits`); what is above that is fetched."""
_MAX_MET: Final = 64
"""Whom we were told of and whom a channel is entered through; a membership view holds far fewer. Chosen arbitrarily."""


def topic_of_run(run_id: str) -> bytes:
    """The gossip topic of a run, as Psyche derives it (``shared/network/src/util.rs``)."""
    return hashlib.sha256(_TOPIC_PREFIX + run_id.encode()).digest()


def topic_of_channel(topic: bytes, channel: Channel) -> bytes:
    """The gossip topic of a channel beside the run's own ``topic``, which is that of :attr:`Channel.RUN`."""
    return topic if channel is Channel.RUN else hashlib.sha256(_CHANNEL_PREFIX + topic).digest()


class IrohSwarm(Swarm):
    """One topic for each channel, and one blob store, on one node. A topic is entered when it is first used.

    The coroutines belong to the node's loop. Closing the swarm leaves the node open.

    Args:
        node: from now on serves gossip and blobs; a node carries one swarm.
        topic: 32 bytes, see :func:`topic_of_run`.
        store: of published and fetched blobs; in memory without a limit if None.
        gossip: settings; the default is what Psyche's clients use, but for how long announcements are collected.
        inbox_limits: bounds on announcements that nobody has read yet.
        rng: for whom to ask first; a fresh one if None.
    """

    def __init__(
        self,
        node: Node,
        topic: bytes,
        *,
        store: BlobStore | None = None,
        gossip: GossipConfig = SWARM_GOSSIP,
        inbox_limits: InboxLimits | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.node = node
        self.store = store if store is not None else MemoryStore()
        self.pool = ConnectionPool(node)
        self.blobs = BlobService(node, self.store, pool=self.pool)
        own_kind = {topic_of_channel(topic, Channel.OWN_KIND): max_message_size(SignedMessage.size_with(MAX_CARRYING))}
        self.gossip = GossipService(node, gossip, sizes=own_kind)
        self._topic_id = topic
        self._topics: dict[Channel, Topic] = {}
        self._entering: dict[Channel, asyncio.Task[Topic]] = {}
        self._met: dict[bytes, EndpointAddr] = {}
        self._streams = {
            channel: AnnouncementStream(
                AnnouncementInbox(
                    node.endpoint_id,
                    salt=os.urandom(_SALT_SIZE),
                    allowed=node.allowed,
                    limits=inbox_limits,
                    max_data=MAX_ANNOUNCEMENT if channel is Channel.RUN else MAX_CARRYING,
                )
            )
            for channel in Channel
        }
        self._carried = CarriedBlobs()
        self._to_carry = Bucket(_CARRIED_PER_SECOND, _CARRIED_BURST, 0.0)
        self._others: int | None = None
        self._traffic = TrafficMonitor()
        self._tasks: list[asyncio.Task[None]] = []
        self._rng = rng if rng is not None else random.Random()
        self._fetches = count()
        self._closed = False
        self._desk: FeedDesk | None = None
        self._watchers: frozenset[bytes] = frozenset()
        self._tell_size(node.allowed)
        node.on_close(self.aclose)

    @property
    @override
    def peer_id(self) -> bytes:
        return self.node.endpoint_id

    @property
    @override
    def counts(self) -> InboxCounts:
        return self._streams[Channel.RUN].inbox.counts

    @property
    @override
    def address(self) -> EndpointAddr:
        return self.node.addr()

    @property
    def neighbors(self) -> tuple[bytes, ...]:
        """Peers with whom announcements of :attr:`Channel.RUN` are exchanged directly."""
        topic = self._topics.get(Channel.RUN)
        return topic.neighbors if topic is not None else ()

    async def joined(self, timeout: float | None = None) -> None:
        """Waits for the first neighbour; raises PeerTimeoutError if there is none after ``timeout`` seconds."""
        await (await self._enter(Channel.RUN)).joined(timeout)

    @override
    async def publish(self, data: bytes, tag: str) -> BlobTicket:
        self._check_open()
        await self.node.bind()
        if self.store.is_prompt and len(data) <= _HASHED_AT_ONCE:
            root = self.store.add(data, tag=tag)
        else:
            # Hashing takes a fifth of a second for 64 MiB, which gossip cannot wait for.
            root = await asyncio.to_thread(self.store.add, data, tag=tag)
        return BlobTicket.raw(self.node.addr(), root)

    @override
    def forget(self, unwanted: Callable[[str], bool]) -> int:
        forgotten = self.store.delete_tags(unwanted)
        if forgotten:
            self.store.collect_garbage()
        return forgotten

    @override
    async def announce(self, data: bytes, *, channel: Channel = Channel.RUN, carrying: bytes | None = None) -> None:
        self._check_open()
        check_announcement(data)
        if carrying is not None and self._may_carry(carrying):
            channel, data = Channel.OWN_KIND, pack(data, carrying)
        topic = await self._enter(channel)
        sealed = SignedMessage.seal(self.node.secret_key, data)
        if self._desk is not None:
            self._desk.tell(channel, sealed)
        await topic.broadcast(sealed)

    @override
    async def announcements(self, channel: Channel = Channel.RUN) -> AsyncIterator[Announcement]:
        if not (self._closed or self.node.is_closed):
            await self._enter(channel)
        async for announcement in self._streams[channel]:
            yield announcement

    @override
    def at_hand(self, ticket: BlobTicket, *, max_size: int, tag: str) -> bytes | None:
        if not self.store.is_prompt:
            return None
        blob = self._carried.take(ticket.hash, max_size)
        if blob is not None:
            self.store.add(blob, tag=tag)
        return blob

    @override
    async def fetch(
        self, ticket: BlobTicket, providers: Iterable[bytes] = (), *, max_size: int, tag: str | None = None
    ) -> bytes:
        self._check_open()
        if (carried := self._carried.take(ticket.hash, max_size)) is not None:
            if tag is not None:
                await asyncio.to_thread(self.store.add, carried, tag=tag)
            return carried
        if ticket.format is not BlobFormat.RAW:
            raise ConfigurationError("only tickets of raw blobs can be fetched", name="ticket", value=ticket.format)
        if not ticket.addr.is_empty:  # a ticket that only says who must not make us forget where
            self.node.addresses.learn(ticket.addr, asyncio.get_running_loop().time())
        providers = list(providers)
        order = provider_order(ticket, providers, self.peer_id, self._rtts({ticket.addr.id, *providers}), self._rng)
        # Without any tag the blob could be collected before it is read.
        held = tag if tag is not None else f"fetching-{next(self._fetches)}"
        try:
            blob = await self.blobs.fetch(ticket.hash, order, max_size=max_size, tag=held)
            return bytes(blob.data)
        finally:
            if tag is None:
                self.forget(lambda name: name == held)

    @override
    def peers(self) -> Sequence[PeerInfo]:
        now = asyncio.get_running_loop().time()
        self._traffic.sample(self.node.connections(), now)
        paths = self._paths()
        neighbors = set(self.neighbors)
        found = []
        for peer, traffic in self._traffic.peers.items():
            path = paths.get(peer)
            found.append(
                PeerInfo(
                    id=peer,
                    is_neighbor=peer in neighbors,
                    path=path.path if path is not None else "none",
                    rtt=path.rtt if path is not None else None,
                    bytes_sent=traffic.sent.total,
                    bytes_received=traffic.received.total,
                    send_rate=traffic.sent.rate(now),
                    receive_rate=traffic.received.rate(now),
                )
            )
        return found

    @override
    async def join(self, peers: Iterable[EndpointAddr]) -> None:
        self._check_open()
        others = {peer.id: peer for peer in peers if peer.id != self.peer_id}
        # Channels that are entered later are entered through the same peers.
        self._met = dict(list({**self._met, **others}.items())[-_MAX_MET:])
        await self._enter(Channel.RUN)
        for topic in self._topics.values():
            topic.add_peers(others.values())

    @override
    def set_allowed(self, peers: Iterable[bytes] | None) -> None:
        allowed = None if peers is None else frozenset(peers)
        self.node.set_allowed(allowed)
        self._tell_size(allowed)
        for stream in self._streams.values():
            stream.inbox.set_allowed(allowed)

    @override
    def set_watchers(self, watchers: Iterable[bytes]) -> None:
        keys = frozenset(watchers) - {self.peer_id}
        if keys == self._watchers or self._closed or self.node.is_closed:
            return
        self._watchers = keys
        if keys and self._desk is None:
            self._desk = FeedDesk(self.node)
        if self._desk is not None:
            self._desk.watchers = keys
        self.node.set_watchers(keys, (BLOBS_ALPN, MODEL_ALPN, FEED_ALPN))

    @override
    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._desk is not None:
            self._desk.close()
        await self.gossip.aclose()
        self.node.refuse(BLOBS_ALPN)
        await self.pool.aclose()
        for connection in self.node.connections():
            if connection.alpn == BLOBS_ALPN:
                connection.close()
        for task in self._tasks:
            task.cancel()
        for stream in self._streams.values():
            stream.close()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _tell_size(self, allowed: Collection[bytes] | None) -> None:
        self._others = None if allowed is None else sum(peer != self.peer_id for peer in allowed)
        self.gossip.protocol.set_others(self._others)

    def _may_carry(self, blob: bytes) -> bool:
        """Whether it goes along with an announcement: it would go to each of the others once, and is no burden."""
        is_mesh = self._others is not None and self._others <= self.gossip.config.pushed_by_author
        now = asyncio.get_running_loop().time()
        return is_mesh and len(blob) <= MAX_CARRIED and self._to_carry.take(len(blob), now)

    def _check_open(self) -> None:
        if self._closed or self.node.is_closed:
            raise NodeClosedError("the swarm is closed")

    async def _enter(self, channel: Channel) -> Topic:
        """The topic of a channel, entered at first need."""
        self._check_open()
        if channel not in self._entering:
            loop = asyncio.get_running_loop()
            if not self._entering:
                self._tasks.append(loop.create_task(self._watch_traffic()))
            topic = topic_of_channel(self._topic_id, channel)
            self._entering[channel] = loop.create_task(
                self.gossip.join(topic, list(self._met.values()), gate=AnnouncementGate(me=self.peer_id))
            )
            self._tasks.append(loop.create_task(self._listen(channel)))
        self._topics[channel] = await asyncio.shield(self._entering[channel])
        return self._topics[channel]

    async def _listen(self, channel: Channel) -> None:
        async for message in await self._entering[channel]:
            is_new = self._deliver(channel, message.content, message.peer)
            if is_new and self._desk is not None:
                self._desk.tell(channel, message.content)

    def _deliver(self, channel: Channel, sealed: bytes | memoryview, via: bytes | None = None) -> bool:
        """Takes in what was said; whether it is new, of a peer that counts. What it carries waits to be fetched."""
        if channel is Channel.RUN:
            return self._streams[channel].deliver(sealed, via)
        stream = self._streams[channel]
        announcement = stream.open(sealed, via)
        if announcement is None:
            return False
        try:
            if not carries(announcement.data):
                check_announcement(announcement.data)
                return stream.push(announcement)
            data, blob = unpack(announcement.data)
        except (ConfigurationError, ProtocolError):
            stream.inbox.counts.malformed += 1
            return False
        self._carried.keep(announcement.sender, blob)
        return self._streams[Channel.RUN].admit(Announcement(announcement.sender, data))

    async def _watch_traffic(self) -> None:
        while True:
            await asyncio.sleep(_SAMPLE_SECONDS)
            self._traffic.sample(self.node.connections(), asyncio.get_running_loop().time(), exact=False)

    def _paths(self, peers: Collection[bytes] | None = None) -> dict[bytes, Way]:
        """The best path to each connected peer, or to each of ``peers``: direct before relayed, then the shortest.

        Once a connection is direct, no other one of its peer is looked at: each look costs a call.
        """
        best: dict[bytes, Way] = {}
        for connection in self.node.connections():
            if peers is not None and connection.remote_id not in peers:
                continue  # strangers may have many
            known = best.get(connection.remote_id)
            if known is not None and known.path == "direct":
                continue
            way = connection.way()
            if known is None or _distance(way) < _distance(known):
                best[connection.remote_id] = way
        return best

    def _rtts(self, peers: Collection[bytes]) -> dict[bytes, float]:
        if len(peers) == 1:
            return {}  # there is nothing to choose from
        return {peer: way.rtt for peer, way in self._paths(peers).items() if way.rtt is not None}


def _distance(way: Way) -> tuple[int, float]:
    return ("direct", "relayed", "none").index(way.path), way.rtt if way.rtt is not None else float("inf")
