"""The other way: a few coefficients of one tile to its 64 x 64 elements.

``X[i, j] = sum of q B[i, a] B[j, b]`` over the coefficients ``q`` at frequencies ``(a, b)``: first the sums over ``b``,
one row of numbers for each ``a`` that occurs; then the sums over ``a``. ``B[h - 1 - i, a] = (-1)^a B[i, a]``, so
rows of even and of odd ``a`` are summed apart, for the upper half of a tile only: the lower half is their difference.

In float32, or in float64 for integers: sums of integers below 2^53 are exact in any order, fused or not.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import types

from .caching import compiled
from .encoding import SIDE
from .vectors import DOUBLE, FLOAT, INT64, LANES, LINE, Builder, Lanes, Value, constant, for_each, intrinsic, routine

__all__ = ["FILLED", "PITCH", "decode", "decode_and_look"]

PITCH: Final = SIDE + LINE
"""From row to row of a basis and of the sums: at 64, what lies below each other would share few sets of a cache."""

_BITS: Final = 20
"""Of an inverse, by which positions are divided."""

FILLED: Final = 2 + LANES // 2
"""Numbers that say what rows there are, see :func:`decode`."""

_HALF: Final = SIDE // 2
_ROWS: Final = 2
"""Rows of the result, and :data:`_VECTORS` vectors of each, that are summed at a time: 8 sums hide the latency of
an addition, and 16, for even and odd frequencies, fit in the registers."""
_VECTORS: Final = 4


def _lanes(b: Builder, scalar: Any) -> Lanes:
    return Lanes(b, scalar, LANES if scalar == FLOAT else LANES // 2)


def _quotient(b: Builder, at: Value, inverse: Value) -> Value:
    """``at // width`` of a position in a tile, below 4096: by the width's :func:`_inverse`, faster than by division."""
    return b.lshr(b.mul(at, inverse), constant(_BITS))


def _inverse(b: Builder, width: Value) -> Value:
    return b.add(b.udiv(constant(1 << _BITS), width), constant(1))


