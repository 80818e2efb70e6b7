"""Sets of chunks: which 1024-byte chunks of a blob, and of each blob of a sequence, a peer asks for.

A set is a sorted list of boundaries at which selection toggles, starting unselected: ``()`` nothing, ``(0,)``
everything, ``(15,)`` from chunk 15 to the end, ``(1, 3, 9, 13)`` chunks 1..3 and 9..13 (ends excluded). Boundaries at
or behind the end of a blob mean its last chunk, whose proof is also the proof of the blob's size.

Rules from bao-tree ``src/rec.rs`` (truncation), ``range-collections`` (splitting) and iroh-blobs
``src/protocol/range_spec.rs`` (sequences and the wire form, which lists the *differences* of boundaries).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Self

from ....buffer import Reader, Writer
from ....errors import ProtocolError
from .tree import GROUP_CHUNKS, chunk_count

__all__ = ["ALL", "LAST_CHUNK", "MAX_BOUNDARY", "NOTHING", "ChunkRanges", "RangesSeq"]

MAX_BOUNDARY: Final = 2**64 - 1


@dataclass(frozen=True, slots=True)
class ChunkRanges:
    """A set of chunks of one blob.

    Attributes:
        boundaries: strictly increasing, each in 0..2^64-1.
    """

    boundaries: tuple[int, ...]

    def __post_init__(self) -> None:
        b = self.boundaries
        if any(x >= y for x, y in pairwise(b)) or (b and not (b[0] >= 0 and b[-1] <= MAX_BOUNDARY)):
            raise ValueError(f"boundaries must rise strictly within 0..2^64-1, got {b[:8]}")

    def __bool__(self) -> bool:
        return bool(self.boundaries)

    def __contains__(self, chunk: int) -> bool:
        i = bisect_left(self.boundaries, chunk)
        at_boundary = i < len(self.boundaries) and self.boundaries[i] == chunk
        return (i + at_boundary) % 2 == 1

    @classmethod
    def span(cls, start: int, stop: int | None = None) -> Self:
        """Chunks ``start..stop``, without ``stop``; to the end if it is None."""
        if stop is None:
            return cls((start,))
        return cls((start, stop)) if start < stop else cls(())

    def truncated(self, size: int) -> ChunkRanges:
        """The boundaries that matter for a blob of ``size`` bytes: what lies behind its end becomes its last chunk."""
        b = self.boundaries
        last = chunk_count(size) - 1
        i = bisect_left(b, last)
        if i < len(b) and b[i] == last:
            # `last` begins a span: keep it, drop the rest. Or it ends one: it stays only if nothing follows it,
            # else the span is left open, which fills the hole in front of the last chunk.
            keep = i + 1 if i % 2 == 0 or i == len(b) - 1 else i
        elif i % 2 == 0:
            # Unselected at `last`; a later span means the last chunk, so its start stays.
            keep = min(i + 1, len(b))
        else:
            # Selected at `last`: the end behind it does not matter.
            keep = i
        return ChunkRanges(b[:keep])

    def push(self, writer: Writer) -> None:
        """Count, then each boundary as its distance to the one before."""
        writer.push_varint(len(self.boundaries))
        previous = 0
        for boundary in self.boundaries:
            writer.push_varint(boundary - previous)
            previous = boundary

    @classmethod
    def pull(cls, reader: Reader) -> Self:
        """The pair of :meth:`push`. Empty spans (a distance of 0) are accepted and dissolved, as in Rust.

        Raises:
            ProtocolError: a boundary above 2^64-1; or fewer bytes than announced.
        """
        start = reader.pos
        boundaries: list[int] = []
        position = 0
        for _ in range(reader.pull_length()):
            position += reader.pull_varint()
            if boundaries and boundaries[-1] == position:
                boundaries.pop()
            else:
                boundaries.append(position)
        if position > MAX_BOUNDARY:
            raise ProtocolError("a chunk boundary does not fit in 64 bits", offset=start)
        return cls(tuple(boundaries))


NOTHING: Final = ChunkRanges(())
ALL: Final = ChunkRanges((0,))
LAST_CHUNK: Final = ChunkRanges((MAX_BOUNDARY,))
"""Whatever the size is: the chunk that proves it."""


@dataclass(frozen=True, slots=True)
class RangesSeq:
    """Chunk sets for a sequence of blobs, run-length coded.

    Attributes:
        runs: pairs (index, set) with indices that do not fall. A set holds from its index until the next pair; the
            last one holds to the end, so that a final empty set closes the sequence. Of pairs with one index the last
            counts.
    """

    runs: tuple[tuple[int, ChunkRanges], ...]

    @classmethod
    def single(cls, ranges: ChunkRanges = ALL) -> Self:
        """Only the first blob."""
        return cls(((0, ranges), (1, NOTHING)) if ranges else ())

    @classmethod
    def first(cls, count: int) -> Self:
        """The first ``count`` blobs, whole."""
        return cls(((0, ALL), (count, NOTHING)))

    @property
    def is_aligned(self) -> bool:
        """Whether it selects only whole chunk groups, as for whole blobs or the rest of one."""
        return all(b % GROUP_CHUNKS == 0 for _, ranges in self.runs for b in ranges.boundaries)

    def spans(self) -> Iterator[tuple[int, int | None, ChunkRanges]]:
        """(first index, index behind the last or None if there is none, set) for every run that selects something."""
        for i, (start, ranges) in enumerate(self.runs):
            stop = self.runs[i + 1][0] if i + 1 < len(self.runs) else None
            if ranges and start != stop:
                yield start, stop, ranges

    def push(self, writer: Writer) -> None:
        """Count, then pairs of the distance to the index before and the set."""
        writer.push_varint(len(self.runs))
        previous = 0
        for index, ranges in self.runs:
            writer.push_varint(index - previous)
            ranges.push(writer)
            previous = index

    @classmethod
    def pull(cls, reader: Reader) -> Self:
        """The pair of :meth:`push`.

        Raises:
            ProtocolError: an index above 2^64-1; or fewer bytes than announced.
        """
        start = reader.pos
        runs: list[tuple[int, ChunkRanges]] = []
        index = 0
        for _ in range(reader.pull_length(item_size=2)):
            index += reader.pull_varint()
            runs.append((index, ChunkRanges.pull(reader)))
        if index > MAX_BOUNDARY:
            raise ProtocolError("a blob index does not fit in 64 bits", offset=start)
        return cls(tuple(runs))
