"""Gossip on a node: the state machines of :mod:`.protocol`, a clock, and the connections of :mod:`.links`.

::

    gossip = GossipService(node)
    topic = await gossip.join(topic_id, bootstrap=[peer_id, another])
    await topic.broadcast(b"hello")
    async for message in topic:
        print(message.content)

All of it runs on the node's event loop.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from ....errors import (
    ConfigurationError,
    DistroError,
    NodeClosedError,
    PeerRefusedError,
    ProtocolError,
)
from ...addresses import EndpointAddr
from ...backoff import BackoffPolicy, DialSchedule
from ..connection import Connection
from ..endpoint import CLOSE_NOT_ALLOWED, Node
from .config import GossipConfig, max_content_size
from .events import (
    Deliver,
    DropPeer,
    JoinPeers,
    LearnAddress,
    NeighborDown,
    NeighborUp,
    Offence,
    Publish,
    Quit,
    Received,
    Schedule,
    Send,
)
from .frames import encode_frame
from .gate import AnnouncementGate, Verdict
from .links import LinkLimits, PeerLink, close_offender
from .messages import ID_SIZE, Disconnect, Gossip, PeerId, TopicId, decode_message, encode_message
from .peer_data import decode_peer_data, encode_peer_data
from .protocol import GossipProtocol, TopicAction
from .subscription import Lagged, Topic, TopicEvent

__all__ = ["GOSSIP_ALPN", "GossipService", "GossipStats", "Lagged", "ServiceLimits", "Topic", "TopicEvent"]

_log = logging.getLogger(__name__)

GOSSIP_ALPN: Final = b"/iroh-gossip/1"
"""n0-computer/iroh-gossip ``src/net.rs``."""

_DIAL_ATTEMPTS: Final = 3
"""Dials of one peer before it is given up; the protocol then turns to others and may come back. Chosen arbitrarily."""

_SWEEP_SECONDS: Final = 1.0
"""Seconds between two looks at addresses and unused connections."""

_GOODBYE_SECONDS: Final = 0.2
"""Time for the goodbyes when the service closes; the node allows its hooks 0.3."""

_HIGH_WATER: Final = 1 << 20
"""A broadcast waits while more than this is queued for most neighbours. Not for the slowest: that may be a stranger who
reads as slowly as it may, and what one peer says to all others would wait for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLimits:
    """What all peers together may cost. Chosen by us; iroh-gossip has no such bounds.

    Attributes:
        link: what one may cost.
        links: peers connected or being dialled.
        dials: dials at a time.
        queue: events that wait for the application, per topic; the oldest are dropped.
        linger_seconds: time after its last frame until a connection that no topic needs is closed. iroh-gossip never
            closes it, but waits this long for its last messages to be acknowledged.
        ban_seconds: how long an offender is not talked to.
        banned: offenders remembered.
    """

    link: LinkLimits = field(default_factory=LinkLimits)
    links: int = 256
    dials: int = 16
    queue: int = 4096
    linger_seconds: float = 5.0
    ban_seconds: float = 60.0
    banned: int = 1024


@dataclass(slots=True)
class GossipStats:
    """Counts since the start.

    Attributes:
        frames_received: messages of all kinds.
        delivered: messages handed to the application.
        offenders: peers cut off.
        too_large: messages not sent because they do not fit in ``max_message_size``.
        refused: messages that were not passed on, by the gate of their topic.
    """

    frames_received: int = 0
    delivered: int = 0
    offenders: int = 0
    too_large: int = 0
    refused: int = 0


