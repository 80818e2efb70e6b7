"""The transform of one tile, 64 x 64 float32: split-radix DCT-II, a column in each lane of a vector.

The recursion is that of G. Plonka and M. Tasche, "Fast and numerically stable algorithms for discrete cosine
transforms", Linear Algebra and its Applications 394 (2005): a DCT-II splits into a DCT-II and a DCT-IV of half the
length, a DCT-IV into two DCT-II after plane rotations. It takes a seventh of the operations of a product with the
basis, and its error grows with the logarithm of the length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

from llvmlite import ir

from .vectors import FLOAT, INT32, INT64, LANES, LINE, Builder, Lanes, Value, constant, for_each, intrinsic, routine

__all__ = [
    "SIDE",
    "encode_columns",
    "encode_rows",
    "encode_rows_onto",
    "encode_some_columns",
    "encode_some_rows",
]

SIDE: Final = 64
"""Of a tile."""

SCALE: Final = 1.0 / SIDE
"""Both passes together give coefficients that are this much too large."""


class _Split:
    """The two recursions, on lists of vectors."""

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes

    def dct2(self, x: list[Value]) -> list[Value]:
        """DCT-II times ``sqrt(n)``."""
        n, half, v = len(x), len(x) // 2, self.lanes
        if n == 1:
            return x
        if n == 2:
            return [v.add(x[0], x[1]), v.sub(x[0], x[1])]
        even = self.dct2([v.add(x[j], x[n - 1 - j]) for j in range(half)])
        odd = self.dct4([v.sub(x[j], x[n - 1 - j]) for j in range(half)])
        return [y for pair in zip(even, odd, strict=True) for y in pair]

    def dct4(self, x: list[Value]) -> list[Value]:
        """DCT-IV times ``sqrt(2 n)``."""
        n = len(x)
        pairs = [self.rotated(n, j, x[j], x[n - 1 - j]) for j in range(n // 2)]
        s, d = (self.dct2(list(half)) for half in zip(*pairs, strict=True))
        return [self.joined(n, m, s.__getitem__, d.__getitem__) for m in range(n)]

    def rotated(self, n: int, j: int, a: Value, b: Value) -> tuple[Value, Value]:
        """What a DCT-IV of length ``n`` makes of ``x[j]`` and ``x[n - 1 - j]``, for its two DCT-II."""
        v, angle = self.lanes, math.pi * (2 * j + 1) / (4 * n)
        cos, sin = v.all(math.cos(angle)), v.all(math.sin(angle))
        total = v.add(v.mul(a, cos), v.mul(b, sin))
        return total, v.sub(v.mul(a, sin), v.mul(b, cos)) if j % 2 else v.sub(v.mul(b, cos), v.mul(a, sin))

    def joined(self, n: int, m: int, s: Callable[[int], Value], d: Callable[[int], Value]) -> Value:
        """Number ``m`` of a DCT-IV of length ``n``, by what its two DCT-II have given: ``s(k)`` and ``d(k)``."""
        v, half, root = self.lanes, n // 2, math.sqrt(2)
        if m == 0:
            return v.mul(s(0), v.all(root))
        if m == n - 1:
            return v.mul(d(0), v.all(-root))
        k = (m + 1) // 2
        return v.sub(s(k), d(half - k)) if m % 2 else v.add(s(k), d(half - k))


def _transformed(
    b: Builder, source: Value, stride: Value, column: Value, buffer: Value, store: Callable[..., None]
) -> None:
    """The transform of ``LANES`` columns of a tile.

    ``store(v, block, number)`` gets blocks of ``LANES`` rows of the transposed result, one after the other.

    A column has twice as many numbers as there are registers. So it goes through ``buffer`` twice, on purpose: left to
    a compiler, most numbers would go through memory more often. The order of loads decides which of two products LLVM
    fuses with their sum, and so the last bit of a result.
    """
    v = Lanes(b, FLOAT, LANES)
    split, quarter, half = _Split(v), SIDE // 4, SIDE // 2

    def kept(number: int) -> Value:
        return v.load(buffer, constant(LANES * number))

    def keep(x: Value, number: int) -> None:
        v.store(x, buffer, constant(LANES * number))

    for j in range(quarter):
        rows = (half - 1 - j, half + j, j, SIDE - 1 - j)
        upper, lower, first, last = (v.load(source, b.add(b.mul(stride, constant(row)), column)) for row in rows)
        outer, inner = v.add(first, last), v.add(upper, lower)
        keep(v.add(outer, inner), j)
        keep(v.sub(outer, inner), quarter + j)
        pair = split.rotated(half, j, v.sub(first, last), v.sub(upper, lower))
        keep(pair[0], 2 * quarter + j)
        keep(pair[1], 3 * quarter + j)
    for part, transform in enumerate((split.dct2, split.dct4, split.dct2, split.dct2)):
        v.settle(buffer)
        given = [kept(part * quarter + j) for j in reversed(range(quarter))]
        for j, x in enumerate(transform(given[::-1])):
            keep(x, part * quarter + j)

    def sums(k: int) -> Value:
        return kept(2 * quarter + k)

    def differences(k: int) -> Value:
        return kept(3 * quarter + k)

    def result(frequency: int) -> Value:
        if frequency % 2:
            return split.joined(half, frequency // 2, sums, differences)
        return kept(frequency // 4 + frequency % 4 // 2 * quarter)

    for number in range(SIDE // LANES):
        v.settle(buffer)
        store(v, v.transpose([result(number * LANES + lane) for lane in range(LANES)]), number)


def _buffer(b: Builder) -> Value:
    """Room for a group of columns, on the stack."""
    room = b.alloca(ir.ArrayType(FLOAT, SIDE * LANES))
    room.align = 4 * LINE
    return b.bitcast(room, FLOAT.as_pointer())


def _columns(b: Builder, source: Value, stride: Value, target: Value, following: Value) -> None:
    buffer = _buffer(b)

    def group(column: Value) -> None:
        def store(v: Lanes, block: list[Value], number: int) -> None:
            _store_columns(b, v, block, target, column, constant(number * LANES))
            _prefetch(b, v, following, number, column)

        _transformed(b, source, stride, column, buffer, store)

    for_each(b, SIDE, group, step=LANES)


def _prefetch(b: Builder, v: Lanes, following: Value, block: int, column: Value) -> None:
    """Asks for a part of the 16 KiB at ``following``, one after the other with the blocks and columns of a tile.

    Between stores, so that the memory works while the vectors do; and in the order of the addresses, which the
    memory's own foresight knows.
    """
    start = b.mul(column, constant(SIDE))
    for number in range(LANES * LANES // LINE):
        v.prefetch(following, b.add(start, constant(block * LANES * LANES + number * LINE)))


def _store_columns(b: Builder, v: Lanes, block: list[Value], target: Value, column: Value, frequency: Value) -> None:
    for lane, row in enumerate(block):
        v.store(row, target, b.add(b.mul(b.add(column, constant(lane)), constant(SIDE)), frequency))


def _rows(
    b: Builder,
    source: Value,
    target: Value,
    largest: Value,
    following: Value,
    rate: Value,
    keep: Value | None = None,
) -> None:
    buffer = _buffer(b)

    def group(first: Value) -> None:
        most: list[Any] = [None] * LANES

        def store(v: Lanes, block: list[Value], number: int) -> None:
            factors = v.mul(v.splat(rate), v.all(SCALE)), None if keep is None else v.splat(keep)
            most[:] = _store_rows(b, v, block, target, first, constant(number * LANES), factors, most)
            _prefetch(b, v, following, number, first)

        _transformed(b, source, constant(SIDE), first, buffer, store)
        _store_largest(b, most, largest, first)

    for_each(b, SIDE, group, step=LANES)


def _store_rows(
    b: Builder,
    v: Lanes,
    block: list[Value],
    target: Value,
    first: Value,
    frequency: Value,
    factors: tuple[Value, Value | None],
    most: list[Any],
) -> list[Any]:
    """Puts the transform of some rows into the coefficients; the largest of ``most`` and of their magnitudes."""
    largest = []
    for lane, row in enumerate(block):
        at = b.add(b.mul(b.add(first, constant(lane)), constant(SIDE)), frequency)
        y = v.mul(row, factors[0])
        if factors[1] is not None:
            y = v.add(v.mul(v.load(target, at), factors[1]), y)
        v.store(y, target, at)
        bits = v.magnitude_bits(y)
        largest.append(bits if most[lane] is None else v.larger(bits, most[lane]))
    return largest


def _store_largest(b: Builder, most: list[Value], largest: Value, first: Value) -> None:
    ints = Lanes(b, INT32, LANES)
    for lane, bits in enumerate(most):
        ints.store(bits, largest, b.mul(b.add(first, constant(lane)), constant(LANES)))


def _dense(
    b: Builder, source: Value, basis: Value, size: Value, width: Value, folded: Value, store: Callable[..., None]
) -> None:
    """Columns of any length by a product with the basis, in which symmetry leaves half of the terms.

    ``store(v, block, column, frequency)`` gets blocks of ``LANES`` rows, as from :func:`_transformed`.
    """
    v = Lanes(b, FLOAT, LANES)
    half = b.lshr(b.add(size, constant(1)), constant(1))

    def group(column: Value) -> None:
        def fold(j: Value) -> None:
            mirrored = b.sub(b.sub(size, constant(1)), j)
            x = v.load(source, b.add(b.mul(j, constant(SIDE)), column))
            y = v.load(source, b.add(b.mul(mirrored, constant(SIDE)), column))
            at = b.mul(j, constant(2 * LANES))
            v.store(v.add(x, y), folded, at)
            v.store(v.sub(x, y), folded, b.add(at, constant(LANES)))

        for_each(b, half, fold)

        def frequencies(frequency: Value) -> None:
            before, loop = b.block, b.function.append_basic_block("terms")
            b.branch(loop)
            b.position_at_end(loop)
            j = b.phi(INT64)
            j.add_incoming(constant(0), before)
            sums = [b.phi(v.type) for _ in range(LANES)]
            at = b.mul(j, constant(2 * LANES))
            even, odd = v.load(folded, at), v.load(folded, b.add(at, constant(LANES)))
            row = b.add(b.mul(j, constant(SIDE)), frequency)
            following = []
            for f, phi in enumerate(sums):
                factor = v.splat(b.load(b.gep(basis, [b.add(row, constant(f))])))
                following.append(v.add(phi, v.mul(factor, odd if f % 2 else even)))
            after = b.add(j, constant(1))
            j.add_incoming(after, loop)
            for phi, value in zip(sums, following, strict=True):
                phi.add_incoming(v.all(0.0), before)
                phi.add_incoming(value, loop)
            end = b.function.append_basic_block("summed")
            b.cbranch(b.icmp_signed("<", after, half), loop, end)
            b.position_at_end(end)
            store(v, v.transpose(following), column, frequency)

        for_each(b, size, frequencies, step=LANES)

    for_each(b, width, group, step=LANES)


def _dense_columns(
    b: Builder, source: Value, basis: Value, size: Value, width: Value, folded: Value, target: Value
) -> None:
    def store(v: Lanes, block: list[Value], column: Value, frequency: Value) -> None:
        _store_columns(b, v, block, target, column, frequency)

    _dense(b, source, basis, size, width, folded, store)


def _dense_rows(
    b: Builder,
    source: Value,
    basis: Value,
    size: Value,
    width: Value,
    folded: Value,
    target: Value,
    largest: Value,
    rate: Value,
    keep: Value,
) -> None:
    v = Lanes(b, FLOAT, LANES)
    factors = v.mul(v.splat(rate), v.all(SCALE)), v.splat(keep)
    ints = Lanes(b, INT32, LANES)

    def store(v: Lanes, block: list[Value], first: Value, frequency: Value) -> None:
        before = [ints.load(largest, b.mul(b.add(first, constant(lane)), constant(LANES))) for lane in range(LANES)]
        _store_largest(b, _store_rows(b, v, block, target, first, frequency, factors, before), largest, first)

    _dense(b, source, basis, size, width, folded, store)


@intrinsic
def encode_columns(typing, source, stride, target, following):  # type: ignore[no-untyped-def]
    """``target = (transform of the columns of source)^T``; both ``(64, 64) float32``, ``target`` contiguous.

    The rows of ``source`` are ``stride`` elements apart. The 16 KiB at the address ``following`` are asked for
    meanwhile, since they will be needed.
    """
    return routine("encode_columns", "FiFF", _columns, (source, stride, target, following))


@intrinsic
def encode_rows(typing, source, target, largest, following, rate):  # type: ignore[no-untyped-def]
    """The other half, on what :func:`encode_columns` gave: ``target = rate * coefficients``, ``(64, 64) float32``.

    ``largest``, ``(64, LANES) int32``, gets the bits of the largest magnitude of each row, in as many groups.
    """
    return routine("encode_rows", "FFIFf", _rows, (source, target, largest, following, rate))


@intrinsic
def encode_rows_onto(typing, source, target, largest, following, rate, keep):  # type: ignore[no-untyped-def]
    """As :func:`encode_rows`, with ``target = keep * target + rate * coefficients``."""
    return routine("encode_rows_onto", "FFIFff", _rows, (source, target, largest, following, rate, keep))


@intrinsic
def encode_some_columns(typing, source, basis, size, width, folded, target):  # type: ignore[no-untyped-def]
    """:func:`encode_columns` for the first ``width`` columns, of ``size`` rows, the rest of ``source`` being 0.

    ``basis``, ``(32, 64)`` float32, row = position, column = frequency: eight times the orthonormal one, which is
    what the fast transform computes; half of that in the middle of an odd ``size``. ``folded``: ``(64, LANES)``.
    """
    given = (source, basis, size, width, folded, target)
    return routine("encode_some_columns", "FFiiFF", _dense_columns, given)


@intrinsic
def encode_some_rows(typing, source, basis, size, width, folded, target, largest, rate, keep):  # type: ignore[no-untyped-def]
    """:func:`encode_rows_onto` for the first ``width`` rows, of ``size`` columns; ``largest`` holds 0 before."""
    given = (source, basis, size, width, folded, target, largest, rate, keep)
    return routine("encode_some_rows", "FFiiFFIff", _dense_rows, given)
