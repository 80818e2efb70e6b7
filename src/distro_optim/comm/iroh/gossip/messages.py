"""The ten messages of a gossip topic and their bytes.

Source of the layout: n0-computer/iroh-gossip ``src/proto/{topic,hyparview,plumtree}.rs``, encoded with postcard: an
enum is a varint tag and its fields, a list is a varint count and its items, an option is ``00`` or ``01`` and the
value. Bytes after the message are ignored, as the Rust decoder does.

==========  ===========================================================================
``00 00``   :class:`Join`          option of peer data
``00 01``   :class:`ForwardJoin`   peer info, u16 ttl
``00 02``   :class:`Shuffle`       32 bytes origin, list of peer info, u16 ttl
``00 03``   :class:`ShuffleReply`  list of peer info
``00 04``   :class:`Neighbor`      priority (0 high, 1 low), option of peer data
``00 05``   :class:`Disconnect`    bool alive, bool unused
``01 00``   :class:`Gossip`        32 bytes id, bytes content, scope (0 and u16 round, or 1)
``01 01``   :class:`Prune`
``01 02``   :class:`Graft`         option of 32 bytes id, u16 round
``01 03``   :class:`IHave`         list of (32 bytes id, u16 round)
==========  ===========================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import blake3

from ....buffer import Reader, Writer
from ....errors import ProtocolError

__all__ = [
    "ID_SIZE",
    "BroadcastMessage",
    "Disconnect",
    "ForwardJoin",
    "Gossip",
    "Graft",
    "IHave",
    "Join",
    "Message",
    "MessageId",
    "Neighbor",
    "PeerId",
    "PeerInfo",
    "Prune",
    "Shuffle",
    "ShuffleReply",
    "SwarmMessage",
    "TopicId",
    "decode_message",
    "encode_message",
    "message_id",
]

ID_SIZE: Final = 32
"""Bytes of a peer id (an Ed25519 public key), a topic id and a message id."""

_PEER_INFO_MIN: Final = ID_SIZE + 1
"""Smallest encoded peer info: an id and an absent option."""

_IHAVE_MIN: Final = ID_SIZE + 1
"""Smallest encoded entry of an IHave: an id and a round of one byte."""

_SWARM, _GOSSIP = 0, 1
_HIGH, _LOW = 0, 1
_SCOPE_SWARM, _SCOPE_NEIGHBORS = 0, 1

PeerId: TypeAlias = bytes
TopicId: TypeAlias = bytes
MessageId: TypeAlias = bytes


def message_id(content: bytes) -> MessageId:
    """BLAKE3 of the content alone: neither topic nor sender goes in, so equal contents are one message."""
    return blake3.blake3(content).digest()


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """A peer, and how it may be reached: the bytes of :mod:`.peer_data`, or None if nothing was ever said."""

    id: PeerId
    data: bytes | None = None


@dataclass(frozen=True, slots=True)
class Join:
    """The sender enters the topic through us."""

    data: bytes | None = None


@dataclass(frozen=True, slots=True)
class ForwardJoin:
    """A newcomer walks through the swarm to find neighbours; ``ttl`` hops are left."""

    peer: PeerInfo
    ttl: int


@dataclass(frozen=True, slots=True)
class Shuffle:
    """``origin`` offers peers it knows and wants as many back; ``ttl`` hops are left."""

    origin: PeerId
    nodes: tuple[PeerInfo, ...]
    ttl: int


@dataclass(frozen=True, slots=True)
class ShuffleReply:
    """Peers the sender knows."""

    nodes: tuple[PeerInfo, ...]


@dataclass(frozen=True, slots=True)
class Neighbor:
    """The sender takes us as neighbour, or answers that we did. Only ``high`` requests may not be refused."""

    high: bool
    data: bytes | None = None


@dataclass(frozen=True, slots=True)
class Disconnect:
    """We are no longer the sender's neighbour. ``alive``: it stays in the swarm and may be asked again."""

    alive: bool


@dataclass(frozen=True, slots=True)
class Gossip:
    """A payload.

    Attributes:
        id: :func:`message_id` of ``content``.
        content: what the application sent.
        round: hops it has travelled, or None when it is meant for direct neighbours only.
    """

    id: MessageId
    content: bytes
    round: int | None


@dataclass(frozen=True, slots=True)
class Prune:
    """Announce payloads to the sender instead of pushing them."""


@dataclass(frozen=True, slots=True)
class Graft:
    """Push payloads to the sender again, and send the one with this ``id`` now, if one is named."""

    id: MessageId | None
    round: int


@dataclass(frozen=True, slots=True)
class IHave:
    """Payloads the sender holds: ``(id, round)`` each."""

    entries: tuple[tuple[MessageId, int], ...]


SwarmMessage: TypeAlias = Join | ForwardJoin | Shuffle | ShuffleReply | Neighbor | Disconnect
BroadcastMessage: TypeAlias = Gossip | Prune | Graft | IHave
Message: TypeAlias = SwarmMessage | BroadcastMessage


