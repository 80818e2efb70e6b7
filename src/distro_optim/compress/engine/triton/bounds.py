"""Why two words of 32 bits hold every element of ``X``, and which tiles and updates the kernels are for."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from ...exact.definition import SIGN_SCALE, VALUE_BITS, integer_basis

__all__ = ["LONGEST_SIDE", "MAX_TOPK", "largest_high_word", "largest_low_word", "largest_middle"]

LONGEST_SIDE: Final = 64
"""Of a tile: a program holds a whole one in registers."""

MAX_TOPK: Final = 64
"""Coefficients of a tile and contributor."""

_LARGEST_MEAN: Final = max(SIGN_SCALE, 1 << VALUE_BITS)

_DIGIT: Final = 128
"""Magnitude of a digit of base 256 between -128 and 127."""


@lru_cache(maxsize=64)
def _weight(n: int) -> int:
    """The largest sum of magnitudes in a row of the basis."""
    return int(abs(integer_basis(n)).sum(1).max())


def largest_middle(h: int) -> int:
    """Of ``B_h q``, whatever is sent: each of its sums has at most as many terms as a column of the tile."""
    return _LARGEST_MEAN * (_weight(h) if h > 1 else 1)


def largest_low_word(w: int) -> int:
    """Of the sum of the products of digits whose places are below ``2**16``."""
    return w * _DIGIT * _DIGIT * (1 + 2 * 256)


def largest_high_word(h: int, w: int) -> int:
    """Of what is left of ``X`` without the low word, in units of ``2**16``, and what the low word carries into it."""
    return -(-largest_middle(h) * _weight(w) // 2**16) + 2 * -(-largest_low_word(w) // 2**16)
