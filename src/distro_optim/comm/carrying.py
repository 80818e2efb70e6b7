"""Blobs of a few kilobytes that travel with the announcement that names them. No I/O, no clock.

To fetch a result of five kilobytes takes both sides more work than everything else that a round says, and a round trip.
Among few peers of our own kind, where an author tells each of the others directly, it goes along in the same message,
on their own channel, under one signature::

    ff ff ff ff 20    no other message of our own kind begins so
    u16               length of the announcement, big-endian
    announcement      as it would have been said to everybody in the run
    blob              all the rest

Who hears it takes the announcement as one said to everybody, and looks for the blob here when it is about to fetch it.
Nothing is believed of the blob: it counts for what its own BLAKE3 names.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from blake3 import blake3

from ..errors import ProtocolError
from .announcements import MAX_ANNOUNCEMENT

__all__ = ["MAX_CARRIED", "MAX_CARRYING", "CarriedBlobs", "carries", "pack", "unpack"]

MAX_CARRIED: Final = 16 << 10
"""Bytes of a blob. Fifteen of them take 20 ms on a line of 100 Mbit/s, for which whatever is said next waits."""

MAX_KEPT: Final = 4
"""Blobs of one peer that wait to be taken. It makes one in a round, which is wanted for two rounds."""

MAX_PEERS: Final = 64
"""Of whom blobs are kept; beyond it, those of the peer that was not heard of for longest go."""

MARK: Final = b"\xff\xff\xff\xff\x20"
_LENGTH_SIZE: Final = 2
_BEGIN: Final = len(MARK) + _LENGTH_SIZE
MAX_CARRYING: Final = _BEGIN + MAX_ANNOUNCEMENT + MAX_CARRIED
"""Bytes of a message with both."""


def carries(data: bytes) -> bool:
    """Whether a message of our own kind is one that carries a blob."""
    return data.startswith(MARK)


def pack(announcement: bytes, blob: bytes) -> bytes:
    """One message of both: at most :data:`~.announcements.MAX_ANNOUNCEMENT` and :data:`MAX_CARRIED` bytes."""
    return b"".join((MARK, len(announcement).to_bytes(_LENGTH_SIZE, "big"), announcement, blob))


def unpack(data: bytes) -> tuple[bytes, bytes]:
    """The inverse of :func:`pack`.

    Raises:
        ProtocolError: it is none, or a part of it is longer than it may be.
    """
    middle = _BEGIN + int.from_bytes(data[len(MARK) : _BEGIN], "big")
    if not carries(data) or not _BEGIN <= middle <= len(data):
        raise ProtocolError("a message that carries a blob ends too early")
    if middle - _BEGIN > MAX_ANNOUNCEMENT or len(data) - middle > MAX_CARRIED:
        raise ProtocolError("a message that carries a blob is too long")
    return data[_BEGIN:middle], data[middle:]


class CarriedBlobs:
    """Those that have come and were not fetched yet: at most 4 MiB."""

    def __init__(self) -> None:
        self._of_peer: OrderedDict[bytes, dict[bytes, bytes]] = OrderedDict()

    def keep(self, sender: bytes, blob: bytes) -> None:
        """One has come; older ones of the same peer make room."""
        blobs = self._of_peer.setdefault(sender, {})
        self._of_peer.move_to_end(sender)
        blobs[blake3(blob).digest()] = blob
        if len(blobs) > MAX_KEPT:
            del blobs[next(iter(blobs))]
        if len(self._of_peer) > MAX_PEERS:
            self._of_peer.popitem(last=False)

    def take(self, root: bytes, max_size: int) -> bytes | None:
        """The blob with this BLAKE3, if it has come and is not longer than this; it is not kept any longer."""
        for blobs in self._of_peer.values():
            if root in blobs and len(blobs[root]) <= max_size:
                return blobs.pop(root)
        return None
