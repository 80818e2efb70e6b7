"""Checks the beginning of a blob against its outboard with ordinary BLAKE3, at the speed of the native package.

Chaining values cannot be taken from the ``blake3`` package, and in numpy they cost ten times as much. But the hash
of a prefix of whole groups follows from the outboard (:func:`.outboard.merged_prefix_hash`), and an incremental
hasher gives it at any point. Agreement proves every group of the prefix; that is all a getter needs, because what it
has so far is a prefix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from blake3 import blake3

from .outboard import MutableBuffer, merged_prefix_hash
from .tree import GROUP_LEN, HASH_LEN, PAIR_LEN, Buffer, group_count, parent_cv

__all__ = ["SPAN_LEN", "PrefixVerifier", "restored_prefix"]

SPAN_LEN: Final = 64 * GROUP_LEN
"""Bytes between two checks: 1 MiB. At multiples of a high power of two only few CVs have to be merged."""


class PrefixVerifier:
    """The proven beginning of a blob: how long it is, its hash so far, and the proven part of the outboard.

    Args:
        root: the blob's hash.
        size: its size in bytes, as somebody claims.
        outboard: room for its outboard; pairs are entered by the code that proved them.

    Attributes:
        length: bytes proven.
    """

    def __init__(self, root: bytes, size: int, outboard: MutableBuffer) -> None:
        self.root = root
        self.size = size
        self.outboard = outboard
        self.length = 0
        self._hasher = blake3()

    @property
    def is_complete(self) -> bool:
        """Whether the whole blob is proven, and its size with it. (An empty blob has still to be proven empty.)"""
        return self.length == self.size and self._hasher.digest() == self.root

    def can_extend_to(self, length: int) -> bool:
        """Whether a prefix of ``length`` bytes can be compared: all, or two or more whole groups."""
        return length == self.size or (length % GROUP_LEN == 0 and 2 * GROUP_LEN <= length < self.size)

    def extend(self, data: Buffer) -> bool:
        """Appends data that is not proven yet, if it proves right; else leaves everything as it was.

        The new length must satisfy :meth:`can_extend_to`, and the pairs above the data must have been proven.
        """
        hasher, length = self._hasher.copy(), self.length + len(data)
        hasher.update(data)
        if length == self.size:
            expected = self.root
        else:
            expected = merged_prefix_hash(self.outboard, group_count(self.size), length // GROUP_LEN)
        if hasher.digest() != expected:
            return False
        self._hasher, self.length = hasher, length
        return True

    def append_proven(self, piece: Buffer) -> None:
        """Appends data whose CV was compared in some other way."""
        self._hasher.update(piece)
        self.length += len(piece)


def restored_prefix(
    root: bytes, size: int, outboard: MutableBuffer, stored: int, read: Callable[[int, int], Buffer]
) -> PrefixVerifier:
    """Builds on a download that was interrupted, perhaps in mid-write: proves again what is there.

    Args:
        outboard: pairs as stored; nothing is taken on trust.
        stored: bytes of data there.
        read: (offset, length) -> data.

    Returns:
        a verifier whose length is a multiple of 1 MiB, or ``size``.
    """
    verifier = PrefixVerifier(root, size, outboard)
    while verifier.length < size:
        stop = min(verifier.length + SPAN_LEN, size)
        if stop > stored or not _is_bound(root, outboard, group_count(size), group_count(stop)):
            break
        if not verifier.extend(read(verifier.length, stop - verifier.length)):
            break
    return verifier


def _is_bound(root: bytes, outboard: MutableBuffer, groups: int, prefix: int) -> bool:
    """Whether the pairs on the way from the root to the end of ``prefix`` groups hold; the data proves the rest."""
    expected, start, count, index = root, 0, groups, 0
    while count > 1:
        pair = bytes(outboard[index * PAIR_LEN : (index + 1) * PAIR_LEN])
        if parent_cv(pair, is_root=index == 0) != expected:
            return False
        if prefix == start + count:
            break
        left = 1 << (count - 1).bit_length() - 1
        if prefix > start + left:
            expected, start, count, index = pair[HASH_LEN:], start + left, count - left, index + left
        else:
            expected, count, index = pair[:HASH_LEN], left, index + 1
    return True
