"""Where a peer can be reached: address types, their bytes, and the book of addresses that peers told us. No I/O.

Layouts: iroh ``iroh-base/src/endpoint_addr.rs`` and ``relay_url.rs``. An address that comes from a peer is a rumour:
it is only ever used to dial, the handshake then proves the identity. Still, rumours are bounded in number, age and
kind, so that nobody can make us dial ten thousand addresses.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Annotated, Final

from typing_extensions import override

from ..errors import ConfigurationError
from .postcard import U16, Bytes32, Fixed, Limit, Via
from .signing import PUBLIC_KEY_SIZE

__all__ = ["MAX_ADDRESSES", "AddressBook", "EndpointAddr", "RelayUrl", "SocketAddr", "TransportAddr"]

MAX_ADDRESSES: Final = 32
"""A host announces a handful of interfaces, each with a local and a public address; chosen with room to spare."""

MAX_RELAY_URL_BYTES: Final = 512
"""RFC 1035 bounds a host name to 253 characters; scheme, port and slash come on top. Chosen with room to spare."""

LEARNT_SECONDS: Final = 300.0
"""Iroh-gossip 0.97 ``src/net/address_lookup.rs`` forgets what gossip told it after five minutes."""

MAX_PEERS: Final = 4096
"""Far more peers than a run has; at some 200 bytes each the book stays below a megabyte."""


# -- the form on the wire: three Rust enums and a struct ---------------------------------------------------------------


@dataclass(frozen=True)
class _V4:
    octets: Annotated[bytes, Fixed(4)]
    port: U16


@dataclass(frozen=True)
class _V6:
    octets: Annotated[bytes, Fixed(16)]
    port: U16


def _checked_url(url: str) -> str:
    if not url.startswith(("https://", "http://")) or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError(
            f"a relay URL in its normal form is ASCII and begins with https:// or http://, got {url[:40]!r}"
        )
    return url


RelayUrl = Annotated[str, Via(Annotated[str, Limit(MAX_RELAY_URL_BYTES)], str, _checked_url)]


# -- what they mean ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SocketAddr:
    """An IP address and a UDP port; in postcard messages Rust's ``SocketAddr``.

    Raises:
        ConfigurationError: from the constructor, if the port does not fit in 16 bits.
    """

    ip: IPv4Address | IPv6Address
    port: int

    __postcard__ = Via(_V4 | _V6, lambda address: address._to_wire(), lambda wire: SocketAddr._from_wire(wire))

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 0xFFFF:
            raise ConfigurationError(f"a port is 0 to 65535, got {self.port}", name="port", value=self.port)

    @classmethod
    def parse(cls, text: str) -> SocketAddr:
        """From ``"127.0.0.1:4433"`` or ``"[::1]:4433"``.

        Raises:
            ConfigurationError: it is neither.
        """
        host, colon, port = text.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        try:
            ip = ip_address(host[1:-1] if bracketed else host)
            if not colon or bracketed != (ip.version == 6) or not (port.isascii() and port.isdigit()):
                raise ValueError
            return cls(ip, int(port))
        except ValueError:
            raise ConfigurationError(
                f"an address looks like 192.0.2.1:4433 or [2001:db8::1]:4433, got {text!r}", name="address", value=text
            ) from None

    @override
    def __str__(self) -> str:
        return f"[{self.ip}]:{self.port}" if self.ip.version == 6 else f"{self.ip}:{self.port}"

    def _to_wire(self) -> _V4 | _V6:
        return (_V4 if self.ip.version == 4 else _V6)(self.ip.packed, self.port)

    @classmethod
    def _from_wire(cls, wire: _V4 | _V6) -> SocketAddr:
        return cls((IPv4Address if isinstance(wire, _V4) else IPv6Address)(wire.octets), wire.port)

    @property
    def sort_key(self) -> tuple[int, int, int]:
        """Rust's order of socket addresses: V4 before V6, then address, then port."""
        return self.ip.version, int(self.ip), self.port

    @property
    def is_dialable(self) -> bool:
        """Whether a peer can live there: no port 0, no multicast, broadcast or unspecified address."""
        return (
            self.port != 0
            and not self.ip.is_multicast
            and not self.ip.is_unspecified
            and self.ip != IPv4Address("255.255.255.255")
        )


@dataclass(frozen=True)
class _Relay:
    url: RelayUrl


@dataclass(frozen=True)
class _Ip:
    addr: SocketAddr


# A third variant, Custom, changed its layout after iroh 1.0.3; an address list with one is refused.
TransportAddr = _Relay | _Ip


