"""How far apart two results are: three distances and their verdict.

Definitions: PsycheFoundation/psyche, ``shared/core/src/similarity.rs``. All arithmetic is in float32 and in the order
of the elements, so the numbers are the same bits as there; only the work is done by numpy.

Floating-point training does not repeat exactly on other hardware, so a recomputed result is compared with a committed
one by distance and not by equality. Each distance sees something the others do not; see their docstrings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ProtocolError

if TYPE_CHECKING:
    Vector = NDArray[np.float32]

__all__ = ["DistanceThresholds", "hamming_distance", "is_similar", "jaccard_distance", "manhattan_distance"]

_MAX_HASH_BITS: Final = 22
"""4 MiB of flags: a million values occupy a quarter of them, and they still fit in a cache."""

_HASH_MULTIPLIERS: Final = (np.uint32(0x9E3779B1), np.uint32(0x85EBCA6B))
"""Odd multipliers for multiplicative hashing: 2**32 over the golden ratio (Knuth, The Art of Computer Programming,
volume 3, section 6.4), and a constant of MurmurHash3's finaliser for a second, independent opinion."""


@dataclass(frozen=True)
class DistanceThresholds:
    """Largest distances that still count as similar."""

    jaccard: float
    manhattan: float
    hamming: float


def jaccard_distance(a: ArrayLike, b: ArrayLike) -> float:
    """One minus the share of common values, whatever their places: 0 (every value of b occurs in a) to 1.

    Lengths may differ; two empty inputs have distance 0. As in Psyche an element of b counts each time it occurs, and
    the distance is therefore not symmetric. NaN equals nothing.

    Catches: a result made of other values or other indices, in any order. Misses: the right values in wrong places,
    and how wrong a value is: one bit off counts like a sign flipped. On 1-bit values it says next to nothing, because
    there are only two of them.
    """
    x, y = _vector(a), _vector(b)
    common = _count_occurring(y, x)
    union = len(x) + len(y) - common
    if union == 0:
        return 0.0
    return float(np.float32(1.0) - np.float32(common) / np.float32(union))


def manhattan_distance(a: ArrayLike, b: ArrayLike) -> float:
    """Sum of the absolute differences, 0 to infinity, in the unit of the values; NaN if a difference is NaN.

    Catches: values that are off by much, or many that are off by a little. Misses: a few wrong entries among many,
    once the threshold allows for the rounding of all of them; it grows with the length, and so must its threshold.

    Raises:
        ProtocolError: the lengths differ, or are zero.
    """
    x, y = _same_length(a, b)
    with np.errstate(invalid="ignore", over="ignore"):
        differences = np.abs(x - y)
        # cumsum adds strictly in order, as the reference does; sum() would add pairwise and round differently.
        return float(np.cumsum(differences, dtype=np.float32)[-1])


def hamming_distance(a: ArrayLike, b: ArrayLike) -> float:
    """Share of places where the values differ at all, 0 to 1. NaN differs from everything, itself included.

    Catches: wrong indices and flipped signs, place by place, each with the same weight. Misses: the size of a
    difference, so that rounding noise in every value looks like a result of something else.

    Raises:
        ProtocolError: the lengths differ, or are zero.
    """
    x, y = _same_length(a, b)
    return float(np.float32(np.count_nonzero(x != y)) / np.float32(len(x)))


def is_similar(a: ArrayLike, b: ArrayLike, thresholds: DistanceThresholds) -> bool:
    """Whether no distance is above its threshold. Tests Manhattan, Hamming and Jaccard in this order, cheapest first.

    A Manhattan distance of NaN is not similar. (Psyche's comparison lets it pass, so that one NaN would switch the
    test off.)

    Raises:
        ProtocolError: the lengths differ, or are zero.
    """
    return bool(
        manhattan_distance(a, b) <= np.float32(thresholds.manhattan)
        and hamming_distance(a, b) <= np.float32(thresholds.hamming)
        and jaccard_distance(a, b) <= np.float32(thresholds.jaccard)
    )


def _vector(values: ArrayLike) -> Vector:
    return np.asarray(values, dtype=np.float32).ravel()


def _same_length(a: ArrayLike, b: ArrayLike) -> tuple[Vector, Vector]:
    x, y = _vector(a), _vector(b)
    if len(x) != len(y):
        raise ProtocolError(f"results must have the same length, got {len(x)} and {len(y)}")
    if not len(x):
        raise ProtocolError("results must not be empty")
    return x, y


def _count_occurring(needles: Vector, haystack: Vector) -> int:
    """How many needles, each time it occurs, equal some value of the haystack; NaN never does.

    Sorting a million numbers takes most of a tenth of a second, so exact sieves go first: equal values in equal
    places, then, on either side, values whose hash nothing on the other side shares.
    """
    found = 0
    if len(needles) == len(haystack):
        elsewhere = needles != haystack
        found = len(needles) - int(np.count_nonzero(elsewhere))
        needles = needles[elsewhere]
    bits = min(_MAX_HASH_BITS, len(haystack).bit_length() + 1)
    for multiplier in _HASH_MULTIPLIERS:
        if not len(needles) or not len(haystack):
            return found
        haystack_hashes, needle_hashes = _hash(haystack, multiplier, bits), _hash(needles, multiplier, bits)
        haystack = haystack[_flags(needle_hashes, bits)[haystack_hashes]]
        needles = needles[_flags(haystack_hashes, bits)[needle_hashes]]
    if not len(needles) or not len(haystack):
        return found
    # NaN sorts last, where it is found by no number; a needle of NaN finds it and is not equal to it.
    values = np.sort(haystack)
    needles = np.sort(needles)
    places = np.minimum(np.searchsorted(values, needles), len(values) - 1)
    return found + int(np.count_nonzero(values[places] == needles))


def _hash(values: Vector, multiplier: np.uint32, bits: int) -> NDArray[np.intp]:
    # Adding 0.0 turns -0.0 into 0.0: they are equal and so must be their hashes.
    raw = (values + np.float32(0.0)).view(np.uint32)
    return ((raw * multiplier) >> np.uint32(32 - bits)).astype(np.intp)


def _flags(hashes: NDArray[np.intp], bits: int) -> NDArray[np.bool_]:
    flags = np.zeros(1 << bits, dtype=np.bool_)
    flags[hashes] = True
    return flags
