"""The signs of one exact tile by float32: where they are proven, and summed again in integers where they are not.

As in :mod:`distro_optim.compress.exact.filtered`: with ``r`` roundings on the way to an element, float32 is off by at
most ``r / (1 - r u) * u * sum |q| * 2**24``, ``u = 2**-24``, in whatever order it adds, fused or not. Products of ``q``
and the basis are integers up to ``2**24``, so that they are exact. What is left are the additions within a row of
coefficients, a product, the additions of rows, and one of even and odd frequencies.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import types

from .caching import compiled
from .decoding import FILLED, decode, decode_and_look
from .encoding import SIDE
from .memory import poke
from .selection import lowest
from .vectors import FLOAT, INT64, LANES, Lanes, intrinsic, signature

__all__ = ["decode_signs"]

_SLACK: Final = 1.01
"""For ``1 / (1 - r u)``, ``r`` being at most :data:`SIDE` times two, and for the roundings of the bound itself."""

_MORE_ROUNDINGS: Final = 2
"""To spare."""

_FEWEST: Final = 8
_TERMS: Final = 2048
"""Doubtful elements of a tile, and terms to sum again, up to which that costs less than all of it in float64. So the
cost of what an attacker could send is bounded."""


@intrinsic
def _doubtful(typing, tile, offset, bound):  # type: ignore[no-untyped-def]
    """Which of the float32 numbers ``tile[offset:][:LANES]`` are not larger than the bound, as bits."""

    def generate(context: Any, b: Any, sig: Any, arguments: Any) -> Any:
        v = Lanes(b, FLOAT, LANES)
        x = v.load(b.inttoptr(arguments[0], FLOAT.as_pointer()), arguments[1])
        limit = v.splat(arguments[2])
        above = b.fcmp_ordered(">", x, limit)
        below = b.fcmp_ordered("<", x, v.splat(b.fneg(arguments[2])))
        proven = b.zext(b.bitcast(b.or_(above, below), ir.IntType(LANES)), INT64)
        return b.xor(proven, ir.Constant(INT64, (1 << LANES) - 1))

    return signature(types.int64, types.int64, types.int64, types.float32), generate


@compiled
def decode_signs(  # type: ignore[no-untyped-def]
    position,
    value,
    count,
    height,
    width,
    down,
    along,
    fast_down,
    fast_along,
    rows,
    frequency,
    filled,
    out,
    following,
    least,
):
    """Numbers with the signs of the exact tile to ``out``, 0 where it is 0; False where all of it is, and then none.

    Args as in :func:`~distro_optim.compress.fast.decoding.decode`, and:
        value: float64 of integers up to ``2**12``.
        fast_down, fast_along: the bases as float32.
        least: as in :func:`~distro_optim.compress.fast.decoding.decode_and_look`.
    """
    weight = np.int64(0)
    for t in range(count):
        weight += np.int64(abs(value[t]))
    if weight == 0:
        return False
    smallest = decode_and_look(
        position, value, count, height, width, fast_down, fast_along, rows, frequency, filled, out, following, least
    )
    longest = filled[2]
    for n in range(3, FILLED):
        longest = max(longest, filled[n])
    # On the way: additions in a row but the first, a product, additions of rows, and one of even and odd frequencies.
    bound = np.float32((longest + max(filled[0], filled[1]) + _MORE_ROUNDINGS) * weight * _SLACK)
    if smallest > bound:
        return True
    left = _FEWEST + _TERMS // count
    for row in range(height):
        for start in range(SIDE * row, SIDE * row + width, LANES):
            mask = _doubtful(out, start, bound)
            while mask != 0:
                at = start + lowest(mask)
                mask &= mask - 1
                j = at - SIDE * row
                if j >= width:
                    break
                left -= 1
                if left < 0:
                    decode(position, value, count, height, width, down, along, rows, frequency, filled, out, out)
                    return True
                total = 0.0
                for t in range(count):
                    a = position[t] >> 6 if width == 64 else position[t] // width
                    total += value[t] * down[a, row] * along[position[t] - a * width, j]
                poke(out, at, np.float32(total))
    return True
