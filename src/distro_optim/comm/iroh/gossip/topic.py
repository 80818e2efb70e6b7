"""One topic of one node: membership and broadcast put together."""

from __future__ import annotations

from typing import Final

from .config import GossipConfig
from .events import (
    Action,
    DispatchTimer,
    Event,
    EvictTimer,
    GraftTimer,
    JoinPeers,
    NeighborDown,
    NeighborUp,
    PeerDisconnected,
    Publish,
    Quit,
    Received,
    TimerExpired,
    UpdatePeerData,
)
from .hyparview import HyParView
from .messages import Gossip, Graft, IHave, PeerId, Prune
from .plumtree import PlumTree
from .random_choice import RandomSource

__all__ = ["TopicState"]

# Tuples made once: `A | B` in a call makes a new object each time, in the path of every message.
_BROADCAST_MESSAGES: Final = (Gossip, IHave, Graft, Prune)
_BROADCAST_TIMERS: Final = (DispatchTimer, GraftTimer, EvictTimer)
_NEIGHBOR_ACTIONS: Final = (NeighborUp, NeighborDown)


class TopicState:
    """``handle(event, now)`` returns what is to be done.

    Args:
        me: our id.
        config: settings of both layers.
        rng: decides every random choice.
        data: our own peer data.
    """

    def __init__(self, me: PeerId, config: GossipConfig, rng: RandomSource, data: bytes = b"") -> None:
        self.membership = HyParView(me, config, rng, data)
        self.broadcast = PlumTree(me, config, rng)

    def set_others(self, count: int | None) -> None:
        """So many others may be in the topic, as far as the application knows."""
        self.membership.set_others(count)
        self.broadcast.others = count

    @property
    def neighbors(self) -> tuple[PeerId, ...]:
        """Our direct neighbours, in the order they came."""
        return tuple(self.membership.active)

    def needs(self, peer: PeerId) -> bool:
        """Whether this topic wants a connection to ``peer``."""
        return peer in self.membership.active or peer in self.membership.pending

    def handle(self, event: Event, now: float) -> list[Action]:
        """Takes in one event that happened at ``now`` (seconds of any clock that does not go back)."""
        match event:
            case Received(peer=peer, message=message):
                if isinstance(message, _BROADCAST_MESSAGES):
                    return self.broadcast.receive(peer, message, now)
                actions = self.membership.receive(peer, message, now)
            case Publish():
                return self.broadcast.handle(event, now)
            case TimerExpired(timer=timer):
                if isinstance(timer, _BROADCAST_TIMERS):
                    return self.broadcast.handle(timer, now)
                actions = self.membership.handle(timer, now)
            case PeerDisconnected(peer=peer):
                # Also without a NeighborDown: a peer that is not a neighbour may have announced payloads.
                self.broadcast.handle(NeighborDown(peer), now)
                actions = self.membership.handle(event, now)
            case JoinPeers() | UpdatePeerData() | Quit():
                actions = self.membership.handle(event, now)
        # In this order: a new neighbour gets the answer to its Join or Neighbor before any payload.
        for action in tuple(actions):
            if isinstance(action, _NEIGHBOR_ACTIONS):
                actions += self.broadcast.handle(action, now)
        return actions
