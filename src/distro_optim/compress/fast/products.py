"""The transform along sides of a tile other than 64, by products with a basis: arguments as in :mod:`.encoding`."""

from __future__ import annotations

from collections.abc import Callable

from .encoding import SCALE, SIDE, store_columns, store_largest, store_rows, within
from .vectors import FLOAT, INT32, INT64, LANES, LINE, Builder, Lanes, Value, constant, for_each, intrinsic, routine

__all__ = ["encode_some_columns", "encode_some_rows", "encode_some_rows_onto"]


def _dense(
    b: Builder,
    source: Value,
    stride: Value,
    basis: Value,
    size: Value,
    width: Value,
    folded: Value,
    following: Value,
    begin: Callable[[Value], None],
    store: Callable[..., None],
) -> None:
    """Columns of any length by a product with the basis, in which symmetry leaves half of the terms.

    ``store(v, block, column, frequency)`` gets blocks of ``LANES`` rows, as the fast transform gives, and
    ``begin(column)`` is called before those of a column.
    """
    v = Lanes(b, FLOAT, LANES)
    half = b.lshr(b.add(size, constant(1)), constant(1))

    def group(start: Value) -> None:
        column = within(b, start, width)
        begin(column)

        def fold(j: Value) -> None:
            mirrored = b.sub(b.sub(size, constant(1)), j)
            x = v.load(source, b.add(b.mul(j, stride), column))
            y = v.load(source, b.add(b.mul(mirrored, stride), column))
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
            after_terms = []
            for f, phi in enumerate(sums):
                factor = v.splat(b.load(b.gep(basis, [b.add(row, constant(f))])))
                after_terms.append(v.add(phi, v.mul(factor, odd if f % 2 else even)))
            after = b.add(j, constant(1))
            j.add_incoming(after, loop)
            for phi, value in zip(sums, after_terms, strict=True):
                phi.add_incoming(v.all(0.0), before)
                phi.add_incoming(value, loop)
            end = b.function.append_basic_block("summed")
            b.cbranch(b.icmp_signed("<", after, half), loop, end)
            b.position_at_end(end)
            ahead = b.add(b.mul(start, size), b.mul(frequency, constant(LANES)))
            for line in range(LANES * LANES // LINE):
                v.prefetch(following, b.add(ahead, constant(line * LINE)))
            store(v, v.transpose(after_terms), column, frequency)

        for_each(b, size, frequencies, step=LANES)

    for_each(b, width, group, step=LANES)


def _dense_columns(
    b: Builder,
    source: Value,
    stride: Value,
    basis: Value,
    size: Value,
    width: Value,
    folded: Value,
    target: Value,
    following: Value,
) -> None:
    def store(v: Lanes, block: list[Value], column: Value, frequency: Value) -> None:
        store_columns(b, v, block, target, column, frequency)

    _dense(b, source, stride, basis, size, width, folded, following, lambda column: None, store)


def _dense_rows(
    b: Builder,
    source: Value,
    basis: Value,
    size: Value,
    height: Value,
    folded: Value,
    target: Value,
    largest: Value,
    following: Value,
    rate: Value,
    keep: Value | None = None,
    old: Value | None = None,
) -> None:
    v, ints = Lanes(b, FLOAT, LANES), Lanes(b, INT32, LANES)
    factors = v.mul(v.splat(rate), v.all(SCALE)), None if keep is None else v.splat(keep)

    def begin(first: Value) -> None:
        store_largest(b, [ints.all(0)] * LANES, largest, first)

    def store(v: Lanes, block: list[Value], first: Value, frequency: Value) -> None:
        numbers = [b.add(first, constant(lane)) for lane in range(LANES)]
        most = [ints.load(largest, b.mul(row, constant(LANES))) for row in numbers]
        rows = [b.gep(target, [b.mul(row, constant(SIDE))]) for row in numbers]
        inside = v.below(b.sub(size, frequency))

        def before(lane: int) -> Value:
            return v.load_some(old, b.add(b.mul(numbers[lane], size), frequency), inside)

        store_largest(b, store_rows(v, block, rows, frequency, factors, before, most), largest, first)

    _dense(b, source, constant(SIDE), basis, size, height, folded, following, begin, store)


@intrinsic
def encode_some_columns(typing, source, stride, basis, size, width, folded, target, following):  # type: ignore[no-untyped-def]
    """:func:`~distro_optim.compress.fast.encoding.encode_columns` of ``size`` rows.

    ``basis``, ``(32, 64)`` float32, row = position, column = frequency: eight times the orthonormal one, which is
    what the fast transform computes; half of that in the middle of an odd ``size``. ``folded``: ``(64, LANES)``.
    """
    given = (source, stride, basis, size, width, folded, target, following)
    return routine("encode_some_columns", "FiFiiFFF", _dense_columns, given)


@intrinsic
def encode_some_rows(typing, source, basis, size, height, folded, target, largest, following, rate):  # type: ignore[no-untyped-def]
    """:func:`~distro_optim.compress.fast.encoding.encode_rows` of ``size`` columns; ``height >= LANES``."""
    given = (source, basis, size, height, folded, target, largest, following, rate)
    return routine("encode_some_rows", "FFiiFFIFf", _dense_rows, given)


@intrinsic
def encode_some_rows_onto(typing, source, basis, size, height, folded, target, largest, following, rate, keep, old):  # type: ignore[no-untyped-def]
    """As :func:`encode_some_rows`, with ``target = keep * old + rate * coefficients``; ``old``: ``(height, size)``."""
    given = (source, basis, size, height, folded, target, largest, following, rate, keep, old)
    return routine("encode_some_rows_onto", "FFiiFFIFffF", _dense_rows, given)