def encode_message(message: Message) -> bytes:
    """The bytes of one frame, without its length."""
    w = Writer()
    match message:
        case Gossip(id=id_, content=content, round=round_):
            w.push_u8(_GOSSIP)
            w.push_u8(0)
            w.push_bytes(id_)
            w.push_blob(content)
            if round_ is None:
                w.push_u8(_SCOPE_NEIGHBORS)
            else:
                w.push_u8(_SCOPE_SWARM)
                w.push_varint(round_)
        case Prune():
            w.push_bytes(b"\x01\x01")
        case Graft(id=graft_id, round=graft_round):
            w.push_bytes(b"\x01\x02")
            w.push_bool(graft_id is not None)
            w.push_bytes(graft_id or b"")
            w.push_varint(graft_round)
        case IHave(entries=entries):
            w.push_bytes(b"\x01\x03")
            w.push_varint(len(entries))
            for entry_id, entry_round in entries:
                w.push_bytes(entry_id)
                w.push_varint(entry_round)
        case Join(data=data):
            w.push_bytes(b"\x00\x00")
            _push_data(w, data)
        case ForwardJoin(peer=peer, ttl=ttl):
            w.push_bytes(b"\x00\x01")
            _push_peer(w, peer)
            w.push_varint(ttl)
        case Shuffle(origin=origin, nodes=nodes, ttl=ttl):
            w.push_bytes(b"\x00\x02")
            w.push_bytes(origin)
            _push_peers(w, nodes)
            w.push_varint(ttl)
        case ShuffleReply(nodes=nodes):
            w.push_bytes(b"\x00\x03")
            _push_peers(w, nodes)
        case Neighbor(high=high, data=data):
            w.push_bytes(b"\x00\x04")
            w.push_u8(_HIGH if high else _LOW)
            _push_data(w, data)
        case Disconnect(alive=alive):
            w.push_bytes(b"\x00\x05")
            w.push_bool(alive)
            w.push_bool(False)
    return w.finish()


def decode_message(frame: bytes | bytearray | memoryview) -> Message:
    """The message in one frame.

    Raises:
        ProtocolError: the bytes are not a message. Nothing larger than the frame is allocated on the way.
    """
    r = Reader(frame)
    layer = r.pull_varint(32)
    kind = r.pull_varint(32)
    pull = _PULL.get((layer, kind))
    if pull is None:
        raise ProtocolError(f"there is no gossip message with tags {layer} and {kind}", offset=0)
    return pull(r)


def _push_data(w: Writer, data: bytes | None) -> None:
    w.push_bool(data is not None)
    if data is not None:
        w.push_blob(data)


def _pull_data(r: Reader) -> bytes | None:
    return bytes(r.pull_blob()) if r.pull_bool() else None


def _push_peer(w: Writer, peer: PeerInfo) -> None:
    w.push_bytes(peer.id)
    _push_data(w, peer.data)


def _pull_peer(r: Reader) -> PeerInfo:
    return PeerInfo(bytes(r.pull_bytes(ID_SIZE)), _pull_data(r))


def _push_peers(w: Writer, peers: tuple[PeerInfo, ...]) -> None:
    w.push_varint(len(peers))
    for peer in peers:
        _push_peer(w, peer)


def _pull_peers(r: Reader) -> tuple[PeerInfo, ...]:
    return tuple(_pull_peer(r) for _ in range(r.pull_length(item_size=_PEER_INFO_MIN)))


def _pull_gossip(r: Reader) -> Gossip:
    id_ = bytes(r.pull_bytes(ID_SIZE))
    content = bytes(r.pull_blob())
    scope = r.pull_varint(32)
    if scope == _SCOPE_SWARM:
        return Gossip(id_, content, r.pull_varint(16))
    if scope == _SCOPE_NEIGHBORS:
        return Gossip(id_, content, None)
    raise ProtocolError(f"a scope is {_SCOPE_SWARM} or {_SCOPE_NEIGHBORS}, not {scope}", field="gossip.scope")


def _pull_graft(r: Reader) -> Graft:
    id_ = bytes(r.pull_bytes(ID_SIZE)) if r.pull_bool() else None
    return Graft(id_, r.pull_varint(16))


def _pull_ihave(r: Reader) -> IHave:
    count = r.pull_length(item_size=_IHAVE_MIN)
    return IHave(tuple((bytes(r.pull_bytes(ID_SIZE)), r.pull_varint(16)) for _ in range(count)))


def _pull_shuffle(r: Reader) -> Shuffle:
    return Shuffle(bytes(r.pull_bytes(ID_SIZE)), _pull_peers(r), r.pull_varint(16))


def _pull_neighbor(r: Reader) -> Neighbor:
    priority = r.pull_varint(32)
    if priority not in (_HIGH, _LOW):
        raise ProtocolError(f"a priority is {_HIGH} or {_LOW}, not {priority}", field="neighbor.priority")
    return Neighbor(priority == _HIGH, _pull_data(r))


def _pull_disconnect(r: Reader) -> Disconnect:
    alive = r.pull_bool()
    r.pull_bool()
    return Disconnect(alive)


_PULL: Final[dict[tuple[int, int], Callable[[Reader], Message]]] = {
    (_SWARM, 0): lambda r: Join(_pull_data(r)),
    (_SWARM, 1): lambda r: ForwardJoin(_pull_peer(r), r.pull_varint(16)),
    (_SWARM, 2): _pull_shuffle,
    (_SWARM, 3): lambda r: ShuffleReply(_pull_peers(r)),
    (_SWARM, 4): _pull_neighbor,
    (_SWARM, 5): _pull_disconnect,
    (_GOSSIP, 0): _pull_gossip,
    (_GOSSIP, 1): lambda r: Prune(),
    (_GOSSIP, 2): _pull_graft,
    (_GOSSIP, 3): _pull_ihave,
}