def _begin_rows(scalar: Any) -> Any:
    def build(
        b: Builder,
        position: Value,
        count: Value,
        width: Value,
        basis: Value,
        rows: Value,
        frequency: Value,
        filled: Value,
    ) -> None:
        v, inverse = _lanes(b, scalar), _inverse(b, width)
        ints = Lanes(b, INT64, LANES // 2)
        lengths = b.bitcast(b.alloca(ir.ArrayType(INT64, SIDE)), INT64.as_pointer())
        for a in range(0, SIDE, ints.count):
            ints.store(ints.all(0), lengths, constant(a))
        before, loop, end = b.block, b.function.append_basic_block("terms"), b.function.append_basic_block("named")
        b.branch(loop)
        b.position_at_end(loop)
        t, earlier = b.phi(INT64), b.phi(INT64)
        a = _quotient(b, b.zext(b.load(b.gep(position, [t])), INT64), inverse)
        named, after = b.or_(earlier, b.shl(constant(1), a)), b.add(t, constant(1))
        b.store(b.add(b.load(b.gep(lengths, [a])), constant(1)), b.gep(lengths, [a]))
        for phi, x in ((t, after), (earlier, named)):
            phi.add_incoming(constant(0), before)
            phi.add_incoming(x, loop)
        b.cbranch(b.icmp_signed("<", after, count), loop, end)
        b.position_at_end(end)
        longest = ints.load(lengths, constant(0))
        for a in range(ints.count, SIDE, ints.count):
            longest = ints.larger(ints.load(lengths, constant(a)), longest)
        ints.store(longest, filled, constant(2))
        for parity in range(2):
            start = constant(parity * _HALF)
            place = start
            # Without branches: which frequencies occur, no processor could guess.
            for a in range(parity, SIDE, 2):
                b.store(constant(a), b.gep(frequency, [place]))
                place = b.add(place, b.and_(b.lshr(named, constant(a)), constant(1)))
            number = b.sub(place, start)
            b.store(number, b.gep(filled, [constant(parity)]))

            def clear(s: Value, start: Value = start) -> None:
                row = b.mul(b.load(b.gep(frequency, [b.add(start, s)])), constant(PITCH))
                for group in range(0, SIDE, v.count):
                    v.store(v.all(0.0), rows, b.add(row, constant(group)))

            for_each(b, number, clear)

    return build


def _add_terms(scalar: Any, given: Any) -> Any:
    def build(b: Builder, position: Value, value: Value, count: Value, width: Value, basis: Value, rows: Value) -> None:
        v, inverse = _lanes(b, scalar), _inverse(b, width)

        def term(t: Value) -> None:
            at = b.zext(b.load(b.gep(position, [t])), INT64)
            a = _quotient(b, at, inverse)
            row, column = b.mul(a, constant(PITCH)), b.mul(b.sub(at, b.mul(a, width)), constant(PITCH))
            factor = b.load(b.gep(value, [t]))
            factor = v.splat(factor if given == scalar else b.fptrunc(factor, scalar))
            for group in range(0, SIDE, v.count):
                here = b.add(row, constant(group))
                product = v.mul(v.load(basis, b.add(column, constant(group))), factor)
                v.store(v.add(v.load(rows, here), product), rows, here)

        for_each(b, count, term)

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
        width: Value | None = None,
        least: Value | None = None,
    ) -> None:
        v = _lanes(b, scalar)
        half = b.lshr(b.add(height, constant(1)), constant(1))
        span = _VECTORS * v.count
        within = [] if width is None else [v.below(b.sub(width, constant(g * v.count))) for g in range(_VECTORS)]
        lines = _ROWS * 2 * span // LINE  # of the tile, filled by one turn of the inner loop

        def columns(column: Value) -> None:
            def few_rows(i: Value) -> None:
                even = _sums(b, v, rows, frequency, constant(0), evens, basis, column, i)
                # Between sums, so that the memory works while the vectors do.
                ahead = b.add(b.mul(column, constant(SIDE)), b.mul(i, constant(2 * span)))
                for line in range(lines):
                    Lanes(b, FLOAT, LANES).prefetch(following, b.add(ahead, constant(line * LINE)))
                odd = _sums(b, v, rows, frequency, constant(_HALF), b.add(odds, constant(_HALF)), basis, column, i)
                magnitudes: list[list[Value]] = [[] for _ in range(_VECTORS)]
                for r in range(_ROWS):
                    upper = b.add(i, constant(r))
                    lower = b.sub(b.sub(height, constant(1)), upper)
                    for row, combine in ((upper, v.add), (lower, v.sub)):
                        start = b.add(b.mul(row, constant(SIDE)), column)
                        for g in range(_VECTORS):
                            x = combine(even[r * _VECTORS + g], odd[r * _VECTORS + g])
                            _store_float(b, v, x, out, b.add(start, constant(g * v.count)))
                            if least is not None:
                                magnitudes[g].append(v.magnitude(x))
                if least is not None:
                    known = v.load(least, constant(0))
                    least_of = [
                        b.select(w, reduce(v.smaller, m), known) for w, m in zip(within, magnitudes, strict=True)
                    ]
                    v.store(v.smaller(reduce(v.smaller, least_of), known), least, constant(0))

            for_each(b, half, few_rows, step=_ROWS)

        if span == SIDE:
            columns(constant(0))
        else:
            for_each(b, SIDE, columns, step=span)

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
    above = b.mul(b.load(b.gep(frequency, [slot])), constant(PITCH))
    row = b.add(above, column)
    terms = [v.load(rows, b.add(row, constant(g * v.count))) for g in range(_VECTORS)]
    at = b.add(above, i)
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
def _begin_the_rows(typing, position, count, width, basis, rows, frequency, filled):  # type: ignore[no-untyped-def]
    """``rows[a] = 0`` for all ``a`` that occur; even ones are listed in ``frequency`` from 0 on, odd ones from 32 on.

    ``filled`` gets the number of both, and numbers of which the largest is that of the terms of the longest row.
    """
    p, n, scalar = _scalar_of(basis)
    given = (position, count, width, basis, rows, frequency, filled)
    return routine(f"begin_rows_{n}", f"Iii{p}{p}LL", _begin_rows(scalar), given)


