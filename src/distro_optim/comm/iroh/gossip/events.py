"""What goes into the gossip state machines and what comes out of them.

Inputs are handed to ``handle(event, now)``, which returns actions. The membership and the broadcast layer of one
topic use them without a topic; :class:`~.protocol.GossipProtocol`, which holds all topics, adds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from .messages import Message, MessageId, PeerId

__all__ = [
    "Action",
    "Deliver",
    "DispatchTimer",
    "DropPeer",
    "Event",
    "EvictTimer",
    "GraftTimer",
    "JoinPeers",
    "LearnAddress",
    "NeighborDown",
    "NeighborUp",
    "Offence",
    "PeerDisconnected",
    "Publish",
    "Quit",
    "Received",
    "RejoinTimer",
    "RequestTimer",
    "Schedule",
    "Send",
    "ShuffleTimer",
    "Timer",
    "TimerExpired",
    "UpdatePeerData",
]


# -- timers ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ShuffleTimer:
    """It is time to offer peers to somebody."""


@dataclass(frozen=True, slots=True)
class RequestTimer:
    """A Neighbor request to ``peer`` should have been answered by now."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class RejoinTimer:
    """Look whether there is a neighbour at all."""


@dataclass(frozen=True, slots=True)
class DispatchTimer:
    """Send the IHaves collected; ``of_mesh``: those of payloads that everybody should have by now."""

    of_mesh: bool = False


@dataclass(frozen=True, slots=True)
class GraftTimer:
    """The payload with this id should have arrived by now."""

    id: MessageId


@dataclass(frozen=True, slots=True)
class EvictTimer:
    """Forget what is too old."""


Timer: TypeAlias = ShuffleTimer | RequestTimer | RejoinTimer | DispatchTimer | GraftTimer | EvictTimer


# -- inputs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class JoinPeers:
    """The application enters the topic, or enters it again, through these peers. None of them: wait for others."""

    peers: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True)
class Received:
    """A message arrived from ``peer``."""

    peer: PeerId
    message: Message


@dataclass(frozen=True, slots=True)
class Publish:
    """The application broadcasts; ``neighbors_only`` sends to direct neighbours and no further."""

    content: bytes
    neighbors_only: bool = False


@dataclass(frozen=True, slots=True)
class PeerDisconnected:
    """The connection used for sending to ``peer`` is gone, or could not be made."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class UpdatePeerData:
    """Our own addresses are now these (bytes of :mod:`.peer_data`)."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Quit:
    """The application leaves the topic."""


@dataclass(frozen=True, slots=True)
class TimerExpired:
    """A timer asked for with :class:`Schedule` has run out."""

    timer: Timer


Event: TypeAlias = JoinPeers | Received | Publish | PeerDisconnected | UpdatePeerData | Quit | TimerExpired


# -- actions -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """Send one message to all of ``peers``, in the order of the actions; connect to those we are not connected to."""

    peers: tuple[PeerId, ...]
    message: Message


@dataclass(frozen=True, slots=True)
class Schedule:
    """Hand in ``TimerExpired(timer)`` after ``delay`` seconds."""

    delay: float
    timer: Timer


@dataclass(frozen=True, slots=True)
class DropPeer:
    """This topic needs no connection to ``peer`` any more, once what was sent before is out."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class LearnAddress:
    """``peer`` says, or somebody says of it, that it can be reached there (bytes of :mod:`.peer_data`)."""

    peer: PeerId
    data: bytes


@dataclass(frozen=True, slots=True)
class NeighborUp:
    """``peer`` is now a direct neighbour."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class NeighborDown:
    """``peer`` is a direct neighbour no more."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Deliver:
    """A message for the application.

    Attributes:
        content: what its origin broadcast.
        peer: the neighbour that handed it over, which need not be its origin.
        round: hops before that neighbour's, or None for a message to direct neighbours only.
    """

    content: bytes
    peer: PeerId
    round: int | None


@dataclass(frozen=True, slots=True)
class Offence:
    """``peer`` did what no implementation does by mistake: the connection to it should be cut."""

    peer: PeerId
    reason: str


Action: TypeAlias = Send | Schedule | DropPeer | LearnAddress | NeighborUp | NeighborDown | Deliver | Offence
