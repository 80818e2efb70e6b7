"""All topics of one node, without I/O.

A shell hands in events with the time, carries out the actions that come back, and calls :meth:`GossipProtocol.tick`
at :meth:`GossipProtocol.next_deadline`. What a shell has to know about connections:

* a connection carries all topics of a pair of peers;
* :class:`~.events.Send` to a peer without a connection means: connect;
* :class:`~.events.DropPeer` comes out only when no topic needs the peer any more. iroh-gossip (``src/proto/state.rs``)
  lets go already when the first of several topics does, and connects again for the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from .config import GossipConfig
from .events import (
    Action,
    DropPeer,
    Event,
    JoinPeers,
    PeerDisconnected,
    Quit,
    Schedule,
    Timer,
    TimerExpired,
    UpdatePeerData,
)
from .messages import Gossip, MessageId, PeerId, TopicId
from .random_choice import RandomSource
from .timers import TimerQueue
from .topic import TopicState

__all__ = ["GossipProtocol", "TopicAction"]

TopicAction: TypeAlias = tuple[TopicId, Action]


class GossipProtocol:
    """The gossip state of one node.

    Args:
        me: our id.
        config: settings for all topics.
        rng: decides every random choice.
    """

    def __init__(self, me: PeerId, config: GossipConfig, rng: RandomSource) -> None:
        self._me = me
        self._config = config
        self._rng = rng
        self._data = b""
        self._others: int | None = None
        self._topics: dict[TopicId, TopicState] = {}
        # Timers hold the state they were set by: a topic left and entered again must not get the old ones.
        self._timers: TimerQueue[tuple[TopicId, TopicState, Timer]] = TimerQueue()

    @property
    def topics(self) -> dict[TopicId, TopicState]:
        """The topics joined; to look at, not to change."""
        return self._topics

    def handle(self, topic: TopicId, event: Event, now: float) -> list[TopicAction]:
        """Takes in an event of one topic. Only :class:`~.events.JoinPeers` enters a topic; others are ignored then."""
        state = self._topics.get(topic)
        if state is None:
            if not isinstance(event, JoinPeers):
                return []
            state = self._topics[topic] = TopicState(self._me, self._config, self._rng, self._data)
            state.set_others(self._others)
        if isinstance(event, Quit):
            del self._topics[topic]
        return list(self._run(topic, state, event, now))

    def knows(self, topic: TopicId, id_: MessageId) -> bool:
        """Whether a message has been seen already."""
        state = self._topics.get(topic)
        return state is not None and state.broadcast.knows(id_)

    def ignore(self, topic: TopicId, message: Gossip, now: float) -> None:
        """Takes note of a message that is not to be delivered or passed on, so that nobody is asked for it."""
        state = self._topics.get(topic)
        if state is not None:
            state.broadcast.ignore(message, now)

    def disconnected(self, peer: PeerId, now: float) -> list[TopicAction]:
        """The connection used for sending to ``peer`` is gone, or could not be made."""
        return self._run_all(PeerDisconnected(peer), now)

    def update_peer_data(self, data: bytes, now: float) -> list[TopicAction]:
        """Our own addresses are now these; they go out with the next Join and Neighbor messages."""
        if data == self._data:
            return []
        self._data = data
        return self._run_all(UpdatePeerData(data), now)

    def set_others(self, count: int | None) -> None:
        """So many others may be in the topics, as far as the application knows."""
        self._others = count
        for state in self._topics.values():
            state.set_others(count)

    def next_deadline(self) -> float | None:
        """When :meth:`tick` should be called next, or None."""
        return self._timers.next_deadline()

    def tick(self, now: float) -> list[TopicAction]:
        """Runs the timers that are due."""
        out: list[TopicAction] = []
        while (due := self._timers.pop_due(now)) is not None:
            topic, state, timer = due
            if self._topics.get(topic) is state:
                out += self._run(topic, state, TimerExpired(timer), now)
        return out

    def needs(self, peer: PeerId) -> bool:
        """Whether any topic wants a connection to ``peer``."""
        return any(state.needs(peer) for state in self._topics.values())

    def _run_all(self, event: Event, now: float) -> list[TopicAction]:
        return [
            action for topic, state in tuple(self._topics.items()) for action in self._run(topic, state, event, now)
        ]

    def _run(self, topic: TopicId, state: TopicState, event: Event, now: float) -> Iterator[TopicAction]:
        for action in state.handle(event, now):
            match action:
                case Schedule(delay=delay, timer=timer):
                    self._timers.push(now + delay, (topic, state, timer))
                case DropPeer(peer=peer) if self.needs(peer):
                    pass
                case _:
                    yield topic, action
