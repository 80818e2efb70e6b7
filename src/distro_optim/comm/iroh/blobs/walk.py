"""Which hash pairs and data pieces a range request selects, in the order in which they travel.

The response to a request is the blob's tree in pre-order, cut to what is asked: both sides walk it alike, so nothing
on the wire has to be labelled. Source: bao-tree ``src/iter.rs`` (``ResponseIterRef``) with the chunk groups of
iroh-blobs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Generator
from typing import Final, NamedTuple, TypeAlias

from .ranges import ChunkRanges
from .tree import CHUNK_LEN, GROUP_CHUNKS, chunk_count

__all__ = ["Item", "Leaf", "Parent", "walk"]

_WHOLE: Final[tuple[int, ...]] = (0,)


class Parent(NamedTuple):
    """An inner node: 64 bytes on the wire.

    Attributes:
        start: its first chunk.
        size: bytes of data under it.
        left_chunks: chunks of these under its left child.
        is_root: whether its CV is the blob's hash.
        has_left: whether anything under its left child follows; ``has_right`` likewise.
        slot: its place in the pre-order list of nodes above the groups; None for a node within a group.
    """

    start: int
    size: int
    left_chunks: int
    is_root: bool
    has_left: bool
    has_right: bool
    slot: int | None


class Leaf(NamedTuple):
    """A run of data bytes under one node: a chunk group, or a part of one if only that is asked for."""

    start: int
    size: int
    is_root: bool


Item: TypeAlias = Parent | Leaf


def walk(size: int, ranges: ChunkRanges) -> Generator[Item, bool | None, None]:
    """The items of the response for ``ranges`` of a blob of ``size`` bytes, lazily: memory for the tree's depth.

    Sending True in answer to a parent leaves out all that is under it.
    """
    # Entries: first chunk, bytes, is root, boundaries within, pre-order slot.
    stack: list[tuple[int, int, bool, tuple[int, ...], int]] = [(0, size, True, ranges.truncated(size).boundaries, 0)]
    while stack:
        start, size, is_root, boundaries, slot = stack.pop()
        if not boundaries:
            continue
        chunks = chunk_count(size)
        if chunks == 1 or (chunks <= GROUP_CHUNKS and boundaries == _WHOLE):
            yield Leaf(start, size, is_root)
            continue
        # The largest power of two below `chunks` lies on the left.
        middle = 1 << (chunks - 1).bit_length() - 1
        if boundaries == _WHOLE:
            left = right = _WHOLE
        else:
            left, right = _split(boundaries, start, start + middle)
        above_groups = chunks > GROUP_CHUNKS
        if (yield Parent(start, size, middle, is_root, bool(left), bool(right), slot if above_groups else None)):
            continue
        stack.append((start + middle, size - middle * CHUNK_LEN, False, right, slot + middle // GROUP_CHUNKS))
        stack.append((start, middle * CHUNK_LEN, False, left, slot + 1))


def _split(boundaries: tuple[int, ...], start: int, middle: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The boundaries that matter left and right of chunk ``middle`` in a node that begins at ``start``.

    A side that is selected throughout becomes ``(0,)``, so that it can be sent in whole groups.
    """
    i = bisect_left(boundaries, middle)
    left = boundaries[:i]
    if i % 2 == 0:
        right = boundaries[i:]
    elif i < len(boundaries) and boundaries[i] == middle:
        right = boundaries[i + 1 :]
    else:
        # A span runs across the middle: the right side begins selected.
        right = boundaries[i - 1 :]
    if len(left) == 1 and left[0] <= start:
        left = _WHOLE
    if len(right) == 1 and right[0] <= middle:
        right = _WHOLE
    return left, right
