"""What can be set about a gossip swarm. Nothing here is negotiated; nodes with different values work together.

The one exception is :attr:`GossipConfig.max_message_size`, which a whole swarm must share.
Defaults are those of iroh-gossip 0.97 to 0.101 (``src/proto/hyparview.rs``, ``src/proto/plumtree.rs``,
``src/proto/topic.rs``); the ones from the papers are marked [H] (Leitão, Pereira, Rodrigues: HyParView, DSN 2007) and
[P] (the same: Epidemic Broadcast Trees, SRDS 2007).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from ....buffer import varint_size
from ....errors import ConfigurationError
from ...swarm import FULL_MESH

__all__ = ["MIN_MESSAGE_SIZE", "PSYCHE_GOSSIP", "SWARM_GOSSIP", "GossipConfig"]

MIN_MESSAGE_SIZE: Final = 512
"""Smallest ``max_message_size`` iroh-gossip accepts: the membership messages must fit (``src/proto/topic.rs``)."""

_GOSSIP_OVERHEAD: Final = 2 + 32 + 1 + 3
"""Encoded size of a Gossip message beyond its content and the content's length: two tags, the id, the scope's tag and a
round of up to three bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GossipConfig:
    """Settings of one node. Durations are in seconds, sizes in bytes, walks in hops.

    Attributes:
        active_view_capacity: neighbours of a node in one topic, but for ``pushed_by_author``. [H]
        passive_view_capacity: peers remembered to replace lost neighbours. [H]
        active_random_walk_length: hops of a ForwardJoin until the newcomer is taken as a neighbour. [H]
        passive_random_walk_length: hops left of a ForwardJoin when the newcomer is remembered. [H]
        shuffle_random_walk_length: hops of a Shuffle until it is answered. [H]
        shuffle_active_view_count: neighbours named in a Shuffle. [H]
        shuffle_passive_view_count: remembered peers named in a Shuffle. [H]
        shuffle_interval: time between two Shuffles.
        neighbor_request_timeout: time a peer has to answer a Neighbor request.
        graft_timeout_1: shortest wait after an IHave before the payload is asked for.
        graft_timeout_2: shortest wait after a Graft before the next peer is asked.
        dispatch_timeout: time in which IHaves are collected.
        optimization_threshold: rounds by which a lazy path must be shorter to replace an eager one, or None for never.
            [P] and iroh-gossip have 7, which helps when one node does most of the sending; with many senders each of
            them undoes the tree of the others.
        message_cache_retention: how long payloads are kept for Grafts.
        message_id_retention: how long ids are kept against duplicates.
        cache_evict_interval: time between two sweeps of both.
        pushed_by_author: other members of a swarm, up to which everybody is everybody's neighbour, and a node pushes
            what it says itself to all of them, lazy ones too, once it is told how many there are. Ours. See
            :data:`SWARM_GOSSIP`.
        mesh_dispatch_timeout: time in which IHaves of what was pushed to everybody wait for something else that goes to
            the same neighbours. Ours.
        max_message_size: an encoded message must be shorter than this.
        cache_capacity: bytes of payload kept for Grafts; the oldest go first. Ours: iroh-gossip has no bound.
        seen_capacity: ids kept against duplicates; the oldest go first. Ours. 2,000 messages a second for the two
            minutes of Psyche's retention make 240,000.
        missing_capacity: announced ids whose payload has not arrived. Ours.
        missing_per_peer: announcements of those that one peer may hold. Ours.
        pending_capacity: Neighbor requests without an answer. Ours; strangers can make a node send them.
        rejoin_interval: first wait before a node without neighbours asks its bootstrap peers again. Ours.
        rejoin_interval_max: the wait doubles up to this.
    """

    active_view_capacity: int = 5
    passive_view_capacity: int = 30
    active_random_walk_length: int = 6
    passive_random_walk_length: int = 3
    shuffle_random_walk_length: int = 6
    shuffle_active_view_count: int = 3
    shuffle_passive_view_count: int = 4
    shuffle_interval: float = 60.0
    neighbor_request_timeout: float = 0.5
    graft_timeout_1: float = 0.080
    graft_timeout_2: float = 0.040
    dispatch_timeout: float = 0.005
    optimization_threshold: int | None = None
    pushed_by_author: int = 0
    mesh_dispatch_timeout: float = 2.0
    message_cache_retention: float = 30.0
    message_id_retention: float = 90.0
    cache_evict_interval: float = 1.0
    max_message_size: int = 4096
    cache_capacity: int = 32 << 20
    seen_capacity: int = 1 << 18
    missing_capacity: int = 1 << 14
    missing_per_peer: int = 1 << 11
    pending_capacity: int = 64
    rejoin_interval: float = 1.0
    rejoin_interval_max: float = 30.0

    def __post_init__(self) -> None:
        if self.max_message_size < MIN_MESSAGE_SIZE:
            raise ConfigurationError(
                f"max_message_size must be at least {MIN_MESSAGE_SIZE} bytes, so that membership messages fit; "
                f"got {self.max_message_size}",
                name="max_message_size",
                value=self.max_message_size,
            )
        for name in ("active_view_capacity", "passive_view_capacity", "pending_capacity", "seen_capacity"):
            if getattr(self, name) < 1:
                raise ConfigurationError(
                    f"{name} must be at least 1, got {getattr(self, name)}", name=name, value=getattr(self, name)
                )

    def neighbors(self, others: int | None) -> int:
        """How many a node may have, in a swarm of so many others; None if that is not known."""
        if others is None or others > self.pushed_by_author:
            return self.active_view_capacity
        return max(self.active_view_capacity, others + 1)  # one place to spare, for who comes before another is gone

    @property
    def max_content_size(self) -> int:
        """Bytes of content that fit in a message at every round, however far it has travelled."""
        return max_content_size(self.max_message_size)


def max_content_size(max_message_size: int) -> int:
    """Bytes of content that fit at every round in a message that is shorter than this."""
    return max_message_size - 1 - _GOSSIP_OVERHEAD - varint_size(max_message_size)


def max_message_size(content_size: int) -> int:
    """The bound of messages with so much content."""
    return content_size + varint_size(content_size) + _GOSSIP_OVERHEAD + 1


PSYCHE_GOSSIP: Final = GossipConfig(
    active_view_capacity=8,
    shuffle_interval=30.0,
    neighbor_request_timeout=2.0,
    graft_timeout_2=0.200,
    message_cache_retention=60.0,
    message_id_retention=120.0,
)
"""What Psyche's clients use (PsycheFoundation/psyche ``shared/network/src/lib.rs``)."""

SWARM_GOSSIP: Final = replace(PSYCHE_GOSSIP, dispatch_timeout=0.1, pushed_by_author=FULL_MESH)
"""The same, but for how long IHaves are collected. In a round every peer says a few things at about the same time, and
each of them would be announced to some six neighbours by itself: more frames than all else that gossip does. A payload
that was lost on its way comes later by so much, and no other.

And in a run of few, everybody is everybody's neighbour, and each author pushes what it says to all others. That takes
as many payloads as a tree does, one hop instead of several, and no stranger stands between two others: in a tree, one
that is fast becomes the parent of all, and may then hold back what it likes for as long as it takes the others to
announce, miss and fetch it. And next to nothing is announced, missed or fetched: with sixteen peers that was two thirds
of all frames, and more on a busy machine, where what comes late is fetched before it comes."""
