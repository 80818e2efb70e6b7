"""What peer data says: where a peer can be reached.

Membership messages carry it as opaque bytes. iroh-gossip puts ``AddrInfo`` in it (n0-computer/iroh-gossip
``src/net.rs``): an option of one relay URL, then the set of direct socket addresses. Empty bytes mean that nothing is
known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final

from ....errors import ProtocolError
from ...addresses import MAX_ADDRESSES, EndpointAddr, RelayUrl, SocketAddr
from ...postcard import Limit, decode, encode

__all__ = ["MAX_PEER_DATA", "decode_peer_data", "encode_peer_data"]

MAX_PEER_DATA: Final = 1024
"""Peer data longer than this is not kept, passed on or sent. Chosen arbitrarily: a relay and some fifty addresses."""

_MOST_ADDRESSES: Final = MAX_PEER_DATA // 6
"""More addresses cannot be in so many bytes: an IPv4 address takes at least six."""


@dataclass(frozen=True)
class _AddrInfo:
    relay_url: RelayUrl | None
    direct: Annotated[list[SocketAddr], Limit(_MOST_ADDRESSES)]


def encode_peer_data(address: EndpointAddr) -> bytes:
    """The first relay and the first addresses of ``address``, whose order is that of Rust's sets."""
    relay = address.relays[0] if address.relays else None
    return encode(_AddrInfo(relay, list(address.direct[:MAX_ADDRESSES])))


def decode_peer_data(peer: bytes, data: bytes) -> EndpointAddr:
    """What ``data`` says of ``peer``: at most :data:`~..addresses.MAX_ADDRESSES` addresses.

    Raises:
        ProtocolError: it is longer than :data:`MAX_PEER_DATA`, or something else.
    """
    if not data:
        return EndpointAddr(peer)
    if len(data) > MAX_PEER_DATA:
        raise ProtocolError(f"peer data of {len(data)} bytes, at most {MAX_PEER_DATA} are read")
    info = decode(_AddrInfo, data)
    relays = () if info.relay_url is None else (info.relay_url,)
    return EndpointAddr(peer, relays, tuple(info.direct[:MAX_ADDRESSES]))
