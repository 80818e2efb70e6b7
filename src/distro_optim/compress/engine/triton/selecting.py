"""The ``K`` largest of a tile, by counting how many bit patterns are not below a bound that is bisected.

Bits of magnitudes are ordered as the magnitudes are. Each count reads what a program holds in registers anyway: about
8 counts find the bound of 8 of 4,096 coefficients, where a sort would move all of them many times.
"""

# mypy: disable-error-code="no-untyped-def,import-untyped,import-not-found"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["largest", "ranks"]


@triton.jit
def ranks(chosen):
    """For ``[BH, BW]`` int32 of 0 and 1: how many ones come before each element, row after row."""
    in_row = tl.sum(chosen, axis=1)
    return (tl.cumsum(in_row, 0) - in_row)[:, None] + tl.cumsum(chosen, 1) - chosen


@triton.jit
def _bound(bits, most, K: tl.constexpr):
    """A bound that at least ``K`` of ``bits`` reach, and how many do: ``K``, unless equal ones lie at the bound."""
    above = most + 1  # nobody reaches it
    step = 1 << 24  # two octaves: the coefficients of a tile that are sent are seldom further apart
    bound = tl.maximum(above - step, 0)
    count = tl.sum((bits >= bound).to(tl.int32))
    while count < K:
        above = bound
        step = step * 2
        bound = tl.where(bound > step, bound - step, 0)
        count = tl.sum((bits >= bound).to(tl.int32))
    while (above - bound > 1) & (count != K):
        middle = bound + (above - bound) // 2
        reach = tl.sum((bits >= middle).to(tl.int32))
        enough = reach >= K
        bound = tl.where(enough, middle, bound)
        count = tl.where(enough, reach, count)
        above = tl.where(enough, above, middle)
    return bound, count


@triton.jit
def largest(x, inside, K: tl.constexpr):
    """Which ``K`` elements are the largest in magnitude; of equals those that come first, row after row.

    Args:
        x: ``[BH, BW]`` float32.
        inside: which elements take part, at least ``K``.
        K: how many.

    Returns:
        ``[BH, BW]``, a mask, and the bits of the largest magnitude.
    """
    bits = tl.minimum(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800000)  # NaN counts as infinity
    bits = tl.where(inside, bits, -1)
    most = tl.max(bits)
    bound, count = _bound(bits, most, K)
    chosen = bits >= bound
    if count != K:
        equal = (bits == bound).to(tl.int32)
        surely = bits > bound
        free = K - tl.sum(surely.to(tl.int32))
        chosen = surely | ((equal != 0) & (ranks(equal) < free))
    return chosen, most