@intrinsic
def _add_the_terms(typing, position, value, count, width, basis, rows):  # type: ignore[no-untyped-def]
    """``rows[a] += value[t] * basis[b]`` over the terms ``t`` at ``(a, b)``."""
    q, m, kind = _scalar_of(value)
    p, n, scalar = _scalar_of(basis)
    given = (position, value, count, width, basis, rows)
    return routine(f"add_terms_{n}_{m}", f"I{q}ii{p}{p}", _add_terms(scalar, kind), given)


@intrinsic
def _sum_the_rows(typing, rows, frequency, evens, odds, basis, height, out, following):  # type: ignore[no-untyped-def]
    """``out[i] = sum of basis[a, i] * rows[a]`` over the frequencies ``a`` that are listed."""
    p, n, scalar = _scalar_of(basis)
    given = (rows, frequency, evens, odds, basis, height, out, following)
    return routine(f"sum_rows_{n}", f"{p}Lii{p}iFF", _sum_rows(scalar), given)


@intrinsic
def _sum_the_rows_and_look(typing, rows, frequency, evens, odds, basis, height, out, following, width, least):  # type: ignore[no-untyped-def]
    """:func:`_sum_the_rows`, and ``least[i % LANES]`` is the smallest magnitude in these columns, or what it was."""
    given = (rows, frequency, evens, odds, basis, height, out, following, width, least)
    return routine("sum_rows_and_look", "FLiiFiFFiF", _sum_rows(FLOAT), given)


@compiled
def decode(position, value, count, height, width, down, along, rows, frequency, filled, out, following):  # type: ignore[no-untyped-def]
    """Writes the tile of ``value[:count]`` at ``position[:count]`` to ``out``, ``(64, 64)`` float32.

    ``value`` and the bases are float32; or float64 that hold integers: then ``out`` has the sign of the exact sum, and
    is 0 where it is 0.

    Args:
        position: int32, below ``height * width``; what occurs twice counts twice.
        value: one-dimensional.
        count: of both, 1 at the least.
        height, width: of the tile, from 2 to 64: so many rows of ``out`` are filled, and to the right of them 0.
        down, along: bases of these lengths, ``(64, PITCH)``, row = frequency, column = position, 0 elsewhere.
        rows: address of ``(64, PITCH)`` of the type of the bases, overwritten.
        frequency: ``(64,)`` int64, overwritten.
        filled: ``(FILLED,)`` int64, overwritten: how many even frequencies occur, how many odd ones, and how many terms
            the longest row has: the largest of the other numbers.
        out: address.
        following: address of 16 KiB that are asked for meanwhile, since they will be needed.
    """
    _begin_the_rows(position, count, width, along, rows, frequency, filled)
    _add_the_terms(position, value, count, width, along, rows)
    _sum_the_rows(rows, frequency, filled[0], filled[1], down, height, out, following)


@compiled
def decode_and_look(  # type: ignore[no-untyped-def]
    position, value, count, height, width, down, along, rows, frequency, filled, out, following, least
):
    """:func:`decode` of float64 by float32 bases; the smallest magnitude in the tile.

    Args:
        least: ``(LANES,)`` float32, overwritten.
    """
    least[:] = np.float32(np.inf)
    _begin_the_rows(position, count, width, along, rows, frequency, filled)
    _add_the_terms(position, value, count, width, along, rows)
    _sum_the_rows_and_look(rows, frequency, filled[0], filled[1], down, height, out, following, width, least)
    smallest = least[0]
    for lane in range(1, LANES):
        smallest = min(smallest, least[lane])
    return smallest
