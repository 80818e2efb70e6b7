"""The Bloom filter in which a witness reports which peers it heard and which results it saw.

Format and rules: PsycheFoundation/psyche, ``shared/core/src/bloom.rs`` (after Solana's ``bloom`` crate). A filter is
eight 64-bit keys and 1024 bits. An item is hashed once per key by 64-bit FNV-1a that starts from the key instead of
FNV's own offset; the hash modulo the number of bits is the position to set or to test.

What it catches: a peer that nobody heard of is absent, but for a probability that grows with the load of the filter
(:meth:`BloomFilter.false_positive_rate`). What it misses: a filter can only say "perhaps", its size never grows, and
the peer that fills it can set every bit. So one filter proves nothing; a quorum of filters counts.

:func:`fnv1a` is the plain form; the filter itself computes all hashes of all items at once with numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from ..errors import ConfigurationError

__all__ = ["BLOOM_KEYS", "BLOOM_WORDS", "WORD_BITS", "BloomFilter", "Bytes", "fnv1a", "hash_items", "in_blocks"]

BLOOM_KEYS: Final = 8
"""Hash functions of a witness's filter (``WitnessBloom = Bloom<16, 8>``)."""

BLOOM_WORDS: Final = 16
"""64-bit words of a witness's filter."""

_FNV_PRIME: Final = 0x100000001B3
_U64: Final = 0xFFFF_FFFF_FFFF_FFFF
WORD_BITS: Final = 64
_BLOCK: Final = 1 << 18
"""Hashes in flight at once: 2**18 of 8 bytes stay in a second-level cache, and the memory for any input is bounded."""

_FEW_HASHES: Final = 2 * BLOOM_KEYS
"""So many are done sooner one by one, without numpy."""

Bytes = bytes | bytearray | memoryview


def fnv1a(item: Bytes, key: int) -> int:
    """64-bit FNV-1a of ``item`` with ``key`` as the starting value."""
    value = key
    for byte in memoryview(item).cast("B"):
        value = ((value ^ byte) * _FNV_PRIME) & _U64
    return value


