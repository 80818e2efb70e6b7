"""Psyche's order of training data: the ChaCha8 generator and the shuffles of Rust's ``rand`` 0.9.

PsycheFoundation/psyche, ``shared/data-provider/src/{local,http}.rs``: ``Shuffle::Seeded(seed)`` shuffles the list of
all sequences with ``ChaCha8Rng::from_seed(seed)`` and ``SliceRandom::shuffle``. Everybody who serves or reads the same
data must come to the same order.
"""

from __future__ import annotations

from collections.abc import MutableSequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigurationError

__all__ = ["ChaCha8", "slice_shuffle"]

SEED_SIZE: Final = 32
_ROUNDS: Final = 8
_WORDS: Final = 16
_BLOCKS_AT_ONCE: Final = 256
_CONSTANTS: Final = np.frombuffer(b"expand 32-byte k", dtype="<u4").astype(np.uint32)
_U32: Final = 1 << 32

# The words that one half-round mixes: four columns, then four diagonals (RFC 8439, section 2.3).
_COLUMNS: Final = ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15])
_DIAGONALS: Final = ([0, 1, 2, 3], [5, 6, 7, 4], [10, 11, 8, 9], [15, 12, 13, 14])

MAX_ITEMS: Final = _U32 - 1
"""From here on ``rand`` draws 64-bit indices, which no list of ours reaches."""


class ChaCha8:
    """The key stream of ChaCha with 8 rounds as 32-bit numbers; block counter of 64 bits from 0, stream 0.

    Args:
        seed: the key, 32 bytes.
    """

    def __init__(self, seed: bytes) -> None:
        if len(seed) != SEED_SIZE:
            raise ConfigurationError(f"seed must have {SEED_SIZE} bytes, got {len(seed)}", name="seed", value=seed)
        self._key = np.frombuffer(seed, dtype="<u4").astype(np.uint32)
        self._counter = 0
        self._words: list[int] = []
        self._next = 0

    def next_u32(self) -> int:
        """The next number, 0 to 2**32 - 1."""
        if self._next == len(self._words):
            self._words = self._blocks().tolist()
            self._next = 0
        self._next += 1
        return self._words[self._next - 1]

    def below(self, bound: int) -> int:
        """A number below ``bound``, drawn as ``rand`` 0.9 does (Canon's method, with its bias)."""
        high, low = divmod(self.next_u32() * bound, _U32)
        if low > _U32 - bound and low + (self.next_u32() * bound >> 32) >= _U32:
            high += 1
        return high

    def _blocks(self) -> NDArray[np.uint32]:
        """``(blocks * 16,)``: the next blocks, all at once."""
        counters = np.arange(self._counter, self._counter + _BLOCKS_AT_ONCE, dtype=np.uint64)
        self._counter += _BLOCKS_AT_ONCE
        start = np.zeros((_WORDS, _BLOCKS_AT_ONCE), dtype=np.uint32)
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


def slice_shuffle(items: MutableSequence[Any], generator: ChaCha8) -> None:
    """Shuffles in place as ``SliceRandom::shuffle`` of ``rand`` 0.9: forward, several indices out of one draw.

    Raises:
        ConfigurationError: 2**32 - 1 items or more.
    """
    if len(items) >= MAX_ITEMS:
        raise ConfigurationError(f"items must be fewer than {MAX_ITEMS}, got {len(items)}", name="items")
    if len(items) <= 1:
        return
    chunk, left = 0, 1
    for index in range(len(items)):
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
