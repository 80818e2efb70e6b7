"""The other way: a few coefficients of one tile to its 64 x 64 elements.

``X[i, j] = sum of q B[i, a] B[j, b]`` over the coefficients ``q`` at frequencies ``(a, b)``: first the sums over ``b``,
one row of numbers for each ``a`` that occurs; then the sums over ``a``. ``B[h - 1 - i, a] = (-1)^a B[i, a]``, so
rows of even and of odd ``a`` are summed apart, for the upper half of a tile only: the lower half is their difference.

In float32, or in float64 for integers: sums of integers below 2^53 are exact in any order, fused or not.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import types

from .caching import compiled
from .encoding import SIDE
from .vectors import DOUBLE, FLOAT, INT64, LANES, LINE, Builder, Lanes, Value, constant, for_each, intrinsic, routine

__all__ = ["PITCH", "decode"]

PITCH: Final = SIDE + 8
"""From row to row of a basis and of the sums: at 64, what lies below each other would share few sets of a cache."""

_HALF: Final = SIDE // 2
_ROWS: Final = 2
"""Rows of the result, and :data:`_VECTORS` vectors of each, that are summed at a time: 8 sums hide the latency of
an addition, and 16, for even and odd frequencies, fit in the registers."""
_VECTORS: Final = 4


def _lanes(b: Builder, scalar: Any) -> Lanes:
    return Lanes(b, scalar, LANES if scalar == FLOAT else LANES // 2)


def _add_row(scalar: Any) -> Any:
    def build(b: Builder, rows: Value, slot: Value, fresh: Value, basis: Value, at: Value, factor: Value) -> None:
        v = _lanes(b, scalar)
        factor, zero = v.splat(factor), v.all(0.0)
        is_fresh = b.icmp_signed("!=", fresh, constant(0))
        for group in range(0, SIDE, v.count):
            offset = b.add(b.mul(slot, constant(PITCH)), constant(group))
            term = v.mul(v.load(basis, b.add(b.mul(at, constant(PITCH)), constant(group))), factor)
            v.store(v.add(b.select(is_fresh, zero, v.load(rows, offset)), term), rows, offset)

    return build


def _sum_rows(scalar: Any) -> Any:
    def build(
        b: Builder,
        rows: Value,
        frequency: Value,
        evens: Value,
        odds: Value,
        basis: Value,
        height: Value,
        out: Value,
        following: Value,
    ) -> None:
        v = _lanes(b, scalar)
        half = b.lshr(b.add(height, constant(1)), constant(1))
        width = _VECTORS * v.count
        lines = _ROWS * 2 * width // LINE  # of the tile, filled by one turn of the inner loop

        def columns(column: Value) -> None:
            def few_rows(i: Value) -> None:
                even = _sums(b, v, rows, frequency, constant(0), evens, basis, column, i)
                # Between sums, so that the memory works while the vectors do.
                ahead = b.add(b.mul(column, constant(SIDE)), b.mul(i, constant(2 * width)))
                for line in range(lines):
                    Lanes(b, FLOAT, LANES).prefetch(following, b.add(ahead, constant(line * LINE)))
                odd = _sums(b, v, rows, frequency, constant(_HALF), b.add(odds, constant(_HALF)), basis, column, i)
                for r in range(_ROWS):
                    upper = b.add(i, constant(r))
                    lower = b.sub(b.sub(height, constant(1)), upper)
                    for row, combine in ((upper, v.add), (lower, v.sub)):
                        start = b.add(b.mul(row, constant(SIDE)), column)
                        for g in range(_VECTORS):
                            x = combine(even[r * _VECTORS + g], odd[r * _VECTORS + g])
                            _store_float(b, v, x, out, b.add(start, constant(g * v.count)))

            for_each(b, half, few_rows, step=_ROWS)

        if width == SIDE:
            columns(constant(0))
        else:
            for_each(b, SIDE, columns, step=width)

    return build


def _sums(
    b: Builder,
    v: Lanes,
    rows: Value,
    frequency: Value,
    start: Value,
    stop: Value,
    basis: Value,
    column: Value,
    i: Value,
) -> list[Value]:
    """Over the rows ``[start, stop)``, for few rows of the result, in the columns from ``column`` on."""
    function = b.function
    before = b.block
    loop, end = function.append_basic_block("sum"), function.append_basic_block("summed")
    b.cbranch(b.icmp_signed("<", start, stop), loop, end)
    b.position_at_end(loop)
    slot = b.phi(INT64)
    slot.add_incoming(start, before)
    zero = v.all(0.0)
    sums = []
    for _ in range(_ROWS * _VECTORS):
        phi = b.phi(v.type)
        phi.add_incoming(zero, before)
        sums.append(phi)
    row = b.add(b.mul(slot, constant(PITCH)), column)
    terms = [v.load(rows, b.add(row, constant(g * v.count))) for g in range(_VECTORS)]
    at = b.add(b.mul(b.load(b.gep(frequency, [slot])), constant(PITCH)), i)
    following = []
    for r in range(_ROWS):
        factor = v.splat(b.load(b.gep(basis, [b.add(at, constant(r))])))
        following += [v.add(sums[r * _VECTORS + g], v.mul(factor, terms[g])) for g in range(_VECTORS)]
    next_slot = b.add(slot, constant(1))
    slot.add_incoming(next_slot, loop)
    for phi, value in zip(sums, following, strict=True):
        phi.add_incoming(value, loop)
    b.cbranch(b.icmp_signed("<", next_slot, stop), loop, end)
    b.position_at_end(end)
    results = []
    for value in following:
        phi = b.phi(v.type)
        phi.add_incoming(zero, before)
        phi.add_incoming(value, loop)
        results.append(phi)
    return results


def _store_float(b: Builder, v: Lanes, x: Value, out: Value, offset: Value) -> None:
    """As float32, which keeps the sign of an integer, and 0."""
    narrow = Lanes(b, FLOAT, v.count)
    narrow.store(x if v.scalar == FLOAT else b.fptrunc(x, narrow.type), out, offset)


def _scalar_of(array: Any) -> tuple[str, str, Any]:
    """Letters for pointers to and numbers of an array's type, and the type."""
    return ("D", "d", DOUBLE) if array.dtype == types.float64 else ("F", "f", FLOAT)


