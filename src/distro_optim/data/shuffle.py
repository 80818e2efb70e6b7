"""Psyche's order of training data: the ChaCha8 generator and the shuffles of Rust's ``rand`` 0.9. No I/O.

PsycheFoundation/psyche, ``shared/data-provider/src/{local,http}.rs``: ``Shuffle::Seeded(seed)`` shuffles the list of
all sequences with ``ChaCha8Rng::from_seed(seed)`` and ``SliceRandom::shuffle``; a mixture (``weighted/mod.rs``) goes
through its list from the end. Everybody who serves or reads the same data must come to the same order.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, MutableSequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigurationError

__all__ = ["ChaCha8", "index_shuffle", "permutation", "slice_shuffle"]

SEED_SIZE: Final = 32
_ROUNDS: Final = 8
_WORDS: Final = 16
_FIRST_BLOCKS: Final = 64
_BLOCKS_AT_ONCE: Final = 4096
_CONSTANTS: Final = np.frombuffer(b"expand 32-byte k", dtype="<u4").astype(np.uint32)
_U32: Final = 1 << 32
_LOW: Final = _U32 - 1

# The words that one half-round mixes: four columns, then four diagonals (RFC 8439, section 2.3).
_COLUMNS: Final = ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15])
_DIAGONALS: Final = ([0, 1, 2, 3], [5, 6, 7, 4], [10, 11, 8, 9], [15, 12, 13, 14])

MAX_ITEMS: Final = _U32 - 1
"""From here on ``rand`` draws 64-bit indices, which none of our lists reaches."""

_ALONE_FROM: Final = 1 << 16
"""From so many choices on, no two fit into one draw of 32 bits."""


class ChaCha8:
    """The key stream of ChaCha with 8 rounds as 32-bit numbers; block counter of 64 bits from 0, stream 0.

    Args:
        seed: the key, 32 bytes.

    Attributes:
        words: the numbers, 0 to 2**32 - 1, without end; a number that is taken is gone for all that share them.
    """

    def __init__(self, seed: bytes) -> None:
        if len(seed) != SEED_SIZE:
            raise ConfigurationError(f"seed must have {SEED_SIZE} bytes, got {len(seed)}", name="seed", value=seed)
        self._key = np.frombuffer(seed, dtype="<u4").astype(np.uint32)
        self._counter = 0
        self.words = self._stream()

    def next_u32(self) -> int:
        """The next number, 0 to 2**32 - 1."""
        return next(self.words)

    def below(self, bound: int) -> int:
        """A number below ``bound``, drawn as ``rand`` 0.9 does (Canon's method, with its bias)."""
        high, low = divmod(self.next_u32() * bound, _U32)
        if low > _U32 - bound and low + (self.next_u32() * bound >> 32) >= _U32:
            high += 1
        return high

    def _stream(self) -> Iterator[int]:
        # Few at first: most lists are short, and a block is made at no lesser cost than a hundred.
        blocks = _FIRST_BLOCKS
        while True:
            yield from self._blocks(blocks).tolist()
            blocks = min(2 * blocks, _BLOCKS_AT_ONCE)

    def _blocks(self, count: int) -> NDArray[np.uint32]:
        """``(blocks * 16,)``: the next blocks, all at once."""
        counters = np.arange(self._counter, self._counter + count, dtype=np.uint64)
        self._counter += count
        start = np.zeros((_WORDS, count), dtype=np.uint32)
        start[0:4] = _CONSTANTS[:, None]
        start[4:12] = self._key[:, None]
        start[12] = (counters & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        start[13] = (counters >> np.uint64(32)).astype(np.uint32)
        state = start.copy()
        for _ in range(_ROUNDS // 2):
            for a, b, c, d in (_COLUMNS, _DIAGONALS):
                for first, second, rotation in ((a, b, 16), (c, d, 12), (a, b, 8), (c, d, 7)):
                    # a += b, d = rotate(d ^ a); then c += d, b = rotate(b ^ c); and so once more.
                    mixed = d if first is a else b
                    state[first] += state[second]
                    turned = state[mixed] ^ state[first]
                    state[mixed] = (turned << np.uint32(rotation)) | (turned >> np.uint32(32 - rotation))
        return (state + start).T.ravel()


def permutation(count: int, generator: ChaCha8) -> NDArray[np.uint32]:
    """``(count,) uint32``: where :func:`slice_shuffle` puts what, at four bytes an item.

    Raises:
        ConfigurationError: see :func:`slice_shuffle`.
    """
    _check_length(count)
    order = array("I", np.arange(count, dtype=np.uint32).tobytes())
    slice_shuffle(order, generator)
    return np.frombuffer(order, dtype=np.uint32)


def slice_shuffle(items: MutableSequence[Any], generator: ChaCha8) -> None:
    """Shuffles in place as ``SliceRandom::shuffle`` of ``rand`` 0.9: forward, several indices out of one draw.

    Raises:
        ConfigurationError: 2**32 - 1 items or more.
    """
    count = len(items)
    _check_length(count)
    if count <= 1:
        return
    chunk, left = 0, 1
    index = 0
    while index < count and (left or index < _ALONE_FROM):
        choices = index + 1
        if left == 0:
            product, following = choices, choices + 1
            while product * following < _U32:
                product *= following
                following += 1
            chunk = generator.below(product)
            left = following - choices - 1
        else:
            left -= 1
        if left == 0:
            other = chunk
        else:
            chunk, other = divmod(chunk, choices)
        items[index], items[other] = items[other], items[index]
        index += 1
    # What remains of a long list needs none of the above: one draw, one index. This is ChaCha8.below, written out,
    # since a call for each of a hundred million items is most of the time.
    word = generator.words.__next__
    for last in range(index, count):
        choices = last + 1
        product = word() * choices
        other = product >> 32
        low = product & _LOW
        if low > _U32 - choices and low + (word() * choices >> 32) >= _U32:
            other += 1
        items[last], items[other] = items[other], items[last]


def index_shuffle(lists: list[MutableSequence[Any]], generator: ChaCha8) -> None:
    """Shuffles lists of one length alike, in place: from the end, one draw an index, as mixtures are.

    Raises:
        ConfigurationError: see :func:`slice_shuffle`.
    """
    count = len(lists[0])
    _check_length(count)
    for index in range(count - 1, 0, -1):
        other = generator.below(index + 1)
        for items in lists:
            items[index], items[other] = items[other], items[index]


def _check_length(count: int) -> None:
    if count >= MAX_ITEMS:
        raise ConfigurationError(
            f"items must be fewer than {MAX_ITEMS} to be shuffled, got {count}", name="items", value=count
        )
