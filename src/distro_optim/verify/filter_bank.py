"""The filters of all witnesses of a round, asked together.

A round asks each filter about each result. One by one that is a few calls of numpy for every pair, most of what a round
with many peers costs; here it is one pass for all pairs. :meth:`~.bloom.BloomFilter.contains_many` is the plain twin.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from .bloom import WORD_BITS, Bytes, hash_items, in_blocks

__all__ = ["FilterBank"]

MAX_REMEMBERED: Final = 1 << 14
"""Answers that are kept, for so many items. A round has at most 256 clients and 32 announcements of each."""


class FilterBank:
    """Filters of equal shapes.

    Args:
        filters: each as ``(keys, words)``, as :class:`~.bloom.BloomFilter` takes them.
    """

    def __init__(self, filters: Iterable[tuple[Sequence[int], Sequence[int]]]) -> None:
        pairs = list(filters)
        self._keys = np.array([keys for keys, _ in pairs], dtype=np.uint64)  # (filters, keys)
        self._words = np.array([words for _, words in pairs], dtype=np.uint64)  # (filters, words)
        self._known: dict[bytes, NDArray[np.bool_]] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def ask(self, items: Sequence[Bytes]) -> NDArray[np.bool_]:
        """``(filters, items) bool``: may the item have been added to the filter? Answers are remembered."""
        wanted = [bytes(item) for item in items]
        new = list(dict.fromkeys(item for item in wanted if item not in self._known))
        if len(self._known) + len(new) > MAX_REMEMBERED:
            self._known.clear()
            new = list(dict.fromkeys(wanted))
        if new:
            self._known.update(zip(new, self._look(new).T, strict=True))
        if not wanted:
            return np.zeros((len(self), 0), dtype=np.bool_)
        return np.stack([self._known[item] for item in wanted], axis=1)

    def count(self, items: Sequence[Bytes]) -> list[int]:
        """How many of the filters may contain each item."""
        counts: list[int] = self.ask(items).sum(axis=0).tolist()
        return counts

    def _look(self, items: list[bytes]) -> NDArray[np.bool_]:
        found = np.zeros((len(self), len(items)), dtype=np.bool_)
        if not len(self):
            return found
        filters, keys = self._keys.shape
        num_bits = np.uint64(WORD_BITS * self._words.shape[1])
        of_filter = np.arange(filters)[None, :, None]
        for block, places in in_blocks(items, filters * keys):
            positions = (hash_items(block, self._keys.ravel()) % num_bits).reshape(len(block), filters, keys)
            bits = self._words[of_filter, (positions // np.uint64(WORD_BITS)).astype(np.intp)]
            bits >>= positions % np.uint64(WORD_BITS)
            found[:, places] = (bits & np.uint64(1)).all(axis=2).T
        return found
