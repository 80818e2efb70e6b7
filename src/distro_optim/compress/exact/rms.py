"""Steps of a fixed size, ``gain * lr * X / rms(X)``: the factor of ``X``, from the squares of the coefficients.

The inverse DCT is orthonormal but for its scale, so the mean square of a tensor's ``X`` is known from its integer
coefficients ``q`` alone (Parseval's identity)::

    rms(X)**2 = 2**e * (sum of q**2) / tiles,      e = exponent_of(h, w)

which here *is* its definition: the basis is rounded to integers, and a sum over ``X`` itself would be another number by
some millionths, and could not be exact. The sum of squares is an integer; what follows is one quotient, one root and
one more quotient, of doubles, each correctly rounded, as IEEE 754 says and Python does everywhere.

Then each weight takes one product and one difference: ``p - float32(factor) * float32(X)``.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from .definition import BASIS_BITS, VALUE_BITS

__all__ = ["MAX_SQUARES", "exponent_of", "factor_of"]

MAX_SQUARES: Final = 1 << (63 - 2 * VALUE_BITS - 1)
"""Coefficients of a tensor that are not zero: the sum of their squares, at most ``2**24`` each, fits into int64."""

_SMALLEST: Final = 2.0**-102
"""Below it a factor counts as 0. ``X`` is an integer, so that no product and no difference is ever below the normal
numbers of float32, which some devices take for 0."""


def exponent_of(h: int, w: int) -> int:
    """``e`` of tiles of ``h`` x ``w``: ``B_n`` is orthonormal but for ``2**12 * sqrt(n / 2)``, and ``B_1`` is 2**12."""
    sides = (h, w) if h > 1 else (w,)
    return sum(2 * BASIS_BITS - (side > 1) for side in sides)


def factor_of(squares: int, tiles: int, exponent: int, lr: float, *, double: bool) -> float:
    """What the integers ``X`` of a tensor are multiplied with, a float32 number, or a float64 one if ``double``.

    Args:
        squares: the sum of ``q**2`` over the tensor.
        tiles: how many it has.
        exponent: of :func:`exponent_of`.
        lr: the learning rate with its gain.
        double: the weights are float64.
    """
    if squares <= 0:
        return 0.0
    root = math.sqrt((squares << exponent % 2) / tiles)  # Python divides integers of any size with one rounding
    factor = math.ldexp(lr / root, -(exponent // 2))
    if not double:
        factor = float(np.float32(factor))
    return factor if abs(factor) >= _SMALLEST else 0.0
