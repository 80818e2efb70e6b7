"""Tickets: one string, or one postcard value, that says where something is. No I/O.

======================  ==================================================================================
``EndpointTicket``      text: ``endpoint`` and base32 of ``00``, :class:`EndpointAddr`
``BlobTicket``          text: ``blob`` and base32 of ``00``, id, option of relay URL, socket addresses, format, hash
\\                       in postcard messages (Psyche's gossip and model sharing): address, format, hash
======================  ==================================================================================

base32 is that of RFC 4648 in lower case without padding. Sources: iroh-tickets ``src/endpoint.rs``; iroh-blobs
``src/ticket.rs``, whose serde form differs from its text.
"""

from __future__ import annotations

import base64
import binascii
import enum
from dataclasses import dataclass
from typing import Annotated, Any, Final, Self

from typing_extensions import override

from ..errors import ConfigurationError, LimitExceededError, ProtocolError
from . import postcard
from .addresses import MAX_ADDRESSES, EndpointAddr, RelayUrl, SocketAddr
from .postcard import Bytes32, Limit

__all__ = ["HASH_SIZE", "BlobFormat", "BlobTicket", "EndpointTicket"]

HASH_SIZE: Final = 32
_ENDPOINT_PREFIX: Final = "endpoint"
_BLOB_PREFIX: Final = "blob"
_MAX_TEXT: Final = 8192
"""Room for the largest address list that is read, with relay URLs of the usual length."""


class BlobFormat(enum.Enum):
    """What the hash of a ticket names; Psyche uses raw blobs only."""

    RAW = "raw"
    HASH_SEQ = "hash_seq"


@dataclass(frozen=True)
class _EndpointTicketV0:
    addr: EndpointAddr


@dataclass(frozen=True)
class _BlobTicketV0:
    id: Bytes32
    relay: RelayUrl | None
    direct: Annotated[list[SocketAddr], Limit(MAX_ADDRESSES)]
    format: BlobFormat
    hash: Bytes32


@dataclass(frozen=True)
class EndpointTicket:
    """Where a peer is."""

    addr: EndpointAddr

    @override
    def __str__(self) -> str:
        return _to_text(_ENDPOINT_PREFIX, _EndpointTicketV0(self.addr))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads what ``str`` writes; raises ProtocolError if the text is anything else."""
        ticket: _EndpointTicketV0 = _from_text(_ENDPOINT_PREFIX, text, _EndpointTicketV0)
        return cls(ticket.addr)


@dataclass(frozen=True)
class BlobTicket:
    """Which blob, and a peer that has it.

    Attributes:
        addr: a provider and where it is.
        format: one blob, or a sequence of hashes of blobs.
        hash: BLAKE3 of the blob, 32 bytes.
    """

    addr: EndpointAddr
    format: BlobFormat
    hash: Bytes32

    def __post_init__(self) -> None:
        if len(self.hash) != HASH_SIZE:
            raise ConfigurationError(f"a hash has {HASH_SIZE} bytes, got {len(self.hash)}", name="hash")

    @classmethod
    def raw(cls, addr: EndpointAddr, hash: bytes) -> Self:
        """A ticket for one blob."""
        return cls(addr, BlobFormat.RAW, hash)

    @override
    def __str__(self) -> str:
        # The text has room for one relay.
        relay = self.addr.relays[0] if self.addr.relays else None
        direct = list(self.addr.direct[:MAX_ADDRESSES])
        return _to_text(_BLOB_PREFIX, _BlobTicketV0(self.addr.id, relay, direct, self.format, self.hash))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads what ``str`` writes; raises ProtocolError if the text is anything else."""
        ticket: _BlobTicketV0 = _from_text(_BLOB_PREFIX, text, _BlobTicketV0)
        relays = () if ticket.relay is None else (ticket.relay,)
        return cls(EndpointAddr(ticket.id, relays, tuple(ticket.direct)), ticket.format, ticket.hash)


def _to_text(prefix: str, ticket: Any) -> str:
    # 00: the only variant of the enum around every ticket.
    data = b"\0" + postcard.encode(ticket)
    return prefix + base64.b32encode(data).decode("ascii").rstrip("=").lower()


def _from_text(prefix: str, text: str, form: Any) -> Any:
    text = text.strip()
    if len(text) > _MAX_TEXT:
        raise LimitExceededError(f"a ticket has at most {_MAX_TEXT} characters, got {len(text)}")
    if not text.startswith(prefix):
        raise ProtocolError(f"a ticket of this kind begins with {prefix!r}, got {text[:12]!r}")
    digits = text[len(prefix) :].upper()
    try:
        data = base64.b32decode(digits + "=" * (-len(digits) % 8))
    except (binascii.Error, ValueError):
        data = b""
    # Python's decoder overlooks bits that are left over, so that many texts would mean the same ticket.
    if not data or base64.b32encode(data).decode("ascii").rstrip("=") != digits:
        raise ProtocolError("a ticket is base32 behind its prefix; was it copied whole?")
    if data[0] != 0:
        raise ProtocolError(f"tickets of variant {data[0]} are not understood")
    try:
        return postcard.decode(form, memoryview(data)[1:])
    except ProtocolError as error:
        raise ProtocolError(f"the ticket is damaged or cut short: {error}") from error
