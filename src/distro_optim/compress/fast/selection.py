"""The largest coefficients of one tile, in the order of the bits of their magnitudes."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import types

from .caching import compiled
from .encoding import SIDE
from .memory import peek_int
from .vectors import (
    FLOAT,
    INT32,
    INT64,
    LANES,
    Builder,
    Lanes,
    Value,
    constant,
    intrinsic,
    make_array,
    routine,
    signature,
)

__all__ = ["CANDIDATES", "GROUPS", "lowest", "select"]

GROUPS: Final = 256
"""Most groups whose maxima bound the choice; as many coefficients at most can be chosen."""

CANDIDATES: Final = SIDE * SIDE
"""Coefficients that may reach the bound: all, in a tile of zeros."""

_FEW: Final = 64
"""Groups for :data:`_FEW_CHOSEN` coefficients: with few groups the bound is found faster and is less tight."""

_FEW_CHOSEN: Final = 12

_SLACK: Final = 3
"""So many groups more than needed are as good: they cost less than a closer bound."""


def _maxima(count: int) -> Any:
    """Of ``(64, LANES)`` maxima to ``count``, each of a lane of neighbouring rows."""

    def build(b: Builder, largest: Value, groups: Value) -> None:
        v = Lanes(b, INT32, LANES)
        vectors = count // LANES
        for number in range(vectors):
            most = None
            for row in range(number * SIDE // vectors, (number + 1) * SIDE // vectors):
                x = v.load(largest, constant(row * LANES))
                most = x if most is None else v.larger(x, most)
            v.store(most, groups, constant(number * LANES))

    return build


@intrinsic
def _maxima_of_few(typing, largest, groups):  # type: ignore[no-untyped-def]
    return routine("maxima_of_few", "II", _maxima(_FEW), (largest, groups))


@intrinsic
def _maxima_of_many(typing, largest, groups):  # type: ignore[no-untyped-def]
    return routine("maxima_of_many", "II", _maxima(GROUPS), (largest, groups))


def _reaching(context: Any, b: Builder, v: Lanes, bits: Value, bound: Value) -> Value:
    """An int64 with a 1 for each lane of ``bits`` that is at least ``bound``."""
    mask = b.icmp_signed(">=", bits, v.splat(bound))
    return b.zext(b.bitcast(mask, ir.IntType(LANES)), INT64)


@intrinsic
def _row_reaches(typing, largest, row, bound):  # type: ignore[no-untyped-def]
    """Which of the maxima of a row reach the bound, as bits."""

    def generate(context: Any, b: Builder, sig: Any, arguments: Any) -> Any:
        v = Lanes(b, INT32, LANES)
        array = make_array(sig.args[0])(context, b, arguments[0])
        bits = v.load(array.data, b.mul(arguments[1], constant(LANES)))
        return _reaching(context, b, v, bits, arguments[2])

    return signature(types.int64, largest, types.int64, types.int32), generate


@intrinsic
def _reach(typing, coefficients, offset, bound):  # type: ignore[no-untyped-def]
    """Which of the magnitudes of ``coefficients[offset:][:LANES]`` reach the bound, as bits."""

    def generate(context: Any, b: Builder, sig: Any, arguments: Any) -> Any:
        floats = Lanes(b, FLOAT, LANES)
        base = b.inttoptr(arguments[0], FLOAT.as_pointer())
        bits = floats.magnitude_bits(floats.load(base, arguments[1]))
        return _reaching(context, b, Lanes(b, INT32, LANES), bits, arguments[2])

    return signature(types.int64, types.int64, types.int64, types.int32), generate


@intrinsic
def lowest(typing, bits):  # type: ignore[no-untyped-def]
    """The position of the lowest 1; ``bits`` is not 0."""

    def generate(context: Any, b: Builder, sig: Any, arguments: Any) -> Any:
        return b.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return signature(types.int64, types.int64), generate


@compiled
def _bound(numbers, count, k, slack):  # type: ignore[no-untyped-def]
    """A number that ``k`` to ``k + slack`` of ``numbers[:count]`` reach, or more if there are equals at the bound.

    By halving: each count is a loop without branches, where sorting would guess wrong at every second comparison.
    """
    low = numbers[0]
    high = numbers[0]
    for i in range(count):
        low = min(low, numbers[i])
        high = max(high, numbers[i])
    if count <= k + slack:
        return low
    # All reach low, nobody reaches above.
    above = np.int64(high) + 1
    while above - low > 1:
        middle = np.int32(low + (above - low) // 2)
        reaching = np.int32(0)
        for i in range(count):
            reaching += np.int32(numbers[i] >= middle)
        if reaching >= k:
            low = middle
            if reaching <= k + slack:
                break
        else:
            above = np.int64(middle)
    return low


@compiled
def select(coefficients, largest, k, height, width, groups, chosen, bits):  # type: ignore[no-untyped-def]
    """The positions ``64 * row + column`` of the ``k`` coefficients of largest magnitude, to ``chosen[:k]``.

    Of equals the first ones.

    No coefficient outside of the ``k`` groups with the largest maxima can be among them, and no magnitude below the
    smallest of these maxima.

    Args:
        coefficients: address of ``(64, 64)`` float32.
        largest: ``(64, LANES)`` int32, the bits of the largest magnitude in each group of a row.
        k: at most :data:`GROUPS` and ``height * width``.
        height, width: of the tile; what lies beyond is 0 and is not chosen.
        groups: ``(GROUPS,)`` int32, overwritten.
        chosen: ``(CANDIDATES,)`` int32, overwritten.
        bits: ``(CANDIDATES,)`` int32, overwritten.
    """
    count = np.int64(GROUPS)
    if k <= _FEW_CHOSEN:
        count = np.int64(_FEW)
        _maxima_of_few(largest, groups)
    else:
        _maxima_of_many(largest, groups)
    # Nothing that is 0 is looked for, so that tiles of zeros, and the edges of small ones, are passed over.
    bound = max(_bound(groups, count, k, np.int64(_SLACK)), np.int32(1))
    found = np.int64(0)
    for row in range(64):
        if _row_reaches(largest, row, bound) != 0:
            for start in range(64 * row, 64 * row + 64, LANES):
                mask = _reach(coefficients, start, bound)
                while mask != 0:
                    chosen[found] = start + lowest(mask)
                    found += 1
                    mask &= mask - 1
    if found > k:
        for t in range(found):
            bits[t] = peek_int(coefficients, np.int64(chosen[t])) & 0x7FFFFFFF
        bound = _bound(bits, found, k, np.int64(0))
        above = np.int64(0)
        for t in range(found):
            above += np.int64(bits[t] > bound)
        equals = k - above
        kept = np.int64(0)
        for t in range(found):
            if bits[t] > bound or (bits[t] == bound and equals > 0):
                equals -= np.int64(bits[t] == bound)
                chosen[kept] = chosen[t]
                kept += 1
    elif found < k:
        for row in range(height):
            for at in range(64 * row, 64 * row + width):
                if found < k and peek_int(coefficients, at) & 0x7FFFFFFF == 0:
                    chosen[found] = at
                    found += 1
