"""Which peers are neighbours in one topic: HyParView.

Every node keeps a small *active view*, the neighbours it exchanges messages with, and a larger *passive view* of
peers to fall back on. Newcomers walk randomly through the swarm until somebody takes them; passive views are mixed by
periodic shuffles. The paper: Leitão, Pereira, Rodrigues, "HyParView: a membership protocol for reliable gossip-based
broadcast", DSN 2007. The rules here are those of n0-computer/iroh-gossip ``src/proto/hyparview.rs``, which differ
from the paper in one point: a peer enters the active view only when a message *from it* has arrived, so that
unreachable peers never do.

Where this node is stricter than iroh-gossip, with the same messages:

* every Neighbor request has a deadline, and their number is bounded; there an unanswered one may stay without end;
* peer data is kept only for peers in a view, and hearsay does not replace what a neighbour said of itself;
* lists are cut so that the message stays below the maximum size, and an answer names no more peers than a Shuffle
  asks with;
* a node without neighbours asks its bootstrap peers again, waiting longer each time.

And a node whose addresses change tells its neighbours at once, by a Neighbor message, which they answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum, auto
from typing import Final

from .config import GossipConfig
from .events import (
    Action,
    DropPeer,
    JoinPeers,
    LearnAddress,
    NeighborDown,
    NeighborUp,
    PeerDisconnected,
    Quit,
    RejoinTimer,
    RequestTimer,
    Schedule,
    Send,
    ShuffleTimer,
    UpdatePeerData,
)
from .messages import (
    Disconnect,
    ForwardJoin,
    Join,
    Neighbor,
    PeerId,
    PeerInfo,
    Shuffle,
    ShuffleReply,
    SwarmMessage,
)
from .peer_data import MAX_PEER_DATA
from .random_choice import RandomSource, choose, pick, sample

__all__ = ["HyParView"]

_JOIN_AT_ONCE: Final = 3
"""Bootstrap peers asked at a time. Psyche joins while it has fewer neighbours than this (``shared/client``)."""

_MAX_BOOTSTRAP: Final = 256
"""Bootstrap peers remembered. Chosen arbitrarily."""

_SHUFFLE_OVERHEAD: Final = 48
"""Encoded size of a Shuffle without its nodes, rounded up: tags, origin, count, ttl."""

_PEER_INFO_OVERHEAD: Final = 35
"""Encoded size of a peer info beyond its data: the id, the option, a length of two bytes."""


class _Why(Enum):
    """Why a peer leaves the active view."""

    MADE_ROOM = auto()
    RECEIVED_ALIVE = auto()
    RECEIVED_LEAVING = auto()
    CLOSED = auto()


class HyParView:
    """Membership of one node in one topic.

    Args:
        me: our id.
        config: capacities, walks, times.
        rng: decides every random choice.
        data: our own peer data.

    Attributes:
        active: our neighbours, in the order they came; at most as many as :meth:`.GossipConfig.neighbors` says, but
            for those that are left over when a swarm has become larger, and go one by one.
        passive: peers to fall back on; at most ``passive_view_capacity``, none of them active.
        pending: peers that were sent a Neighbor and have not answered, with the deadline.
    """

    def __init__(self, me: PeerId, config: GossipConfig, rng: RandomSource, data: bytes = b"") -> None:
        self.active: dict[PeerId, None] = {}
        self.passive: dict[PeerId, None] = {}
        self.pending: dict[PeerId, float] = {}
        self._capacity = config.neighbors(None)
        self._me = me
        self._config = config
        self._rng = rng
        self._my_data = b""
        self._set_my_data(data)
        # Passive peers that told us, or were told by us, that they only make room: the end of their connection
        # is not a sign of death.
        self._alive: set[PeerId] = set()
        self._data: dict[PeerId, bytes] = {}
        self._bootstrap: list[PeerId] = []
        self._rejoin_delay = config.rejoin_interval
        self._timers_started = False
        self._out: list[Action] = []
        self._now = 0.0

    def set_others(self, count: int | None) -> None:
        """So many others may be in the swarm, as far as the application knows."""
        self._capacity = self._config.neighbors(count)

    def handle(
        self,
        event: JoinPeers | PeerDisconnected | UpdatePeerData | Quit | ShuffleTimer | RequestTimer | RejoinTimer,
        now: float,
    ) -> list[Action]:
        """Takes in anything but a message."""
        self._now = now
        match event:
            case JoinPeers(peers=peers):
                self._join(peers)
            case PeerDisconnected(peer=peer):
                self._on_closed(peer)
            case UpdatePeerData(data=data):
                self._set_my_data(data)
                # They hear where we are now; and if the way to one of them is gone, that shows when it does not answer.
                for peer in self.active:
                    self._send_neighbor(peer, high=True)
            case Quit():
                self._quit()
            case ShuffleTimer():
                self._on_shuffle_timer()
            case RequestTimer(peer=peer):
                self._on_request_timer(peer)
            case RejoinTimer():
                self._on_rejoin_timer()
        return self._flush()

    def receive(self, sender: PeerId, message: SwarmMessage, now: float) -> list[Action]:
        """Takes in a message of a peer."""
        self._now = now
        if sender == self._me:
            return []
        match message:
            case Join(data=data):
                self._on_join(sender, data)
            case ForwardJoin(peer=peer, ttl=ttl):
                self._on_forward_join(sender, peer, ttl)
            case Shuffle():
                self._on_shuffle(sender, message)
            case ShuffleReply(nodes=nodes):
                for node in nodes:
                    self._add_passive(node)
                self._refill()
            case Neighbor(high=high, data=data):
                self._on_neighbor(sender, high, data)
            case Disconnect(alive=alive):
                self._on_disconnect(sender, alive)
                return self._flush()
        if sender not in self.active and sender not in self.pending:
            self._out.append(DropPeer(sender))
        return self._flush()

    # -- messages ------------------------------------------------------------------------------------------------------

    def _on_join(self, sender: PeerId, data: bytes | None) -> None:
        self._add_active(sender, data, high=True, reply=True)
        others = tuple(peer for peer in self.active if peer != sender)
        if others:
            newcomer = PeerInfo(sender, data if data is None or len(data) <= MAX_PEER_DATA else None)
            self._send(others, ForwardJoin(newcomer, self._config.active_random_walk_length))

    def _on_forward_join(self, sender: PeerId, peer: PeerInfo, ttl: int) -> None:
        if peer.id == self._me:
            return
        if peer.id in self.active or ttl == 0 or len(self.active) <= 1:
            if peer.id in self.active or len(self.pending) < self._config.pending_capacity:
                self._learn(peer.id, peer.data)
                self._send_neighbor(peer.id, high=True)
            return
        if ttl == self._config.passive_random_walk_length:
            self._add_passive(peer)
        if peer.id not in self.pending:
            following = pick(self._rng, (p for p in self.active if p != sender))
            if following is not None:
                self._send((following,), ForwardJoin(peer, min(ttl, self._config.active_random_walk_length) - 1))

    def _on_neighbor(self, sender: PeerId, high: bool, data: bytes | None) -> None:
        was_reply = self.pending.pop(sender, None) is not None
        if not self._add_active(sender, data, high=high, reply=not was_reply):
            self._send_disconnect(sender, alive=True)

    def _on_disconnect(self, sender: PeerId, alive: bool) -> None:
        self.pending.pop(sender, None)
        if sender in self.active:
            self._remove_active(sender, _Why.RECEIVED_ALIVE if alive else _Why.RECEIVED_LEAVING)
        elif alive and sender in self.passive:
            self._alive.add(sender)

    def _on_shuffle(self, sender: PeerId, message: Shuffle) -> None:
        if message.origin == self._me:
            return
        if message.ttl == 0 or len(self.active) <= 1:
            for node in message.nodes:
                self._add_passive(node)
            self._send_shuffle_reply(message.origin, len(message.nodes))
            return
        following = pick(self._rng, (p for p in self.active if p != sender and p != message.origin))
        if following is not None:
            ttl = min(message.ttl, self._config.shuffle_random_walk_length) - 1
            self._send((following,), Shuffle(message.origin, message.nodes, ttl))

    # The application, the connections, the timers

    def _join(self, peers: Iterable[PeerId]) -> None:
        asked = tuple(dict.fromkeys(peer for peer in peers if peer != self._me))
        self._bootstrap = list(dict.fromkeys((*self._bootstrap, *asked)))[-_MAX_BOOTSTRAP:]
        if asked:
            self._send(asked, Join(self._my_data))

    def _on_closed(self, peer: PeerId) -> None:
        self.pending.pop(peer, None)
        if peer in self.active:
            self._remove_active(peer, _Why.CLOSED)
        elif peer in self._alive:
            self._alive.discard(peer)
        else:
            self.passive.pop(peer, None)
            self._data.pop(peer, None)

    def _quit(self) -> None:
        for peer in tuple(self.active):
            del self.active[peer]
            self._out.append(NeighborDown(peer))
            self._send_disconnect(peer, alive=False)

    def _on_shuffle_timer(self) -> None:
        peer = pick(self._rng, self.active)
        if peer is not None:
            config = self._config
            known = sample(self._rng, (p for p in self.active if p != peer), config.shuffle_active_view_count)
            known += sample(self._rng, self.passive, config.shuffle_passive_view_count)
            nodes = self._fit([PeerInfo(self._me, self._my_data), *(self._info(p) for p in known)])
            self._send((peer,), Shuffle(self._me, nodes, config.shuffle_random_walk_length))
        if len(self.active) > self._capacity:
            self._remove_active(choose(self._rng, self.active), _Why.MADE_ROOM)
        self._out.append(Schedule(self._config.shuffle_interval, ShuffleTimer()))

    def _on_request_timer(self, peer: PeerId) -> None:
        deadline = self.pending.get(peer)
        # An answered request may have been followed by another one, with a later deadline.
        if deadline is None or deadline > self._now:
            return
        del self.pending[peer]
        self._drop_passive(peer)
        self._refill()

    def _on_rejoin_timer(self) -> None:
        config = self._config
        if self.active:
            self._rejoin_delay = config.rejoin_interval
        else:
            self._refill()
            again = tuple(sample(self._rng, self._bootstrap, _JOIN_AT_ONCE))
            if again:
                self._send(again, Join(self._my_data))
            self._rejoin_delay = min(self._rejoin_delay * 2, config.rejoin_interval_max)
        self._out.append(Schedule(self._rejoin_delay, RejoinTimer()))

    # -- the active view -----------------------------------------------------------------------------------------------

    def _add_active(self, peer: PeerId, data: bytes | None, *, high: bool, reply: bool) -> bool:
        if peer not in self.active:
            if len(self.active) >= self._capacity:
                if not high:
                    return False
                self._remove_active(choose(self._rng, self.active), _Why.MADE_ROOM)
            self._drop_passive(peer)
            self.active[peer] = None
            self._out.append(NeighborUp(peer))
        self._learn(peer, data, itself=True)
        if reply:
            self._send_neighbor(peer, high=high)
        return True

    def _remove_active(self, peer: PeerId, why: _Why) -> None:
        del self.active[peer]
        self._out.append(NeighborDown(peer))
        if why is _Why.MADE_ROOM:
            self._send_disconnect(peer, alive=True)
        else:
            self._out.append(DropPeer(peer))
        if why in (_Why.MADE_ROOM, _Why.RECEIVED_ALIVE):
            self._add_passive(PeerInfo(peer))
            self._alive.add(peer)
        if why is not _Why.MADE_ROOM:
            self._refill(skip=peer)

    def _send_neighbor(self, peer: PeerId, *, high: bool) -> None:
        if peer in self.pending:
            return
        timeout = self._config.neighbor_request_timeout
        self.pending[peer] = self._now + timeout
        self._send((peer,), Neighbor(high, self._my_data))
        self._out.append(Schedule(timeout, RequestTimer(peer)))

    def _send_disconnect(self, peer: PeerId, *, alive: bool) -> None:
        # With some peers to turn to: the other one may have just joined and know nobody else.
        count = self._config.shuffle_active_view_count + self._config.shuffle_passive_view_count
        self._send_shuffle_reply(peer, count)
        self._send((peer,), Disconnect(alive))
        self._out.append(DropPeer(peer))

    def _send_shuffle_reply(self, peer: PeerId, count: int) -> None:
        count = min(count, self._config.shuffle_active_view_count + self._config.shuffle_passive_view_count + 1)
        chosen = sample(self._rng, (p for p in self.passive if p != peer), count)
        chosen += sample(self._rng, (p for p in self.active if p != peer), count - len(chosen))
        self._send((peer,), ShuffleReply(self._fit([self._info(p) for p in chosen])))

    # -- the passive view ----------------------------------------------------------------------------------------------

    def _add_passive(self, node: PeerInfo) -> None:
        peer = node.id
        if peer == self._me:
            return
        if peer not in self.active and peer not in self.passive:
            if len(self.passive) >= self._config.passive_view_capacity:
                self._drop_passive(choose(self._rng, self.passive))
            self.passive[peer] = None
        self._learn(peer, node.data)

    def _drop_passive(self, peer: PeerId) -> None:
        self.passive.pop(peer, None)
        # Kept a part of the passive view, so that it is bounded as that is.
        self._alive.discard(peer)

    def _refill(self, skip: PeerId | None = None) -> None:
        waiting = sum(1 for peer in self.pending if peer not in self.active)
        if len(self.active) + waiting >= self._capacity:
            return
        peer = pick(self._rng, (p for p in self.passive if p != skip and p not in self.pending))
        if peer is not None:
            self._send_neighbor(peer, high=not self.active)

    # -- peer data -----------------------------------------------------------------------------------------------------

    def _set_my_data(self, data: bytes) -> None:
        fits = len(data) <= min(MAX_PEER_DATA, self._config.max_message_size // 2)
        self._my_data = data if fits else b""

    def _learn(self, peer: PeerId, data: bytes | None, *, itself: bool = False) -> None:
        if data is None or len(data) > MAX_PEER_DATA or peer == self._me:
            return
        known = self._data.get(peer)
        if known == data or (known and peer in self.active and not itself):
            return
        self._data[peer] = data
        if data:
            self._out.append(LearnAddress(peer, data))

    def _info(self, peer: PeerId) -> PeerInfo:
        return PeerInfo(peer, self._data.get(peer))

    def _fit(self, nodes: list[PeerInfo]) -> tuple[PeerInfo, ...]:
        room = self._config.max_message_size - _SHUFFLE_OVERHEAD
        kept = []
        for node in nodes:
            room -= _PEER_INFO_OVERHEAD + len(node.data or b"")
            if room > 0:
                kept.append(node)
        return tuple(kept)

    # -- housekeeping --------------------------------------------------------------------------------------------------

    def _send(self, peers: tuple[PeerId, ...], message: SwarmMessage) -> None:
        self._out.append(Send(peers, message))

    def _flush(self) -> list[Action]:
        if not self._timers_started:
            self._timers_started = True
            self._out.append(Schedule(self._config.shuffle_interval, ShuffleTimer()))
            self._out.append(Schedule(self._rejoin_delay, RejoinTimer()))
        if len(self._data) > len(self.active) + len(self.passive) + len(self.pending):
            known = {*self.active, *self.passive, *self.pending}
            self._data = {peer: data for peer, data in self._data.items() if peer in known}
        out, self._out = self._out, []
        return out
