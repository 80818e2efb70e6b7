"""``exact-1`` in Python integers: one tile at a time, nothing but lists and whole numbers. All engines equal it.

The bits of floats go in as integers, so that no float is computed with anywhere but in :func:`stepped`, which rounds
as IEEE 754 says.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from .definition import VALUE_BITS, integer_basis, mean_of_signs

__all__ = [
    "coefficients_of_signs",
    "coefficients_of_values",
    "decoded",
    "float_bits",
    "largest_exponent",
    "rms_factor",
    "stepped",
]

Contribution = Sequence[tuple[int, int]]
"""One contributor's part of one tile: a position, and a sign of +1 or -1, or the bits of a float."""


def coefficients_of_signs(contributions: Sequence[Contribution]) -> dict[int, int]:
    """The mean sign at each position that somebody named, times :data:`~.definition.SIGN_SCALE`."""
    sums: dict[int, int] = {}
    counts: dict[int, int] = {}
    for contribution in contributions:
        for position, sign in contribution:
            sums[position] = sums.get(position, 0) + sign
            counts[position] = counts.get(position, 0) + 1
    return {position: mean_of_signs(sums[position], counts[position]) for position in sums}


def largest_exponent(contributions: Sequence[Contribution], *, double: bool = False) -> int:
    """The largest biased exponent of the values."""
    fraction, exponents = (52, 0x7FF) if double else (23, 0xFF)
    return max((bits >> fraction & exponents for c in contributions for _, bits in c), default=0)


def coefficients_of_values(
    contributions: Sequence[Contribution], *, double: bool = False, largest: int | None = None
) -> dict[int, int]:
    """The mean value at each position that somebody named, in units that all contributors of the tile share.

    Args:
        contributions: with the bits of float32 values, or of float64 values where ``double``.
        double: which.
        largest: of the biased exponents that count; None is that of the tile.
    """
    fraction, exponents = (52, 0x7FF) if double else (23, 0xFF)
    longest = 62 if double else 31
    largest = largest_exponent(contributions, double=double) if largest is None else largest
    sums: dict[int, int] = {}
    counts: dict[int, int] = {}
    for contribution in contributions:
        for position, bits in contribution:
            exponent = bits >> fraction & exponents
            mantissa = bits & ((1 << fraction) - 1) | 1 << fraction if exponent else 0  # below the normal numbers: 0
            shift = min(longest, largest - exponent + fraction + 1 - VALUE_BITS)
            magnitude = (mantissa + (1 << (shift - 1))) >> shift
            negative = bits >> (63 if double else 31) & 1
            sums[position] = sums.get(position, 0) + (-magnitude if negative else magnitude)
            counts[position] = counts.get(position, 0) + 1
    means = {}
    for position, total in sums.items():
        magnitude = (2 * abs(total) + counts[position]) // (2 * counts[position])
        means[position] = magnitude if total >= 0 else -magnitude
    return means


def decoded(coefficients: dict[int, int], h: int, w: int, *, transform: bool = True) -> list[list[int]]:
    """``X`` of one tile of ``h`` x ``w``; without ``transform`` the coefficients themselves."""
    tile = [[0] * w for _ in range(h)]
    if not transform:
        for position, q in coefficients.items():
            tile[position // w][position % w] = q
        return tile
    rows, columns = integer_basis(h).tolist(), integer_basis(w).tolist()
    for position, q in coefficients.items():
        a, b = divmod(position, w)
        for i in range(h):
            left = q * (rows[i][a] if h > 1 else 1)
            for j in range(w):
                tile[i][j] += left * columns[j][b]
    return tile


def float_bits(value: float, *, double: bool = False) -> int:
    """The bits of ``value`` as a float32, to which it is rounded, or as a float64."""
    return int.from_bytes(struct.pack("<d" if double else "<f", value), "little")


def stepped(weight: float, x: int, lr: float) -> float:
    """A float32 weight after the step: ``weight - fl32(lr)`` where ``x`` is positive, and so on, rounded once."""
    step = np.float32(lr) * np.float32((x > 0) - (x < 0))
    return float(np.float32(weight) - step) if x else float(np.float32(weight))


def rms_factor(squares: int, tiles: int, h: int, w: int, rate: float, *, double: bool = False) -> float:
    """What a tensor's ``X`` is multiplied with, all roundings written out.

    Args:
        squares: the sum of the squares of its integer coefficients.
        tiles: how many it has, of ``h`` x ``w``.
        rate: of learning, with its gain.
        double: for float64 weights.
    """
    if not squares:
        return 0.0
    # rms(X)**2 = squares * 2**e / tiles; an odd e leaves a factor of 2 under the root.
    e = {(False, False): 24, (False, True): 23, (True, False): 47, (True, True): 46}[h > 1, w > 1]
    mean = float(Fraction(squares << e % 2, tiles))
    root = _rounded_root(mean)
    factor = float(Fraction(rate) / Fraction(root)) / 2.0 ** (e // 2)
    if not double:
        factor = float(np.float32(factor))
    return factor if factor >= 2.0**-102 else 0.0


def _rounded_root(value: float) -> float:
    """The square root, rounded to the nearest double, by whole numbers."""
    numerator, denominator = value.as_integer_ratio()  # of which the denominator is a power of two
    bits = 80 + denominator.bit_length()
    root = math.isqrt((numerator << 2 * bits) // denominator)  # 2**bits times as large, and with 70 bits at the least
    # A root of a double is never half-way between two doubles: one bit more stands for all that was cut off.
    cut_off = root * root * denominator != numerator << 2 * bits
    return float(Fraction(2 * root + cut_off, 2 << bits))
