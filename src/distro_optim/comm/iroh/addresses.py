"""Where a peer can be reached: address types, their bytes, and the book of addresses that peers told us. No I/O.

Layouts: iroh ``iroh-base/src/endpoint_addr.rs`` and ``relay_url.rs``. An address that comes from a peer is a rumour:
it is only ever used to dial, the handshake then proves the identity. Still, rumours are bounded in number, age and
kind, so that nobody can make us knock on ten thousand doors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from ...buffer import Reader, Writer
from ...errors import ConfigurationError, LimitExceededError, ProtocolError
from .keys import ID_SIZE

__all__ = [
    "MAX_ADDRESSES",
    "AddressBook",
    "EndpointAddr",
    "SocketAddr",
    "pull_endpoint_addr",
    "pull_relay_url",
    "pull_socket_addr",
    "push_endpoint_addr",
    "push_relay_url",
    "push_socket_addr",
]

# A host announces a handful of interfaces, each with a local and a public address; chosen with room to spare.
MAX_ADDRESSES: Final = 32
# RFC 1035 bounds a host name to 253 characters; scheme, port and slash come on top. Chosen with room to spare.
MAX_RELAY_URL_BYTES: Final = 512
# iroh-gossip 0.97 `src/net/address_lookup.rs` forgets what gossip told it after five minutes.
LEARNT_SECONDS: Final = 300.0
# Far more peers than a run has; at some 200 bytes each the book stays below a megabyte.
MAX_PEERS: Final = 4096

_RELAY, _IP, _CUSTOM = 0, 1, 2
_V4, _V6 = 0, 1


@dataclass(frozen=True)
class SocketAddr:
    """An IP address and a UDP port.

    Raises:
        ConfigurationError: from the constructor, if the port does not fit in 16 bits.
    """

    ip: IPv4Address | IPv6Address
    port: int

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

    def __str__(self) -> str:
        return f"[{self.ip}]:{self.port}" if self.ip.version == 6 else f"{self.ip}:{self.port}"

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
class EndpointAddr:
    """A peer's id and what is known about where it is.

    Attributes:
        id: the endpoint id, 32 bytes.
        relays: URLs of relay servers, each with its final slash.
        direct: socket addresses.

    Both are kept sorted and without repetition, so that equal addresses give equal bytes.
    """

    id: bytes
    relays: tuple[str, ...] = ()
    direct: tuple[SocketAddr, ...] = ()

    def __post_init__(self) -> None:
        if len(self.id) != ID_SIZE:
            raise ConfigurationError(
                f"an endpoint id has {ID_SIZE} bytes, got {len(self.id)}", name="id", value=self.id
            )
        object.__setattr__(self, "relays", tuple(sorted(set(self.relays))))
        object.__setattr__(self, "direct", tuple(sorted(set(self.direct), key=lambda address: address.sort_key)))

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


def push_socket_addr(writer: Writer, address: SocketAddr) -> None:
    """Variant, 4 or 16 octets, port as a varint."""
    writer.push_u8(_V4 if address.ip.version == 4 else _V6)
    writer.push_bytes(address.ip.packed)
    writer.push_varint(address.port)


def pull_socket_addr(reader: Reader) -> SocketAddr:
    """See :func:`push_socket_addr`; raises ProtocolError."""
    start = reader.pos
    variant = reader.pull_varint(32)
    if variant == _V4:
        return SocketAddr(IPv4Address(bytes(reader.pull_bytes(4))), reader.pull_varint(16))
    if variant == _V6:
        return SocketAddr(IPv6Address(bytes(reader.pull_bytes(16))), reader.pull_varint(16))
    raise ProtocolError(f"unknown kind {variant} of socket address", offset=start)


def push_relay_url(writer: Writer, url: str) -> None:
    """A string: varint length, UTF-8."""
    writer.push_blob(url.encode())


def pull_relay_url(reader: Reader) -> str:
    """See :func:`push_relay_url`; raises ProtocolError for what cannot be a relay's URL."""
    start = reader.pos
    raw = bytes(reader.pull_blob(limit=MAX_RELAY_URL_BYTES))
    try:
        url = raw.decode("ascii")
    except UnicodeDecodeError:
        raise ProtocolError("a relay URL is ASCII in its normal form", offset=start) from None
    if not url.startswith(("https://", "http://")) or not url.isprintable() or " " in url:
        raise ProtocolError("a relay URL begins with https:// or http://", offset=start)
    return url


def push_endpoint_addr(writer: Writer, address: EndpointAddr) -> None:
    """Id, then the sorted set of transport addresses: relays, V4, V6."""
    writer.push_bytes(address.id)
    push_transport_addrs(writer, address)


def push_transport_addrs(writer: Writer, address: EndpointAddr) -> None:
    """The set of transport addresses alone: count, then each with its variant."""
    writer.push_varint(len(address.relays) + len(address.direct))
    for url in address.relays:
        writer.push_u8(_RELAY)
        push_relay_url(writer, url)
    for socket_addr in address.direct:
        writer.push_u8(_IP)
        push_socket_addr(writer, socket_addr)


def pull_endpoint_addr(reader: Reader) -> EndpointAddr:
    """See :func:`push_endpoint_addr`.

    Raises:
        ProtocolError: malformed, more than ``2 * MAX_ADDRESSES`` addresses, or one of the custom kind, whose layout
            differs between iroh versions.
    """
    peer = bytes(reader.pull_bytes(ID_SIZE))
    start = reader.pos
    count = reader.pull_length(item_size=2)
    if count > 2 * MAX_ADDRESSES:
        raise LimitExceededError(f"{count} addresses of one peer, at most {2 * MAX_ADDRESSES} are read", offset=start)
    relays: list[str] = []
    direct: list[SocketAddr] = []
    for _ in range(count):
        start = reader.pos
        variant = reader.pull_varint(32)
        if variant == _RELAY:
            relays.append(pull_relay_url(reader))
        elif variant == _IP:
            direct.append(pull_socket_addr(reader))
        else:
            raise ProtocolError(f"transport addresses of kind {variant} are not understood", offset=start)
    return EndpointAddr(peer, tuple(relays), tuple(direct))


@dataclass(frozen=True)
class _Rumour:
    address: EndpointAddr
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
        """Keeps what the user knows about a peer or several, beside what was known."""
        for address in (addresses,) if isinstance(addresses, EndpointAddr) else addresses:
            known = self._told.get(address.id)
            self._told[address.id] = known.merged(address) if known else address

    def learn(self, address: EndpointAddr, now: float, lifetime: float = LEARNT_SECONDS) -> None:
        """Takes over what another peer said about ``address.id``, for ``lifetime`` seconds; it replaces older word."""
        direct = tuple(a for a in address.direct if a.is_dialable)[:MAX_ADDRESSES]
        dialable = EndpointAddr(address.id, address.relays[:MAX_ADDRESSES], direct)
        self._learnt.pop(address.id, None)
        if dialable.is_empty:
            return
        self._learnt[address.id] = _Rumour(dialable, now + lifetime)
        while len(self._learnt) > self._max_peers:
            self._learnt.popitem(last=False)

    def lookup(self, peer: bytes, now: float) -> EndpointAddr:
        """All that is known about ``peer``; with neither relay nor address if that is nothing."""
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
