"""The hash pairs of all nodes above the chunk groups: what a provider keeps beside a blob's data.

64 bytes for each inner node in pre-order, 0.4 % of the data; the same list that travels, between the groups, in the
response to a request for the whole blob (and the same that iroh-blobs keeps in its ``.obao4`` files).
"""

from __future__ import annotations

from mmap import mmap
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from .tree import (
    GROUP_CHUNKS,
    GROUP_LEN,
    HASH_LEN,
    LANES,
    PAIR_LEN,
    Buffer,
    group_count,
    group_cvs,
    pair_up,
    parent_cv,
    root_hash,
)

__all__ = ["MutableBuffer", "build_outboard", "merged_prefix_hash", "outboard_len", "pair_index", "zeroed_outboard"]

MutableBuffer: TypeAlias = bytearray | mmap


def outboard_len(size: int) -> int:
    """Bytes of the outboard of a blob of ``size`` bytes."""
    return PAIR_LEN * (group_count(size) - 1)


def zeroed_outboard(size: int) -> bytearray:
    """Room for the outboard of a blob of ``size`` bytes, in memory."""
    return bytearray(outboard_len(size))


def build_outboard(data: Buffer) -> tuple[bytes, bytes]:
    """Hashes ``data``.

    Returns:
        the blob's hash (32 bytes) and its outboard.
    """
    groups = group_count(len(data))
    if groups == 1:
        return root_hash(data), b""
    view = memoryview(data)
    step = LANES // GROUP_CHUNKS * GROUP_LEN
    level = np.concatenate([group_cvs(view[at : at + step], at // 1024) for at in range(0, len(view), step)])
    levels = [level]
    while len(level) > 2:
        level = pair_up(level)
        levels.append(level)
    outboard = _in_preorder(levels, groups)
    return parent_cv(outboard[:PAIR_LEN], is_root=True), outboard


def _in_preorder(levels: list[npt.NDArray[np.uint8]], groups: int) -> bytes:
    """Levels of CVs, (n, 32) uint8 each, groups first -> the pairs in pre-order."""
    pairs = np.empty((groups - 1, PAIR_LEN), np.uint8)
    # Entries: first group, groups under the node, pre-order index.
    stack = [(0, groups, 0)]
    while stack:
        start, count, index = stack.pop()
        if count == 1:
            continue
        height = (count - 1).bit_length() - 1
        left = 1 << height
        at = start >> height
        # An odd node moved up unchanged, so the right child stands next to the left one on the left one's level.
        pairs[index, :HASH_LEN] = levels[height][at]
        pairs[index, HASH_LEN:] = levels[height][at + 1]
        stack.append((start + left, count - left, index + left))
        stack.append((start, left, index + 1))
    return pairs.tobytes()


def pair_index(groups: int, start: int, count: int) -> int:
    """Pre-order index of the node over ``count`` groups from group ``start`` in a blob of ``groups`` groups."""
    node_start, node_count, index = 0, groups, 0
    while (node_start, node_count) != (start, count):
        left = 1 << (node_count - 1).bit_length() - 1
        if start >= node_start + left:
            node_start, node_count, index = node_start + left, node_count - left, index + left
        else:
            node_count, index = left, index + 1
    return index


def _node_cv(outboard: Buffer | mmap, groups: int, start: int, count: int) -> bytes:
    """CV of a node that is not the root, taken from its parent's pair."""
    node_start, node_count, index = 0, groups, 0
    while True:
        left = 1 << (node_count - 1).bit_length() - 1
        pair = index * PAIR_LEN
        if start >= node_start + left:
            if (start, count) == (node_start + left, node_count - left):
                return bytes(outboard[pair + HASH_LEN : pair + PAIR_LEN])
            node_start, node_count, index = node_start + left, node_count - left, index + left
        else:
            if (start, count) == (node_start, left):
                return bytes(outboard[pair : pair + HASH_LEN])
            node_count, index = left, index + 1


def merged_prefix_hash(outboard: Buffer | mmap, groups: int, prefix: int) -> bytes:
    """The plain BLAKE3 hash that the first ``prefix`` groups must have, from the outboard alone.

    A prefix of whole groups is itself a tree whose largest subtrees (one for each bit of ``prefix``) are nodes of the
    blob's tree, so their CVs are in the outboard; merging them from the right, the last time as root, gives the hash.
    This lets ordinary BLAKE3, which knows no chaining values, check a blob while it arrives.

    Args:
        prefix: 2 .. ``groups`` - 1. (The hash of one group alone is not determined by its CV.)
    """
    if prefix & (prefix - 1) == 0:
        at = pair_index(groups, 0, prefix) * PAIR_LEN
        return parent_cv(outboard[at : at + PAIR_LEN], is_root=True)
    rest, end = prefix, prefix
    merged = b""
    while rest:
        count = rest & -rest
        rest -= count
        end -= count
        cv = _node_cv(outboard, groups, end, count)
        merged = parent_cv(cv + merged, is_root=rest == 0) if merged else cv
    return merged
