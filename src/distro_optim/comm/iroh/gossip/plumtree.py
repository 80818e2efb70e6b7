"""How a message reaches everybody in one topic: PlumTree.

Neighbours are *eager*, they are pushed payloads, or *lazy*, they are only told which payloads there are (IHave).
A duplicate payload makes its sender lazy (Prune), a payload that was announced and does not come makes an announcer
eager (Graft). So the eager links settle into a spanning tree, and the lazy ones repair it. The paper: Leitão, Pereira,
Rodrigues, "Epidemic Broadcast Trees", SRDS 2007. The rules are those of n0-computer/iroh-gossip
``src/proto/plumtree.rs``.

Where this node is stricter than iroh-gossip, with the same messages:

* links change on evidence, not on one message: :mod:`.patience`;
* only neighbours become eager or lazy; a stranger's Prune and Graft change no state, though its Graft is answered;
* all tables have bounds, also in bytes and per peer;
* an id that does not belong to its content is an offence;
* what was broadcast before there was any neighbour goes to the first one that comes;
* content that was broadcast or received before is not broadcast again: neighbours would only prune the tree;
* a neighbour that has announced or pushed a payload meanwhile is not told of it;
* in a swarm of few, if that is set (:attr:`~.config.GossipConfig.pushed_by_author`), everybody is everybody's
  neighbour, and an author pushes what it says to all of them. What was said to all that way is announced by three
  neighbours to each, and together with the next thing that they have to say themselves; an author that lacks a
  neighbour says so by beginning to count rounds at 1, and what it says is announced as in a tree.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final, TypeVar

from .config import GossipConfig
from .events import (
    Action,
    Deliver,
    DispatchTimer,
    EvictTimer,
    GraftTimer,
    NeighborDown,
    NeighborUp,
    Offence,
    Publish,
    Schedule,
    Send,
)
from .lazy_queue import LazyQueue
from .link_evidence import LinkEvidence
from .messages import BroadcastMessage, Gossip, Graft, IHave, MessageId, PeerId, Prune, message_id
from .random_choice import RandomSource

__all__ = ["PlumTree"]

V = TypeVar("V")

_MAX_ROUND: Final = 0xFFFF
"""Rounds are u16 on the wire; a liar must not make them overflow."""

_IHAVE_ENTRY: Final = 35
"""Largest encoded entry of an IHave: the id and a round of three bytes (``IHave::POSTCARD_MAX_SIZE``)."""

_IHAVE_OVERHEAD: Final = 33 + 3
"""A message's tag and topic as iroh-gossip accounts for them, and an IHave's tag and count."""

_TOLD_IN_MESH: Final = 3
"""Neighbours that each peer tells of a payload which its author has pushed to all, so that as many tell each. Who tells
whom differs from payload to payload, so that nobody can choose to stand around another. Chosen arbitrarily."""

_MAX_UNHEARD: Final = 64
"""Messages broadcast without a neighbour that are kept for the first one; the oldest go first. Chosen arbitrarily."""


class PlumTree:
    """Broadcast of one node in one topic.

    Args:
        me: our id.
        config: times and bounds.
        rng: decides how long to wait.

    Attributes:
        eager: neighbours that are pushed payloads.
        lazy: neighbours that are told ids. Eager and lazy ones together are the active view.
        duplicates: payloads that arrived though we had them.
        payloads: payloads that arrived, duplicates included.
        others: how many others there are in the swarm; None if nobody has said so.
    """

    def __init__(self, me: PeerId, config: GossipConfig, rng: RandomSource) -> None:
        # Dicts stand for sets that keep their order, so that a run can be repeated.
        self.eager: dict[PeerId, None] = {}
        self.lazy: dict[PeerId, None] = {}
        self.duplicates = 0
        self.payloads = 0
        self.others: int | None = None
        self._me = me
        self._config = config
        # Both in the order of expiry, because the retention is the same for all. Ordered dicts, not dicts: those take
        # linear time to find the first of the entries left after many were removed at the front.
        self._received: OrderedDict[MessageId, float] = OrderedDict()
        self._cache: OrderedDict[MessageId, tuple[float, Gossip]] = OrderedDict()
        self._cache_bytes = 0
        self._missing: dict[MessageId, dict[PeerId, int]] = {}
        self._missing_by_peer: dict[PeerId, int] = {}
        self._graft_waits: set[MessageId] = set()
        self._evidence = LinkEvidence(config, rng)
        # What lazy neighbours are to be told, and what all were told by its author as far as we know.
        largest = (config.max_message_size - _IHAVE_OVERHEAD) // _IHAVE_ENTRY
        self._lazy_queue, self._mesh_queue = LazyQueue(largest), LazyQueue(largest)
        # Our neighbours in the order of their ids, the next greater one first; None after a change.
        self._ring: list[PeerId] | None = None
        self._unheard: dict[MessageId, None] = {}
        self._evict_scheduled = False
        self._out: list[Action] = []

    def handle(
        self, event: Publish | NeighborUp | NeighborDown | DispatchTimer | GraftTimer | EvictTimer, now: float
    ) -> list[Action]:
        """Takes in anything but a message."""
        match event:
            case Publish():
                self._publish(event, now)
            case NeighborUp(peer=peer):
                self.lazy.pop(peer, None)
                self.eager[peer] = None
                self._ring = None
                self._evidence.new_link(peer)
                self._send_unheard(peer)
            case NeighborDown(peer=peer):
                self._forget_peer(peer)
            case DispatchTimer(of_mesh=False):
                self._dispatch(self._lazy_queue, now)
            case DispatchTimer():
                self._dispatch(self._mesh_queue, now)
            case GraftTimer(id=id_):
                self._on_graft_timer(id_, now)
            case EvictTimer():
                self._evict(now)
        return self._flush()

    def receive(self, sender: PeerId, message: BroadcastMessage, now: float) -> list[Action]:
        """Takes in a message of a peer, neighbour or not."""
        if sender == self._me:
            return []
        match message:
            case Gossip():
                self._on_gossip(sender, message, now)
            case IHave(entries=entries):
                for id_, round_ in entries:
                    self._on_ihave(sender, id_, round_)
            case Prune():
                self._make_lazy(sender)
            case Graft(id=id_):
                self._make_eager(sender)
                if id_ is not None and id_ in self._cache:
                    self._send((sender,), self._cache[id_][1])
        return self._flush()

    def knows(self, id_: MessageId) -> bool:
        """Whether a message has been seen already."""
        return id_ in self._received

    def ignore(self, message: Gossip, now: float) -> None:
        """Remembers a message as seen, and passes it to nobody."""
        if message_id(message.content) == message.id and message.id not in self._received:
            self._remember(message.id, now)
            self._no_longer_missing(message.id)

    # -- payloads ------------------------------------------------------------------------------------------------------

    def _publish(self, event: Publish, now: float) -> None:
        id_ = message_id(event.content)
        if event.neighbors_only:
            self._send((*self.eager, *self.lazy), Gossip(id_, event.content, None))
        elif id_ not in self._received:
            if not self.eager and not self.lazy:
                self._unheard[id_] = None
                if len(self._unheard) > _MAX_UNHEARD:
                    del self._unheard[next(iter(self._unheard))]
            # To those whom we lack as neighbours, others have to pass it on.
            round_ = 0 if self._is_complete or not self._in_mesh else 1
            self._spread(Gossip(id_, event.content, round_), round_, None, now)

    def _on_gossip(self, sender: PeerId, message: Gossip, now: float) -> None:
        self.payloads += 1
        id_, round_ = message.id, message.round
        if message_id(message.content) != id_:
            self._out.append(Offence(sender, "a message id is not the hash of its content"))
        elif id_ in self._received:
            self.duplicates += 1
            self._need_not_tell(sender, id_)
            if self._evidence.was_needless(id_):
                # The tree was only slower than the wait: no reason to change it.
                pass
            elif sender not in self.eager or self._evidence.duplicate(sender):
                self._prune(sender)
        elif round_ is None:
            self._out.append(Deliver(message.content, sender, None))
        else:
            self._evidence.first_copy(sender, id_)
            following_round = min(round_ + 1, _MAX_ROUND)
            following = Gossip(id_, message.content, following_round)
            self._spread(following, following_round, sender, now)
            self._shorten(sender, following, self._no_longer_missing(id_))
            self._out.append(Deliver(message.content, sender, round_))

    def _spread(self, message: Gossip, round_: int, sender: PeerId | None, now: float) -> None:
        """Remembers ``message`` and passes it on to everybody but the one it came from."""
        config = self._config
        id_ = message.id
        self._remember(id_, now)
        if id_ in self._cache:
            self._uncache(id_)
        self._cache[id_] = (now + config.message_cache_retention, message)
        self._cache_bytes += len(message.content)
        while self._cache_bytes > config.cache_capacity:
            self._uncache(next(iter(self._cache)))
        if sender is None and self._in_mesh:
            self._send((*self.eager, *self.lazy), message)
            self._tell(self._mesh_queue)  # in one write with it
        else:
            self._send(tuple(peer for peer in self.eager if peer != sender), message)
            # One that pushes to us though the link is lazy pushes to everybody. (Clients of Psyche do not.)
            if round_ == 1 and sender in self.lazy and self._is_complete:
                self._announce_in_mesh(sender, id_, round_, now)
            else:
                self._announce(sender, id_, round_)
        self._schedule_dispatch(now)
        if not self._evict_scheduled:
            self._evict_scheduled = True
            self._out.append(Schedule(config.cache_evict_interval, EvictTimer()))

    def _remember(self, id_: MessageId, now: float) -> None:
        self._received[id_] = now + self._config.message_id_retention
        if len(self._received) > self._config.seen_capacity:
            self._received.popitem(last=False)

    def _send_unheard(self, peer: PeerId) -> None:
        for id_ in self._unheard:
            if id_ in self._cache:
                self._send((peer,), self._cache[id_][1])
        self._unheard.clear()

    def _shorten(self, sender: PeerId, message: Gossip, announced: dict[PeerId, int]) -> None:
        """Prefers a peer that announced ``message`` over far fewer hops than it has come through ``sender``."""
        threshold = self._config.optimization_threshold
        if threshold is None or not announced or message.round is None:
            return
        peer, round_ = min(announced.items(), key=lambda item: item[1])
        if round_ < message.round and message.round - round_ >= threshold:
            if peer not in self.eager:
                self._make_eager(peer)
                self._send((peer,), Graft(None, round_))
            self._prune(sender)

    # -- announcements -------------------------------------------------------------------------------------------------

    @property
    def _in_mesh(self) -> bool:
        """Whether everybody is to be everybody's neighbour."""
        return self.others is not None and self.others <= self._config.pushed_by_author

    @property
    def _is_complete(self) -> bool:
        """Whether everybody is ours."""
        return self._in_mesh and self.others is not None and len(self.eager) + len(self.lazy) >= self.others

    def _schedule_dispatch(self, now: float) -> None:
        config = self._config
        if self._lazy_queue and not self._lazy_queue.is_scheduled:
            self._lazy_queue.is_scheduled = True
            self._out.append(Schedule(config.dispatch_timeout, DispatchTimer()))
        since = self._mesh_queue.since
        if since is not None and not self._mesh_queue.is_scheduled:
            self._mesh_queue.is_scheduled = True
            self._out.append(Schedule(since + config.mesh_dispatch_timeout - now, DispatchTimer(of_mesh=True)))

    def _dispatch(self, queue: LazyQueue, now: float) -> None:
        queue.is_scheduled = False
        # What it was set for may have been told meanwhile, and what is there be of a moment ago.
        if queue.since is None or now >= queue.since + self._config.mesh_dispatch_timeout:
            self._tell(queue)
        self._schedule_dispatch(now)

    def _tell(self, queue: LazyQueue) -> None:
        for peer, announced in queue.take():
            self._send((peer,), announced)

    def _announce(self, sender: PeerId | None, id_: MessageId, round_: int) -> None:
        """To all lazy neighbours, of which the greater ones are told first."""
        for peer in self.lazy:
            if peer != sender:
                self._say(peer, self._lazy_queue.add(peer, id_, round_, later=peer < self._me))

    def _announce_in_mesh(self, sender: PeerId | None, id_: MessageId, round_: int, now: float) -> None:
        """To some neighbours: all members together choose as many that tell each."""
        ring = self._ring
        if ring is None:
            ids = sorted((*self.eager, *self.lazy))
            ring = self._ring = [*(peer for peer in ids if peer > self._me), *(peer for peer in ids if peer < self._me)]
        for place in range(min(_TOLD_IN_MESH, len(ring))):
            peer = ring[(id_[0] + place) % len(ring)]
            if peer != sender and peer in self.lazy:
                self._say(peer, self._mesh_queue.add(peer, id_, round_))
                if self._mesh_queue.since is None:
                    self._mesh_queue.since = now

    def _say(self, peer: PeerId, announced: IHave | None) -> None:
        if announced is not None:
            self._send((peer,), announced)

    def _need_not_tell(self, peer: PeerId, id_: MessageId) -> None:
        """``peer`` has shown that it has a payload, of which it was to be told."""
        self._lazy_queue.need_not_tell(peer, id_)
        self._mesh_queue.need_not_tell(peer, id_)

    def _on_ihave(self, sender: PeerId, id_: MessageId, round_: int) -> None:
        if id_ in self._received:
            self._need_not_tell(sender, id_)
            return
        config = self._config
        announcers = self._missing.get(id_)
        held = self._missing_by_peer.get(sender, 0)
        if held >= config.missing_per_peer or (announcers is None and len(self._missing) >= config.missing_capacity):
            return
        if announcers is None:
            announcers = self._missing[id_] = {}
        if sender not in announcers:
            announcers[sender] = round_
            self._missing_by_peer[sender] = held + 1
        if id_ not in self._graft_waits:
            self._graft_waits.add(id_)
            self._out.append(Schedule(self._evidence.first_wait(), GraftTimer(id_)))

    def _on_graft_timer(self, id_: MessageId, now: float) -> None:
        self._graft_waits.discard(id_)
        announcers = self._missing.get(id_)
        if not announcers:
            return
        # An eager one first: it should have pushed the payload, and no link has to change.
        peer = next((p for p in announcers if p in self.eager), None) or next(iter(announcers))
        round_ = announcers.pop(peer)
        self._count_down(peer)
        if not announcers:
            del self._missing[id_]
        lasting = self._evidence.missed(id_, now)
        self._send((peer,), Graft(id_, round_))
        if lasting:
            self._make_eager(peer)
        elif peer not in self.eager:
            self._send((peer,), Prune())
        if announcers:
            self._graft_waits.add(id_)
            self._out.append(Schedule(self._evidence.next_wait(), GraftTimer(id_)))

    def _no_longer_missing(self, id_: MessageId) -> dict[PeerId, int]:
        announcers = self._missing.pop(id_, {})
        for peer in announcers:
            self._count_down(peer)
        return announcers

    def _count_down(self, peer: PeerId) -> None:
        held = self._missing_by_peer[peer] - 1
        if held:
            self._missing_by_peer[peer] = held
        else:
            del self._missing_by_peer[peer]

    # -- peers ---------------------------------------------------------------------------------------------------------

    def _make_eager(self, peer: PeerId) -> None:
        if peer in self.lazy:
            del self.lazy[peer]
            self.eager[peer] = None

    def _make_lazy(self, peer: PeerId) -> None:
        if peer in self.eager:
            del self.eager[peer]
            self.lazy[peer] = None

    def _prune(self, peer: PeerId) -> None:
        self._make_lazy(peer)
        self._send((peer,), Prune())

    def _forget_peer(self, peer: PeerId) -> None:
        self._evidence.forget(peer, was_eager=peer in self.eager)
        self.eager.pop(peer, None)
        self.lazy.pop(peer, None)
        self._ring = None
        self._lazy_queue.forget(peer)
        self._mesh_queue.forget(peer)
        if self._missing_by_peer.pop(peer, 0):
            for id_ in [id_ for id_, announcers in self._missing.items() if peer in announcers]:
                del self._missing[id_][peer]
                if not self._missing[id_]:
                    del self._missing[id_]

    # -- housekeeping --------------------------------------------------------------------------------------------------

    def _uncache(self, id_: MessageId) -> None:
        self._cache_bytes -= len(self._cache.pop(id_)[1].content)

    def _evict(self, now: float) -> None:
        _pop_expired(self._cache, lambda entry: entry[0] <= now, self._uncache)
        _pop_expired(self._received, lambda expiry: expiry <= now, self._received.__delitem__)
        self._evict_scheduled = bool(self._received)
        if self._evict_scheduled:
            self._out.append(Schedule(self._config.cache_evict_interval, EvictTimer()))

    def _send(self, peers: tuple[PeerId, ...], message: BroadcastMessage) -> None:
        if peers:
            self._out.append(Send(peers, message))

    def _flush(self) -> list[Action]:
        out, self._out = self._out, []
        return out


def _pop_expired(
    table: OrderedDict[MessageId, V], expired: Callable[[V], bool], remove: Callable[[MessageId], object]
) -> None:
    """Removes from the front of a table that is in the order of expiry."""
    while table:
        id_ = next(iter(table))
        if not expired(table[id_]):
            return
        remove(id_)
