"""From a blob to the bytes of a response: its size, then the walk's pairs and data, in pieces fit for a stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from .ranges import ALL, ChunkRanges
from .tree import CHUNK_LEN, GROUP_CHUNKS, PAIR_LEN, Buffer, chunk_cvs, pair_up
from .walk import Leaf, walk

__all__ = ["PIECE_LEN", "SIZE_LEN", "ReadableBlob", "encode", "encoded_len"]

SIZE_LEN: Final = 8
"""A response begins with the blob's size, u64 little-endian."""

PIECE_LEN: Final = 256 * 1024
"""Pieces are cut at about this length, unless another is asked for; 64 KiB to 4 MiB are equally fast on a stream
(measured), as long as nothing else in the process wants the interpreter."""

_WINDOW_CHUNKS: Final = 64 * GROUP_CHUNKS
"""Chunks hashed at once when pairs below group level are asked for: lock-step hashing needs company, and a request
that picks at every group must not cost more than hashing the blob once."""


class ReadableBlob(Protocol):
    """A complete blob, as a store hands it out."""

    @property
    def size(self) -> int:
        """Bytes of data."""

    @property
    def outboard(self) -> Buffer:
        """Pre-order pairs, see :mod:`.outboard`."""

    def read(self, offset: int, length: int) -> Buffer:
        """``length`` bytes from ``offset``; within the blob.

        Raises:
            OSError: the data is gone.
        """


def encoded_len(size: int) -> int:
    """Bytes of the response to a request for a whole blob of ``size`` bytes."""
    groups = max(1, -(-size // (GROUP_CHUNKS * CHUNK_LEN)))
    return SIZE_LEN + size + PAIR_LEN * (groups - 1)


def encode(blob: ReadableBlob, ranges: ChunkRanges = ALL, piece_len: int = PIECE_LEN) -> Iterator[bytes]:
    """The response for ``ranges`` of ``blob``, lazily, in pieces of about ``piece_len`` bytes, none empty."""
    size, outboard = blob.size, blob.outboard
    within_groups = _GroupPairs(blob)
    parts: list[Buffer] = [size.to_bytes(SIZE_LEN, "little")]
    length = SIZE_LEN
    for item in walk(size, ranges):
        if isinstance(item, Leaf):
            if item.size:
                parts.append(blob.read(item.start * CHUNK_LEN, item.size))
                length += item.size
        else:
            if item.slot is None:
                parts.append(within_groups.pair(item.start, item.left_chunks))
            else:
                at = item.slot * PAIR_LEN
                parts.append(outboard[at : at + PAIR_LEN])
            length += PAIR_LEN
        # A request that picks here and there costs much hashing for few bytes; its pieces come window by window.
        if length >= piece_len or within_groups.take_moved():
            yield b"".join(parts)
            parts, length = [], 0
    if parts:
        yield b"".join(parts)


class _GroupPairs:
    """Recomputes pairs below group level from the data, a window of chunks at a time."""

    def __init__(self, blob: ReadableBlob) -> None:
        self._blob = blob
        self._first = -1
        self._moved = False
        # CVs of chunks, of pairs of chunks, of fours, of eights: (n, 32) uint8 each.
        self._levels: list[npt.NDArray[np.uint8]] = []

    def pair(self, start: int, left_chunks: int) -> bytes:
        """The pair of the node that begins at chunk ``start`` and has ``left_chunks``, 1 to 8, under its left child."""
        window = start // _WINDOW_CHUNKS * _WINDOW_CHUNKS
        if window != self._first:
            offset = window * CHUNK_LEN
            length = min(_WINDOW_CHUNKS * CHUNK_LEN, self._blob.size - offset)
            self._levels = [chunk_cvs(self._blob.read(offset, length), window)]
            while len(self._levels) < GROUP_CHUNKS.bit_length() - 1:
                self._levels.append(pair_up(self._levels[-1]))
            self._first = window
            self._moved = True
        height = left_chunks.bit_length() - 1
        at = (start - window) >> height
        # As in the outboard: an odd last node moved up unchanged, so the right child is next to the left one.
        return self._levels[height][at : at + 2].tobytes()

    def take_moved(self) -> bool:
        """Whether chunks were hashed since the last call."""
        moved, self._moved = self._moved, False
        return moved
