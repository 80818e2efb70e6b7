"""A gossip swarm in one process: a fake clock, links with latency and loss, peers that come, leave and die.

Everything follows from one seed. Links keep the order of messages, as QUIC streams do; loss is harsher than on QUIC,
a lost message is gone and nobody is told.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import count

from distro_optim.comm.iroh.gossip.config import GossipConfig
from distro_optim.comm.iroh.gossip.events import (
    Deliver,
    DropPeer,
    JoinPeers,
    NeighborDown,
    NeighborUp,
    Offence,
    Publish,
    Quit,
    Received,
    Send,
)
from distro_optim.comm.iroh.gossip.messages import Disconnect, Message, PeerId
from distro_optim.comm.iroh.gossip.plumtree import PlumTree
from distro_optim.comm.iroh.gossip.protocol import GossipProtocol, TopicAction
from distro_optim.comm.iroh.gossip.topic import TopicState

TOPIC = b"t" * 32


class SimNode:
    """One node and what it has seen."""

    def __init__(self, peer: PeerId, config: GossipConfig, seed: int, born: float) -> None:
        self.id = peer
        self.protocol = GossipProtocol(peer, config, random.Random(seed))
        self.born = born
        self.alive = True
        self.delivered: Counter[bytes] = Counter()
        self.delivered_at: dict[bytes, float] = {}
        self.neighbors: set[PeerId] = set()
        self.next_tick: float | None = None
        self.tree: PlumTree

    @property
    def topic(self) -> TopicState:
        return self.protocol.topics[TOPIC]


class Simulator:
    """Runs nodes against each other.

    Args:
        config: settings of every node.
        seed: decides everything.
        latency: seconds one way, uniform between the two, drawn once per link and direction.
        loss: probability that a message vanishes.
        death_noticed: seconds until the neighbours of a killed node learn of it.
        linger: seconds until a connection that neither side needs is closed.
    """

    def __init__(
        self,
        config: GossipConfig,
        *,
        seed: int,
        latency: tuple[float, float] = (0.005, 0.050),
        loss: float = 0.0,
        death_noticed: float = 2.0,
        linger: float = 5.0,
    ) -> None:
        self.now = 0.0
        self.nodes: dict[PeerId, SimNode] = {}
        self.sent: Counter[str] = Counter()
        self.lost = 0
        self.opened: dict[tuple[PeerId, PeerId], list[float]] = {}  # when one peer opened streams to another
        self._parted: set[tuple[PeerId, PeerId]] = set()
        self._streams: set[tuple[PeerId, PeerId]] = set()
        self._config = config
        self._rng = random.Random(seed)
        self._latency = latency
        self._loss = loss
        self._death_noticed = death_noticed
        self._linger = linger
        self._queue: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._order = count()
        self._links: dict[tuple[PeerId, PeerId], float] = {}
        self._arrivals: dict[tuple[PeerId, PeerId], float] = {}
        self._connected: dict[PeerId, set[PeerId]] = {}

    # What a test does

    def add(self, bootstrap: Iterable[PeerId] = ()) -> PeerId:
        """A new node that joins through ``bootstrap``; its id."""
        peer = self._rng.randbytes(32)
        node = self.nodes[peer] = SimNode(peer, self._config, self._rng.randrange(1 << 62), self.now)
        self._connected[peer] = set()
        self._do(node, node.protocol.handle(TOPIC, JoinPeers(tuple(bootstrap)), self.now))
        node.tree = node.topic.broadcast
        return peer

    def ask(self, peer: PeerId, others: Iterable[PeerId]) -> None:
        """The node asks others to be its neighbours."""
        self._do(self.nodes[peer], self.nodes[peer].protocol.handle(TOPIC, JoinPeers(tuple(others)), self.now))

    def publish(self, peer: PeerId, content: bytes) -> None:
        node = self.nodes[peer]
        node.delivered[content] += 1
        self._do(node, node.protocol.handle(TOPIC, Publish(content), self.now))

    def at(self, when: float, action: Callable[..., None], *args: object) -> None:
        """Has something done later."""
        self._at(when, action, *args)

    def send(self, sender: PeerId, to: PeerId, message: Message) -> None:
        """Something that the node's protocol would not send by itself."""
        self._transmit(self.nodes[sender], to, message)

    def latency(self, sender: PeerId, to: PeerId) -> float:
        """Seconds that a message takes, if there ever was one."""
        return self._links[sender, to]

    def set_latency(self, one: PeerId, other: PeerId, seconds: float) -> None:
        """From now on a message takes so long between the two, both ways."""
        self._links[one, other] = self._links[other, one] = seconds

    def part(self, one: PeerId, other: PeerId) -> None:
        """From now on the two cannot reach each other."""
        self._parted |= {(one, other), (other, one)}
        self._close(one, other)

    def leave(self, peer: PeerId) -> None:
        """The node says goodbye; what it sent still arrives."""
        node = self.nodes[peer]
        self._do(node, node.protocol.handle(TOPIC, Quit(), self.now))
        self._end(node)

    def kill(self, peer: PeerId) -> None:
        """The node vanishes with all that is under way to or from it."""
        self._end(self.nodes[peer])

    def run(self, seconds: float) -> None:
        """Lets time pass."""
        end = self.now + seconds
        while self._queue and self._queue[0][0] <= end:
            self.now, _, action, args = heapq.heappop(self._queue)
            action(*args)
        self.now = end

    # What a test looks at

    def live(self) -> list[SimNode]:
        return [node for node in self.nodes.values() if node.alive]

    def payloads(self) -> tuple[int, int]:
        """Payloads received by all nodes so far, and how many of them were duplicates."""
        return sum(node.tree.payloads for node in self.nodes.values()), sum(
            node.tree.duplicates for node in self.nodes.values()
        )

    def together(self, links: Callable[[SimNode], Iterable[PeerId]]) -> float:
        """Share of the live nodes in the largest group that is connected over links that both ends have."""
        live = {node.id: set(links(node)) for node in self.live()}
        largest, seen = 0, set[PeerId]()
        for start in live:
            if start in seen:
                continue
            before, front = len(seen), [start]
            seen.add(start)
            while front:
                node = front.pop()
                for other in live[node] & live.keys() - seen:
                    if node in live[other]:
                        seen.add(other)
                        front.append(other)
            largest = max(largest, len(seen) - before)
        return largest / len(live)

    # The machinery

    def _at(self, when: float, action: Callable[..., None], *args: object) -> None:
        heapq.heappush(self._queue, (when, next(self._order), action, args))

    def _do(self, node: SimNode, actions: list[TopicAction]) -> None:
        for _, action in actions:
            match action:
                case Send(peers=peers, message=message):
                    for peer in peers:
                        self._transmit(node, peer, message)
                case Deliver(content=content):
                    node.delivered[content] += 1
                    node.delivered_at.setdefault(content, self.now)
                case NeighborUp(peer=peer):
                    assert peer not in node.neighbors
                    node.neighbors.add(peer)
                case NeighborDown(peer=peer):
                    node.neighbors.remove(peer)
                case DropPeer(peer=peer):
                    self._streams.discard((node.id, peer))
                    self._at(self.now + self._linger, self._close_unneeded, node.id, peer)
                case Offence(reason=reason):
                    raise AssertionError(f"an honest node was accused: {reason}")
        deadline = node.protocol.next_deadline()
        if deadline is not None and (node.next_tick is None or deadline < node.next_tick):
            node.next_tick = deadline
            self._at(deadline, self._tick, node, deadline)

    def _tick(self, node: SimNode, deadline: float) -> None:
        if node.alive and node.next_tick == deadline:
            node.next_tick = None
            self._do(node, node.protocol.tick(self.now))

    def _transmit(self, node: SimNode, to: PeerId, message: Message) -> None:
        self.sent[type(message).__name__] += 1
        link = (node.id, to)
        if link not in self._streams:
            # As `comm/iroh/gossip/links.py` does: one stream, until the peer is dropped or told goodbye.
            self._streams.add(link)
            self.opened.setdefault(link, []).append(self.now)
        if isinstance(message, Disconnect):
            self._streams.discard(link)
        latency = self._links.get(link)
        if latency is None:
            latency = self._links[link] = self._rng.uniform(*self._latency)
        target = self.nodes[to]
        if link in self._parted or (not target.alive and to not in self._connected[node.id]):
            self._at(self.now + self._death_noticed, self._lose, node, to)
            return
        self._connected[node.id].add(to)
        self._connected[to].add(node.id)
        if self._rng.random() < self._loss:
            self.lost += 1
            return
        arrival = max(self.now + latency, self._arrivals.get(link, 0.0))
        self._arrivals[link] = arrival
        self._at(arrival, self._arrive, target, node.id, message)

    def _arrive(self, node: SimNode, sender: PeerId, message: Message) -> None:
        if not node.alive or sender not in self._connected[node.id]:
            return
        self._do(node, node.protocol.handle(TOPIC, Received(sender, message), self.now))

    def _lose(self, node: SimNode, peer: PeerId) -> None:
        if node.alive:
            self._connected[node.id].discard(peer)
            self._do(node, node.protocol.disconnected(peer, self.now))

    def _close(self, a: PeerId, b: PeerId) -> None:
        if b in self._connected[a]:
            self._lose(self.nodes[a], b)
            self._lose(self.nodes[b], a)
            self._connected[a].discard(b)
            self._connected[b].discard(a)

    def _close_unneeded(self, a: PeerId, b: PeerId) -> None:
        ends = self.nodes[a], self.nodes[b]
        if not any(node.alive and node.protocol.needs(other) for node, other in zip(ends, (b, a), strict=True)):
            self._close(a, b)

    def _end(self, node: SimNode) -> None:
        node.alive = False
        for peer in sorted(self._connected[node.id]):
            self._at(self.now + self._death_noticed, self._lose, self.nodes[peer], node.id)
