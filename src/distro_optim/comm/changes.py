"""A frame as what has changed since the one before. No I/O.

A coordinator sends its whole state twice a second and after every change: 86 KB with 256 clients, to each of them, most
of it as it was. Between two ends of ours, once the whole state has come, only changes follow.

Psyche's programs know nothing of that, so both ends have to find out before they use it, without a word that a program
of Psyche's would not understand (PsycheFoundation/psyche, ``shared/network/src/tcp.rs``): the server says it in its
challenge, whose last eight bytes are a hash of the others where it can send changes, and random where it cannot; the
client answers with the challenge and :data:`CHANGES_MARK` if it wants them.

A change, in place of the payload of a frame::

    u8   2        where a postcard envelope has 0 or 1
    u32  size     of the new payload, big-endian
    for each 16 KiB of the new payload, the last shorter:
        u16  n    big-endian; 0: as in the old payload, at the same place
        n bytes   zlib, RFC 1950, with the old payload around that place as its dictionary: from 8 KiB before the piece
                  to 8 KiB behind it, as far as the payload goes
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from typing import Final

from ..errors import LimitExceededError, ProtocolError

__all__ = ["CHANGES_MARK", "NONCE_SIZE", "announce", "announces", "apply", "change_of"]

CHANGES_MARK: Final = b"distro-optim/changes/0"
"""Behind the challenge, in the answer of a client that wants changes."""

NONCE_SIZE: Final = 24
"""Random bytes in a challenge that announces changes."""

_HASH_SIZE: Final = 8
_CHANGE: Final = b"\x02"
_HEADER: Final = struct.Struct(">I")
_PIECE_HEADER: Final = struct.Struct(">H")

_PIECE: Final = 16 * 1024
_AROUND: Final = 8 * 1024
"""With it on both sides a piece has a dictionary of 32 KiB, which is all that zlib looks back."""

_LEVEL: Final = 1
"""What has not changed is found in the dictionary at any level."""


def announce(nonce: bytes) -> bytes:
    """The challenge of 32 bytes that says that changes can be had, from :data:`NONCE_SIZE` random ones."""
    return nonce + _hash(nonce)


def announces(challenge: bytes) -> bool:
    """Whether changes can be had from whoever sent this challenge."""
    return challenge[NONCE_SIZE:] == _hash(challenge[:NONCE_SIZE])


def change_of(old: bytes, new: bytes) -> bytes:
    """What makes ``new`` of ``old``; ``new`` itself where that is no longer.

    Args:
        old: the payload before.
        new: a payload that begins with another byte than a change.
    """
    parts = [_CHANGE, _HEADER.pack(len(new))]
    for start in range(0, len(new), _PIECE):
        piece = new[start : start + _PIECE]
        if piece == old[start : start + len(piece)]:
            parts.append(_PIECE_HEADER.pack(0))
            continue
        packer = zlib.compressobj(_LEVEL, zdict=_dictionary(old, start))
        packed = packer.compress(piece) + packer.flush()
        parts += [_PIECE_HEADER.pack(len(packed)), packed]
    change = b"".join(parts)
    return change if len(change) < len(new) else new


def apply(old: bytes | None, payload: bytes, *, limit: int) -> bytes:
    """The whole payload, of one that may be a change of ``old``.

    Args:
        old: the payload before; None if there is none.
        payload: as it came.
        limit: longest payload in bytes.

    Raises:
        LimitExceededError: it would be longer.
        ProtocolError: it is not a change of ``old``.
    """
    if payload[:1] != _CHANGE:
        return payload
    if old is None:
        raise ProtocolError("a change came before there was anything to change")
    at = 1 + _HEADER.size
    if len(payload) < at:
        raise ProtocolError("a change is cut off")
    (size,) = _HEADER.unpack_from(payload, 1)
    if size > limit:
        raise LimitExceededError(f"a change makes a payload of {size} bytes, at most {limit} may come")
    pieces: list[bytes] = []
    for start in range(0, size, _PIECE):
        wanted = min(_PIECE, size - start)
        if len(payload) < at + _PIECE_HEADER.size:
            raise ProtocolError("a change is cut off")
        (packed,) = _PIECE_HEADER.unpack_from(payload, at)
        at += _PIECE_HEADER.size
        piece = _unpacked(old, start, payload[at : at + packed], wanted) if packed else old[start : start + wanted]
        if len(piece) != wanted:
            raise ProtocolError(f"a change makes {len(piece)} bytes where {wanted} belong")
        pieces.append(piece)
        at += packed
    if at != len(payload):
        raise ProtocolError(f"a change of {len(payload)} bytes should have {at}")
    return b"".join(pieces)


def _hash(nonce: bytes) -> bytes:
    return hashlib.blake2b(nonce + CHANGES_MARK, digest_size=_HASH_SIZE).digest()


def _dictionary(old: bytes, start: int) -> bytes:
    return old[max(0, start - _AROUND) : start + _PIECE + _AROUND]


def _unpacked(old: bytes, start: int, packed: bytes, wanted: int) -> bytes:
    """At most one byte more than ``wanted``, whatever ``packed`` holds."""
    unpacker = zlib.decompressobj(zdict=_dictionary(old, start))
    try:
        piece = unpacker.decompress(packed, wanted + 1)
    except zlib.error as error:
        raise ProtocolError(f"a change cannot be unpacked: {error}") from None
    if not unpacker.eof or unpacker.unused_data:
        raise ProtocolError("a change is not one whole stream of zlib")
    return piece