class BloomFilter:
    """A set that answers "no" or "perhaps".

    Args:
        keys: start values of the hash functions, each below 2**64. All zero, as in an empty report, is legal.
        words: the bits, 64 to a word, least significant first; all zero if left out.

    Raises:
        ConfigurationError: no key, no word, or a value that does not fit in 64 bits.
    """

    __slots__ = ("_keys", "_words")

    def __init__(self, keys: Sequence[int], words: Sequence[int] | None = None) -> None:
        self._keys = _u64_array("keys", keys)
        self._words = _u64_array("words", [0] * BLOOM_WORDS if words is None else words)

    @classmethod
    def from_entropy(cls, entropy: bytes) -> BloomFilter:
        """An empty filter whose keys are the given random bytes, such as ``os.urandom(64)``.

        Fresh keys for every filter keep two witnesses from sharing a false positive.

        Raises:
            ConfigurationError: not 64 bytes.
        """
        if len(entropy) != 8 * BLOOM_KEYS:
            raise ConfigurationError(
                f"entropy must have {8 * BLOOM_KEYS} bytes, got {len(entropy)}", name="entropy", value=len(entropy)
            )
        return cls([int.from_bytes(entropy[i : i + 8], "little") for i in range(0, len(entropy), 8)])

    @property
    def keys(self) -> tuple[int, ...]:
        """Start values of the hash functions, unsigned 64-bit."""
        return tuple(self._keys.tolist())

    @property
    def words(self) -> tuple[int, ...]:
        """The bits, 64 to a word, least significant first."""
        return tuple(self._words.tolist())

    @property
    def num_bits(self) -> int:
        """Size in bits."""
        return WORD_BITS * len(self._words)

    def add(self, item: Bytes) -> None:
        """Adds one item."""
        self.add_many((item,))

    def add_many(self, items: Iterable[Bytes]) -> None:
        """Adds every item; one pass of numpy for all items of one length."""
        for block, _ in in_blocks(items, len(self._keys)):
            positions = (hash_items(block, self._keys) % np.uint64(self.num_bits)).ravel()
            bits = np.uint64(1) << (positions % np.uint64(WORD_BITS))
            np.bitwise_or.at(self._words, (positions // np.uint64(WORD_BITS)).astype(np.intp), bits)

    def __contains__(self, item: Bytes) -> bool:
        return bool(self.contains_many((item,))[0])

    def contains_many(self, items: Sequence[Bytes]) -> NDArray[np.bool_]:
        """``(items,) bool``: may the item have been added?"""
        found = np.zeros(len(items), dtype=np.bool_)
        for block, indices in in_blocks(items, len(self._keys)):
            positions = hash_items(block, self._keys) % np.uint64(self.num_bits)
            found[indices] = _all_set(self._words, positions)
        return found

    def clear(self) -> None:
        """Forgets all items and keeps the keys."""
        self._words[:] = 0

    def copy(self) -> BloomFilter:
        """Another filter with the same keys and bits."""
        return BloomFilter(self.keys, self.words)

    def fill(self) -> float:
        """Share of bits that are set, 0 to 1."""
        return self._bits_set() / self.num_bits if len(self._words) else 0.0

    def false_positive_rate(self) -> float:
        """Probability that an item which was never added is reported as perhaps present."""
        return self.fill() ** len(self._keys)

    @override
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BloomFilter):
            return NotImplemented
        return np.array_equal(self._keys, other._keys) and np.array_equal(self._words, other._words)

    __hash__ = None  # type: ignore[assignment]  # it changes

    def _bits_set(self) -> int:
        return int(np.unpackbits(self._words.view(np.uint8)).sum())  # numpy 1.26 has no bitwise_count

    @override
    def __repr__(self) -> str:
        return f"BloomFilter({len(self._keys)} keys, {self._bits_set()} of {self.num_bits} bits)"


def hash_items(items: NDArray[np.uint8], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """``(items, length) uint8`` and ``(keys,)`` to ``(items, keys)`` hashes. Unsigned numpy arithmetic wraps."""
    if len(items) * len(keys) <= _FEW_HASHES:
        return np.array([[fnv1a(item.data, key) for key in keys.tolist()] for item in items], dtype=np.uint64)
    state = np.broadcast_to(keys, (len(items), len(keys))).copy()
    prime = np.uint64(_FNV_PRIME)
    for column in np.ascontiguousarray(items.T)[:, :, None]:
        state ^= column
        state *= prime
    return state


def _all_set(words: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.bool_]:
    index = (positions // np.uint64(WORD_BITS)).astype(np.intp)
    bits = words[index] >> (positions % np.uint64(WORD_BITS))
    result: NDArray[np.bool_] = np.all(bits & np.uint64(1), axis=1)
    return result


def in_blocks(items: Iterable[Bytes], num_keys: int) -> Iterable[tuple[NDArray[np.uint8], list[int]]]:
    """Items gathered by length into ``(items, length)`` arrays, each with the places they came from."""
    by_length: dict[int, tuple[list[bytes], list[int]]] = {}
    for place, item in enumerate(items):
        data = bytes(item)
        group = by_length.setdefault(len(data), ([], []))
        group[0].append(data)
        group[1].append(place)
    step = max(1, _BLOCK // num_keys)
    for length, (group_items, places) in by_length.items():
        for start in range(0, len(places), step):
            chunk = group_items[start : start + step]
            array = np.frombuffer(b"".join(chunk), dtype=np.uint8).reshape(len(chunk), length)
            yield array, places[start : start + step]


def _u64_array(name: str, values: Sequence[int]) -> NDArray[np.uint64]:
    if not len(values):
        raise ConfigurationError(f"{name} must not be empty", name=name, value=values)
    for value in values:
        if not 0 <= value <= _U64:
            raise ConfigurationError(f"{name} must hold unsigned 64-bit integers, got {value}", name=name, value=value)
    return np.array(values, dtype=np.uint64)
