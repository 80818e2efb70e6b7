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

from .vectors import FLOAT, INT32, LANES, LINE, Builder, Lanes, Value, constant, for_each, intrinsic, routine

__all__ = [
    "SCALE",
    "SIDE",
    "encode_columns",
    "encode_rows",
    "encode_rows_onto",
    "store_columns",
    "store_largest",
    "store_rows",
    "within",
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


def _columns(b: Builder, source: Value, stride: Value, width: Value, target: Value, following: Value) -> None:
    buffer = _buffer(b)

    def group(column: Value) -> None:
        column = within(b, column, width)

        def store(v: Lanes, block: list[Value], number: int) -> None:
            store_columns(b, v, block, target, column, constant(number * LANES))
            _prefetch(b, v, following, number, column)

        _transformed(b, source, stride, column, buffer, store)

    for_each(b, width, group, step=LANES)


def within(b: Builder, start: Value, stop: Value) -> Value:
    """Where ``LANES`` columns begin that end before ``stop``: some are done twice where they are not a multiple."""
    last = b.sub(stop, constant(LANES))
    return b.select(b.icmp_signed("<", last, start), last, start)


def _prefetch(b: Builder, v: Lanes, following: Value, block: int, column: Value) -> None:
    """Asks for a part of the 16 KiB at ``following``, one after the other with the blocks and columns of a tile.

    Between stores, so that the memory works while the vectors do; and in the order of the addresses, which the
    memory's own foresight knows.
    """
    start = b.mul(column, constant(SIDE))
    for number in range(LANES * LANES // LINE):
        v.prefetch(following, b.add(start, constant(block * LANES * LANES + number * LINE)))


def store_columns(b: Builder, v: Lanes, block: list[Value], target: Value, column: Value, frequency: Value) -> None:
    """Puts the transform of some columns into the rows of ``target``, 64 elements each."""
    for lane, row in enumerate(block):
        v.store(row, target, b.add(b.mul(b.add(column, constant(lane)), constant(SIDE)), frequency))


def _rows(
    b: Builder,
    source: Value,
    height: Value,
    target: Value,
    spare: Value,
    largest: Value,
    following: Value,
    rate: Value,
    keep: Value | None = None,
) -> None:
    buffer = _buffer(b)

    def group(first: Value) -> None:
        most: list[Any] = [None] * LANES
        rows = []
        for lane in range(LANES):
            row = b.add(first, constant(lane))
            inside = b.icmp_signed("<", row, height)
            rows.append(b.select(inside, b.gep(target, [b.mul(row, constant(SIDE))]), spare))

        def store(v: Lanes, block: list[Value], number: int) -> None:
            factors = v.mul(v.splat(rate), v.all(SCALE)), None if keep is None else v.splat(keep)
            frequency = constant(number * LANES)

            def before(lane: int) -> Value:
                return v.load(rows[lane], frequency)

            most[:] = store_rows(v, block, rows, frequency, factors, before, most)
            _prefetch(b, v, following, number, first)

        _transformed(b, source, constant(SIDE), first, buffer, store)
        store_largest(b, most, largest, first)

    for_each(b, height, group, step=LANES)


def store_rows(
    v: Lanes,
    block: list[Value],
    rows: list[Value],
    frequency: Value,
    factors: tuple[Value, Value | None],
    before: Callable[[int], Value],
    most: list[Any],
) -> list[Any]:
    """Puts the transform of some rows into the coefficients; the largest of ``most`` and of their magnitudes.

    ``before(lane)`` is what they were.
    """
    largest = []
    for lane, row in enumerate(block):
        y = v.mul(row, factors[0])
        if factors[1] is not None:
            y = v.add(v.mul(before(lane), factors[1]), y)
        v.store(y, rows[lane], frequency)
        bits = v.magnitude_bits(y)
        largest.append(bits if most[lane] is None else v.larger(bits, most[lane]))
    return largest


def store_largest(b: Builder, most: list[Value], largest: Value, first: Value) -> None:
    """Puts what :func:`store_rows` gave of some rows into ``largest``."""
    ints = Lanes(b, INT32, LANES)
    for lane, bits in enumerate(most):
        ints.store(bits, largest, b.mul(b.add(first, constant(lane)), constant(LANES)))


@intrinsic
def encode_columns(typing, source, stride, width, target, following):  # type: ignore[no-untyped-def]
    """``target = (transform of the first columns of source)^T``; both ``(64, 64) float32``, ``target`` contiguous.

    The rows of ``source`` are ``stride`` elements apart; ``width`` is at least ``LANES``. The 16 KiB at the address
    ``following`` are asked for meanwhile, since they will be needed.
    """
    return routine("encode_columns", "FiiFF", _columns, (source, stride, width, target, following))


@intrinsic
def encode_rows(typing, source, height, target, spare, largest, following, rate):  # type: ignore[no-untyped-def]
    """The other half, on what :func:`encode_columns` gave: ``target = rate * coefficients``, ``(height, 64) float32``.

    ``largest``, ``(64, LANES) int32``, gets the bits of the largest magnitude of each row, in as many groups.
    ``spare``, ``(64,) float32``, takes rows beyond ``height``, which must be 0.
    """
    given = (source, height, target, spare, largest, following, rate)
    return routine("encode_rows", "FiFFIFf", _rows, given)


@intrinsic
def encode_rows_onto(typing, source, height, target, spare, largest, following, rate, keep):  # type: ignore[no-untyped-def]
    """As :func:`encode_rows`, with ``target = keep * target + rate * coefficients``; ``spare`` is 0, and stays it."""
    given = (source, height, target, spare, largest, following, rate, keep)
    return routine("encode_rows_onto", "FiFFIFff", _rows, given)
