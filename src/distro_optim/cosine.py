"""Cosines from integers: equal bits on every machine, which the cosine of a C library does not promise.

The last bit of ``math.cos`` differs between libraries (glibc, macOS, Windows). Here angles and powers are integers in
units of ``2**-_PRECISION``, so nothing is rounded otherwise anywhere.
"""

from __future__ import annotations

from functools import cache
from typing import Final

__all__ = ["cosine", "rounded_cosine"]

_PRECISION: Final = 256
"""Bits behind the point. Errors stay below 2**-240: far below what could turn a rounding to 53 bits, or to the 12 of a
basis, whose values for sides up to 256 lie at least 6e-6 from where the rounding turns."""


def cosine(angle: float) -> float:
    """The cosine of ``angle``, in radians and finite, rounded once: the double that is nearest to it."""
    numerator, denominator = angle.as_integer_ratio()
    return _cosine((numerator << _PRECISION) // denominator) / (1 << _PRECISION)


def rounded_cosine(numerator: int, denominator: int, bits: int) -> int:
    """``2**bits * cos(pi * numerator / denominator)``, rounded to the nearest integer.

    Args:
        numerator, denominator: of the angle in units of pi; the denominator is positive.
        bits: at most 64.
    """
    value = _cosine(_pi() * (numerator % (2 * denominator)) // denominator)
    half = 1 << (_PRECISION - bits - 1)
    return (value + half) >> (_PRECISION - bits)


def _cosine(angle: int) -> int:
    """In and out in units of ``2**-_PRECISION``: the Taylor series, for an angle brought to a quarter of a turn."""
    angle %= 2 * _pi()
    if angle > _pi():
        angle = 2 * _pi() - angle
    negative = 2 * angle > _pi()
    if negative:
        angle = _pi() - angle
    square = angle * angle >> _PRECISION
    term = total = 1 << _PRECISION
    order = 0
    while term:
        order += 2
        term = -((abs(term) * square >> _PRECISION) // (order * (order - 1))) * (1 if term > 0 else -1)
        total += term
    return -total if negative else total


@cache
def _pi() -> int:
    """Machin's formula, ``16 atan(1/5) - 4 atan(1/239)``."""
    return (16 * _arc_tangent(5) - 4 * _arc_tangent(239)) >> _GUARD


_GUARD: Final = 32
"""Further bits of the series for pi, whose many terms are each rounded."""


def _arc_tangent(inverse: int) -> int:
    """``atan(1 / inverse)`` in units of ``2**-(_PRECISION + _GUARD)``."""
    power = total = (1 << (_PRECISION + _GUARD)) // inverse
    order, sign = 1, 1
    while power:
        power //= inverse * inverse
        order, sign = order + 2, -sign
        total += sign * (power // order)
    return total