@intrinsic
def _add_row_to(typing, rows, slot, fresh, basis, at, factor):  # type: ignore[no-untyped-def]
    """``rows[slot] = rows[slot] + factor * basis[at]``, without the first term where ``fresh`` is not 0."""
    p, n, scalar = _scalar_of(basis)
    return routine(f"add_row_{n}", f"{p}ii{p}i{n}", _add_row(scalar), (rows, slot, fresh, basis, at, factor))


@intrinsic
def _sum_the_rows(typing, rows, frequency, evens, odds, basis, height, out, following):  # type: ignore[no-untyped-def]
    """``out[i] = sum of basis[frequency[s], i] * rows[s]`` over the slots ``s`` that are filled."""
    p, n, scalar = _scalar_of(basis)
    given = (rows, frequency, evens, odds, basis, height, out, following)
    return routine(f"sum_rows_{n}", f"{p}Lii{p}iFF", _sum_rows(scalar), given)


@compiled
def decode(position, value, count, height, width, down, along, rows, frequency, slot, out, following):  # type: ignore[no-untyped-def]
    """Writes the tile of ``value[:count]`` at ``position[:count]`` to ``out``, ``(64, 64)`` float32.

    ``value`` and the bases are float32; or float64 that hold integers: then ``out`` has the sign of the exact sum, and
    is 0 where it is 0.

    Args:
        position: int32, below ``height * width``; what occurs twice counts twice.
        value: one-dimensional.
        count: of both.
        height, width: of the tile, from 2 to 64: so many rows of ``out`` are filled, and to the right of them 0.
        down, along: bases of these lengths, ``(64, PITCH)``, row = frequency, column = position, 0 elsewhere.
        rows: address of ``(64, PITCH)`` of the type of the bases, overwritten: rows of even frequencies from 0 on,
            those of odd ones from 32 on.
        frequency: ``(64,)`` int64, overwritten.
        slot: ``(64,)`` int64 of -1, and so again in the end: where the row of a frequency lies.
        out: address.
        following: address of 16 KiB that are asked for meanwhile, since they will be needed.
    """
    evens = 0
    odds = 0
    for t in range(count):
        at = np.int64(position[t])
        if width == 64:
            a = at >> 6
            b = at & 63
        else:
            a = at // width
            b = at - a * width
        s = slot[a]
        fresh = 0
        if s < 0:
            fresh = 1
            if a & 1:
                s = 32 + odds
                odds += 1
            else:
                s = evens
                evens += 1
            slot[a] = s
            frequency[s] = a
        _add_row_to(rows, s, fresh, along, b, value[t])
    for s in range(evens):
        slot[frequency[s]] = -1
    for s in range(32, 32 + odds):
        slot[frequency[s]] = -1
    _sum_the_rows(rows, frequency, evens, odds, down, height, out, following)