@dataclass(frozen=True)
class _EndpointAddr:
    id: Bytes32
    addrs: Annotated[tuple[TransportAddr, ...], Limit(2 * MAX_ADDRESSES)]

    # Every result comes with a ticket, and its address is the same for as long as the peer does not move.
    __postcard_cached__ = PUBLIC_KEY_SIZE

    @cached_property
    def meaning(self) -> EndpointAddr:
        relays = tuple(place.url for place in self.addrs if isinstance(place, _Relay))
        direct = tuple(place.addr for place in self.addrs if isinstance(place, _Ip))
        return EndpointAddr(self.id, relays, direct)


@dataclass(frozen=True)
class EndpointAddr:
    """A peer's id and what is known about where it is.

    Attributes:
        id: the endpoint id, 32 bytes.
        relays: URLs of relay servers, each with its final slash.
        direct: socket addresses.

    Both are kept sorted and without repetition, so that equal addresses give equal bytes. In postcard messages this
    is iroh's ``EndpointAddr``.
    """

    id: bytes
    relays: tuple[str, ...] = ()
    direct: tuple[SocketAddr, ...] = ()

    __postcard__ = Via(_EndpointAddr, lambda address: address._to_wire(), lambda wire: wire.meaning)

    def __post_init__(self) -> None:
        if len(self.id) != PUBLIC_KEY_SIZE:
            raise ConfigurationError(
                f"an endpoint id has {PUBLIC_KEY_SIZE} bytes, got {len(self.id)}", name="id", value=self.id
            )
        object.__setattr__(self, "relays", tuple(sorted(set(self.relays))))
        object.__setattr__(self, "direct", tuple(sorted(set(self.direct), key=lambda address: address.sort_key)))

    def _to_wire(self) -> _EndpointAddr:
        # Relays before IPs, as Rust sorts its set.
        return _EndpointAddr(self.id, (*map(_Relay, self.relays), *map(_Ip, self.direct)))

    @property
    def is_empty(self) -> bool:
        """Whether nothing but the id is known."""
        return not self.relays and not self.direct

    def merged(self, other: EndpointAddr) -> EndpointAddr:
        """Both together, at most :data:`MAX_ADDRESSES` of a kind, ``other``'s first."""
        if other.id != self.id:
            raise ConfigurationError("addresses of two different peers cannot be merged", name="other")
        relays = tuple(dict.fromkeys(other.relays + self.relays))[:MAX_ADDRESSES]
        direct = tuple(dict.fromkeys(other.direct + self.direct))[:MAX_ADDRESSES]
        return EndpointAddr(self.id, relays, direct)


@dataclass(frozen=True)
class _Rumour:
    said: EndpointAddr
    address: EndpointAddr  # what of it can be dialled
    expires: float


class AddressBook:
    """Addresses of peers, from the user (kept) and from other peers (forgotten after a while).

    Args:
        max_peers: how many learnt entries are held; the one not heard of for longest goes first. Entries of the
            user do not count.
    """

    def __init__(self, max_peers: int = MAX_PEERS) -> None:
        if max_peers < 1:
            raise ConfigurationError(
                f"max_peers must be at least 1, got {max_peers}", name="max_peers", value=max_peers
            )
        self._max_peers = max_peers
        self._told: dict[bytes, EndpointAddr] = {}
        self._learnt: OrderedDict[bytes, _Rumour] = OrderedDict()

    def __len__(self) -> int:
        return len(self._told.keys() | self._learnt.keys())

    def add(self, addresses: EndpointAddr | Iterable[EndpointAddr]) -> None:
        """Adds what the user knows about one peer or several."""
        for address in (addresses,) if isinstance(addresses, EndpointAddr) else addresses:
            known = self._told.get(address.id)
            self._told[address.id] = known.merged(address) if known else address

    def learn(self, address: EndpointAddr, now: float, lifetime: float = LEARNT_SECONDS) -> None:
        """Takes over what another peer said about ``address.id``, for ``lifetime`` seconds; it replaces older word."""
        known = self._learnt.pop(address.id, None)
        if known is not None and known.said == address:  # as in each round
            dialable = known.address
        else:
            direct = tuple(a for a in address.direct if a.is_dialable)[:MAX_ADDRESSES]
            dialable = EndpointAddr(address.id, address.relays[:MAX_ADDRESSES], direct)
        if dialable.is_empty:
            return
        self._learnt[address.id] = _Rumour(address, dialable, now + lifetime)
        while len(self._learnt) > self._max_peers:
            self._learnt.popitem(last=False)

    def lookup(self, peer: bytes, now: float) -> EndpointAddr:
        """All that is known about ``peer``; without relays and addresses if nothing is."""
        known = self._told.get(peer, EndpointAddr(peer))
        rumour = self._learnt.get(peer)
        if rumour is None:
            return known
        if rumour.expires <= now:
            del self._learnt[peer]
            return known
        return known.merged(rumour.address)

    def forget(self, peer: bytes) -> None:
        """Drops everything about ``peer``."""
        self._told.pop(peer, None)
        self._learnt.pop(peer, None)
