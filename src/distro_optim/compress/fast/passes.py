"""Passes over one tile in a tensor's memory: ``rows`` of 64 float32, ``stride`` elements apart.

Each reads and writes whole rows, as memory likes it, and leaves the tile in a contiguous array for what follows. Tiles
with fewer columns are copied to such an array first, with :func:`fetch_part`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types

from .caching import compiled
from .encoding import SIDE
from .memory import poke
from .vectors import FLOAT, LANES, Builder, Lanes, Value, constant, for_each, intrinsic, routine, signature

__all__ = [
    "accumulate",
    "accumulate_without",
    "clear",
    "clear_beyond",
    "descend",
    "descend_ahead",
    "descend_ahead_streaming",
    "fence",
    "fetch_part",
    "put_back_part",
    "subtract",
]


def _each_vector(b: Builder, stride: Value, rows: Value, body: Callable[[Lanes, Value, Value], None]) -> None:
    """``body(lanes, offset in the tensor, offset in the tile)`` for every vector of the first rows of a tile."""
    v = Lanes(b, FLOAT, LANES)

    def row(i: Value) -> None:
        there, here = b.mul(i, stride), b.mul(i, constant(SIDE))
        for start in range(0, SIDE, LANES):
            body(v, b.add(there, constant(start)), b.add(here, constant(start)))

    for_each(b, rows, row)


def _accumulate(
    b: Builder,
    delta: Value,
    grad: Value,
    stride: Value,
    rows: Value,
    keep: Value,
    rate: Value,
    out: Value,
    without: Value | None = None,
) -> None:
    v = Lanes(b, FLOAT, LANES)
    keeps, rates = v.splat(keep), v.splat(rate)

    def body(v: Lanes, there: Value, here: Value) -> None:
        x = v.load(delta, there)
        if without is not None:
            x = v.sub(x, v.load(without, here))
        x = v.add(v.mul(x, keeps), v.mul(v.load(grad, there), rates))
        v.store(x, delta, there)
        v.store(x, out, here)

    _each_vector(b, stride, rows, body)


def _subtract(b: Builder, delta: Value, stride: Value, rows: Value, tile: Value) -> None:
    def body(v: Lanes, there: Value, here: Value) -> None:
        v.store(v.sub(v.load(delta, there), v.load(tile, here)), delta, there)

    _each_vector(b, stride, rows, body)


def _descend(b: Builder, param: Value, stride: Value, rows: Value, tile: Value, rate: Value) -> None:
    def body(v: Lanes, there: Value, here: Value) -> None:
        v.store(b.fsub(v.load(param, there), v.signed(v.load(tile, here), rate)), param, there)

    _each_vector(b, stride, rows, body)


def _descend_ahead(streams: bool) -> Any:
    def build(
        b: Builder,
        param: Value,
        stride: Value,
        rows: Value,
        tile: Value,
        rate: Value,
        delta: Value,
        shifted: Value,
        ahead: Value,
    ) -> None:
        def body(v: Lanes, there: Value, here: Value) -> None:
            weight = b.fsub(v.load(param, there), v.signed(v.load(tile, here), rate))
            v.store(weight, param, there)
            away = b.fsub(weight, v.signed(v.load(delta, there), ahead))
            (v.stream if streams else v.store)(away, shifted, there)

        _each_vector(b, stride, rows, body)

    return build


def _some_rows(
    b: Builder, source: Value, there: Value, target: Value, here: Value, rows: Value, columns: Value
) -> None:
    v = Lanes(b, FLOAT, LANES)
    last = b.sub(columns, constant(LANES))
    in_vectors = b.select(b.icmp_signed("<", last, constant(0)), constant(0), columns)

    def row(i: Value) -> None:
        start, to = b.mul(i, there), b.mul(i, here)

        def vector(j: Value) -> None:
            # The last one ends with the row: some columns are copied twice.
            column = b.select(b.icmp_signed("<", last, j), last, j)
            v.store(v.load(source, b.add(start, column)), target, b.add(to, column))

        def one(j: Value) -> None:
            b.store(b.load(b.gep(source, [b.add(start, j)])), b.gep(target, [b.add(to, j)]))

        for_each(b, in_vectors, vector, step=LANES)
        for_each(b, b.sub(columns, in_vectors), one)

    for_each(b, rows, row)


def _zeros(b: Builder, tile: Value) -> None:
    v = Lanes(b, FLOAT, LANES)
    for_each(b, SIDE * SIDE, lambda at: v.store(v.all(0.0), tile, at), step=LANES)


@intrinsic
def accumulate(typing, delta, grad, stride, rows, keep, rate, out):  # type: ignore[no-untyped-def]
    """``delta = out = keep * delta + rate * grad``."""
    return routine("accumulate", "FFiiffF", _accumulate, (delta, grad, stride, rows, keep, rate, out))


@intrinsic
def accumulate_without(typing, delta, grad, stride, rows, keep, rate, out, without):  # type: ignore[no-untyped-def]
    """``delta = out = keep * (delta - without) + rate * grad``."""
    return routine("accumulate_without", "FFiiffFF", _accumulate, (delta, grad, stride, rows, keep, rate, out, without))


@intrinsic
def subtract(typing, delta, stride, rows, tile):  # type: ignore[no-untyped-def]
    """``delta -= tile``."""
    return routine("subtract_tile", "FiiF", _subtract, (delta, stride, rows, tile))


@intrinsic
def descend(typing, param, stride, rows, tile, rate):  # type: ignore[no-untyped-def]
    """``param -= rate * sign(tile)``: a difference of two float32, so that there is nothing to fuse."""
    return routine("descend_tile", "FiiFf", _descend, (param, stride, rows, tile, rate))


@intrinsic
def descend_ahead(typing, param, stride, rows, tile, rate, delta, shifted, ahead):  # type: ignore[no-untyped-def]
    """:func:`descend`, then ``shifted = param - ahead * sign(delta)``; both laid out as ``param``."""
    given = (param, stride, rows, tile, rate, delta, shifted, ahead)
    return routine("descend_ahead_tile", "FiiFfFFf", _descend_ahead(False), given)


@intrinsic
def descend_ahead_streaming(typing, param, stride, rows, tile, rate, delta, shifted, ahead):  # type: ignore[no-untyped-def]
    """:func:`descend_ahead` where each row of ``shifted`` begins with a line of the cache, which it passes by.

    Nothing reads what is written there until all of the step is done: by then a large model's is out of the caches.
    """
    given = (param, stride, rows, tile, rate, delta, shifted, ahead)
    return routine("descend_ahead_streaming_tile", "FiiFfFFf", _descend_ahead(True), given)


@intrinsic
def fence(typing):  # type: ignore[no-untyped-def]
    """What was streamed is there for all threads."""

    def generate(context: Any, b: Builder, sig: Any, arguments: Any) -> Any:
        b.fence("seq_cst")
        return context.get_dummy_value()

    return signature(types.void), generate


@intrinsic
def _copy_part(typing, source, there, target, here, rows, columns):  # type: ignore[no-untyped-def]
    """Some rows and columns, in rows ``there`` and ``here`` apart."""
    return routine("copy_part", "FiFiii", _some_rows, (source, there, target, here, rows, columns))


@intrinsic
def clear(typing, tile):  # type: ignore[no-untyped-def]
    """``tile = 0``."""
    return routine("clear_tile", "F", _zeros, (tile,))


@compiled
def fetch_part(source, stride, rows, columns, tile):  # type: ignore[no-untyped-def]
    """The first rows and columns of a tile from a tensor; 0 in the others."""
    clear(tile)
    _copy_part(source, stride, tile, 64, rows, columns)


@compiled
def put_back_part(tile, target, stride, rows, columns):  # type: ignore[no-untyped-def]
    """The other way."""
    _copy_part(tile, 64, target, stride, rows, columns)


@compiled
def clear_beyond(tile, rows, columns):  # type: ignore[no-untyped-def]
    """0 wherever a tile lies beyond these rows and columns."""
    for i in range(64):
        for j in range(columns if i < rows else 0, 64):
            poke(tile, 64 * i + j, np.float32(0))