class GossipService:
    """Gossip for one node; any number of topics.

    Args:
        node: whose connections are used. Construct the service on its loop, or before it is bound.
        config: settings of the protocol, for all topics.
        limits: bounds against strangers.
        sizes: topics whose messages have another ``max_message_size`` than the rest.
        rng: decides every random choice; a fresh one if None.

    Attributes:
        protocol: the state machines; to look at.
        stats: counts.
    """

    def __init__(
        self,
        node: Node,
        config: GossipConfig | None = None,
        *,
        limits: ServiceLimits | None = None,
        sizes: Mapping[TopicId, int] | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.config = config if config is not None else GossipConfig()
        self.limits = limits if limits is not None else ServiceLimits()
        self.stats = GossipStats()
        self._sizes = dict(sizes) if sizes is not None else {}
        self._node = node
        rng = rng if rng is not None else random.SystemRandom()
        self.protocol = GossipProtocol(node.endpoint_id, self.config, rng)
        self._topics: dict[TopicId, Topic] = {}
        self._gates: dict[TopicId, AnnouncementGate] = {}
        self._links: dict[PeerId, PeerLink] = {}
        self._dials: dict[PeerId, asyncio.Task[None]] = {}
        self._dial_slots = asyncio.Semaphore(self.limits.dials)
        self._schedule = DialSchedule(BackoffPolicy(), rng.random)
        self._banned: OrderedDict[PeerId, float] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._sweeper: asyncio.Task[None] | None = None
        self._closed = False
        self._told: EndpointAddr | None = None  # our own address, as the protocol has it
        node.accept(GOSSIP_ALPN, self._serve)
        node.on_close(self.aclose)

    async def join(
        self,
        topic: TopicId,
        bootstrap: Iterable[PeerId | EndpointAddr] = (),
        *,
        gate: AnnouncementGate | None = None,
    ) -> Topic:
        """Enters ``topic`` through the peers of ``bootstrap``, or waits for others if there are none.

        Returns at once; :meth:`Topic.joined` waits for a neighbour. Peers that cannot be reached are dialled again
        as long as there is not a neighbour. With a ``gate``, only what it lets through is passed on.

        Raises:
            ConfigurationError: the topic is not 32 bytes long, or was joined already.
            NodeClosedError: the service is closed.
        """
        if len(topic) != ID_SIZE:
            raise ConfigurationError(f"a topic id has {ID_SIZE} bytes, got {len(topic)}", name="topic", value=topic)
        if topic in self._topics:
            raise ConfigurationError("the topic is joined already; use Topic.add_peers", name="topic", value=topic)
        if self._closed:
            raise NodeClosedError("the gossip service is closed")
        await self._node.bind()
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().create_task(self._sweep_loop())
        self._update_addresses()
        handle = self._topics[topic] = Topic(self, topic, self.limits.queue)
        if gate is not None:
            self._gates[topic] = gate
        self.on_join_peers(topic, bootstrap)
        return handle

    async def aclose(self) -> None:
        """Leaves all topics, says goodbye, closes the connections. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for topic in tuple(self._topics):
            self.on_leave(topic)
        links = [link for link in self._links.values() if link.is_connected]
        if links:
            drains = [asyncio.ensure_future(link.drain()) for link in links]
            _, late = await asyncio.wait(drains, timeout=_GOODBYE_SECONDS)
            for task in late:
                task.cancel()
        self._node.refuse(GOSSIP_ALPN)
        for dial in tuple(self._dials.values()):
            dial.cancel()
        for link in tuple(self._links.values()):
            link.close()
        self._links.clear()
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._timer is not None:
            self._timer.cancel()

    # -- what links call -----------------------------------------------------------------------------------------------

    def on_frame(self, link: PeerLink, topic: TopicId, frame: memoryview) -> None:
        """See :class:`~.links.LinkOwner`."""
        self.stats.frames_received += 1
        # Decoded for unknown topics too: garbage is garbage.
        message = decode_message(frame)
        gate = self._gates.get(topic)
        if gate is not None and isinstance(message, Gossip) and not self.protocol.knows(topic, message.id):
            verdict = gate.judge(message.content, link.peer, self._now())
            if verdict is not Verdict.PASS:
                self.stats.refused += 1
                self.protocol.ignore(topic, message, self._now())
                if verdict is Verdict.OFFENCE:
                    self.on_offence(link, "it says far more than its share")
                return
        self._handle(topic, Received(link.peer, message))

    def on_lost(self, link: PeerLink) -> None:
        """See :class:`~.links.LinkOwner`."""
        self._remove(link)
        self._perform(self.protocol.disconnected(link.peer, self._now()))

    def on_silence(self, link: PeerLink) -> None:
        """See :class:`~.links.LinkOwner`."""
        if self._closed or link.peer in self._dials or not self.protocol.needs(link.peer):
            return
        _log.info("%s does not answer, and is dialled anew", link.peer.hex()[:10])
        self._dials[link.peer] = asyncio.get_running_loop().create_task(self._renew(link))

    def on_offence(self, link: PeerLink, reason: str) -> None:
        """See :class:`~.links.LinkOwner`."""
        _log.warning("cut off %s: %s", link.peer.hex()[:10], reason)
        self.stats.offenders += 1
        self._banned[link.peer] = self._now() + self.limits.ban_seconds
        if len(self._banned) > self.limits.banned:
            self._banned.popitem(last=False)
        close_offender(link, reason)
        self._remove(link)
        # Later: an offence can show while actions of the same peer are being carried out.
        asyncio.get_running_loop().call_soon(self._lost_later, link.peer)

    def is_neighbor(self, peer: PeerId) -> bool:
        """See :class:`~.links.LinkOwner`."""
        return self.protocol.needs(peer)

    # -- what topics call ----------------------------------------------------------------------------------------------

    def max_content_of(self, topic: TopicId) -> int:
        """See :class:`~.subscription.TopicOwner`."""
        return max_content_size(self._size_of(topic))

    def neighbors_of(self, topic: TopicId) -> tuple[PeerId, ...]:
        """See :class:`~.subscription.TopicOwner`."""
        state = self.protocol.topics.get(topic)
        return state.neighbors if state is not None else ()

    def on_join_peers(self, topic: TopicId, peers: Iterable[PeerId | EndpointAddr]) -> None:
        """See :class:`~.subscription.TopicOwner`."""
        ids = []
        for peer in peers:
            if isinstance(peer, EndpointAddr):
                self._node.addresses.add(peer)
                ids.append(peer.id)
            else:
                ids.append(peer)
        self._handle(topic, JoinPeers(tuple(ids)))

    def on_publish(self, topic: TopicId, event: Publish) -> None:
        """See :class:`~.subscription.TopicOwner`."""
        self._handle(topic, event)

    def on_leave(self, topic: TopicId) -> None:
        """See :class:`~.subscription.TopicOwner`."""
        handle = self._topics[topic]
        self._handle(topic, Quit())
        del self._topics[topic]
        self._gates.pop(topic, None)
        handle.on_end()

    async def uncongested(self, topic: TopicId) -> None:
        """See :class:`~.subscription.TopicOwner`."""
        while True:
            links = [self._links[peer] for peer in self.neighbors_of(topic) if peer in self._links]
            behind = [link for link in links if link.queued > _HIGH_WATER]
            if 2 * len(behind) <= len(links):
                return
            drains = [asyncio.ensure_future(link.drain()) for link in behind]
            try:
                await asyncio.wait(drains, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for drain in drains:
                    drain.cancel()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _handle(self, topic: TopicId, event: JoinPeers | Received | Publish | Quit) -> None:
        self._perform(self.protocol.handle(topic, event, self._now()))

    def _perform(self, actions: list[TopicAction]) -> None:
        for topic, action in actions:
            match action:
                case Send(peers=peers, message=message):
                    gate = self._gates.get(topic)
                    if gate is not None and isinstance(message, Gossip) and not gate.may_pass_on(message.content):
                        self.stats.refused += 1
                        continue
                    payload = encode_message(message)
                    if len(payload) >= self._size_of(topic):
                        self.stats.too_large += 1
                        continue
                    frame = encode_frame(payload)
                    for peer in peers:
                        self._send(peer, topic, frame, last=isinstance(message, Disconnect))
                case Deliver():
                    self.stats.delivered += 1
                    self._topics[topic].on_event(action)
                case NeighborUp() | NeighborDown():
                    self._topics[topic].on_event(action)
                case LearnAddress(peer=peer, data=data):
                    self._learn(peer, data)
                case DropPeer(peer=peer):
                    if (link := self._links.get(peer)) is not None:
                        link.finish(topic)
                case Offence(peer=peer, reason=reason):
                    if (link := self._links.get(peer)) is not None:
                        self.on_offence(link, reason)
                case Schedule():
                    raise AssertionError("the protocol keeps its timers itself")
        self._arm()

    def _send(self, peer: PeerId, topic: TopicId, frame: bytes, *, last: bool) -> None:
        link = self._links.get(peer)
        if link is None:
            full = len(self._links) >= self.limits.links
            if self._closed or full or self._is_banned(peer):
                asyncio.get_running_loop().call_soon(self._lost_later, peer)
                return
            link = self._links[peer] = self._new_link(peer)
            self._dials[peer] = asyncio.get_running_loop().create_task(self._dial(link))
        link.send(topic, frame)
        if last:
            link.finish(topic)

    def _new_link(self, peer: PeerId) -> PeerLink:
        return PeerLink(peer, self, self.limits.link, self.config.max_message_size, self._sizes)

    def _size_of(self, topic: TopicId) -> int:
        return self._sizes.get(topic, self.config.max_message_size)

    def _learn(self, peer: PeerId, data: bytes) -> None:
        try:
            self._node.addresses.learn(decode_peer_data(peer, data), time.monotonic())
        except ProtocolError as error:
            # Somebody else may have said it of this peer: nobody to blame.
            _log.debug("no addresses of %s: %s", peer.hex()[:10], error)

    def _lost_later(self, peer: PeerId) -> None:
        if not self._closed and peer not in self._links:
            self._perform(self.protocol.disconnected(peer, self._now()))

    def _is_banned(self, peer: PeerId) -> bool:
        until = self._banned.get(peer)
        if until is not None and until <= self._now():
            del self._banned[peer]
            return False
        return until is not None

    def _remove(self, link: PeerLink) -> None:
        if self._links.get(link.peer) is link:
            del self._links[link.peer]
        if (dial := self._dials.pop(link.peer, None)) is not None:
            dial.cancel()
        link.close()

    def _arm(self) -> None:
        deadline = self.protocol.next_deadline()
        if deadline is None or self._closed:
            return
        if self._timer is not None:
            if self._timer_at <= deadline:
                return
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(deadline, self._tick)
        self._timer_at = deadline

    def _tick(self) -> None:
        self._timer = None
        self._perform(self.protocol.tick(self._now()))

    async def _serve(self, connection: Connection) -> None:
        peer = connection.remote_id
        if self._closed or self._is_banned(peer):
            connection.close(CLOSE_NOT_ALLOWED, b"not now")
            return
        link = self._links.get(peer)
        if link is None:
            if len(self._links) >= self.limits.links:
                connection.close(CLOSE_NOT_ALLOWED, b"too many peers")
                return
            link = self._links[peer] = self._new_link(peer)
        self._schedule.succeeded(peer)
        link.add(connection)
        await connection.closed()

    async def _dial(self, link: PeerLink) -> None:
        for _ in range(_DIAL_ATTEMPTS):
            await asyncio.sleep(self._schedule.wait(link.peer, self._now()))
            if link.is_connected or await self._try(link) is not False:
                break
        del self._dials[link.peer]
        if not link.is_connected:
            self.on_lost(link)

    async def _try(self, link: PeerLink) -> bool | None:
        """Dials once; whether the link has got a connection by it, None if the peer wants none."""
        try:
            async with self._dial_slots:
                connection = await self._node.connect(link.peer, GOSSIP_ALPN)
        except PeerRefusedError:
            return None
        except DistroError as error:
            _log.debug("dialling %s: %s", link.peer.hex()[:10], error)
            self._schedule.failed(link.peer, self._now())
            return False
        self._schedule.succeeded(link.peer)
        link.add(connection)
        return True

    async def _renew(self, link: PeerLink) -> None:
        """Dials a peer beside a connection that does not answer, until one does or the last one has ended."""
        link.hold(True)
        while True:
            await asyncio.sleep(self._schedule.wait(link.peer, self._now()))
            if not link.is_silent or await self._try(link) is None:
                break
        link.hold(False)
        del self._dials[link.peer]
        if not link.is_connected:
            self.on_lost(link)

    async def _sweep_loop(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            self._update_addresses()
            before = self._now() - self.limits.linger_seconds
            for link in tuple(self._links.values()):
                if link.is_connected and link.last_used < before and not self.protocol.needs(link.peer):
                    # Not a loss: the peer may be remembered and asked again.
                    self._remove(link)

    def _update_addresses(self) -> None:
        try:
            address = self._node.addr()
        except DistroError as error:
            _log.debug("no own addresses: %s", error)
            return
        if address is not self._told:  # the same object while it is the same
            self._told = address
            self._perform(self.protocol.update_peer_data(encode_peer_data(address), self._now()))
