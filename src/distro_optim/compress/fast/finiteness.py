"""Is a gradient finite, and are its squares? One pass at the speed of the memory."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from .caching import compiled
from .memory import peek
from .vectors import FLOAT, INT64, LANES, Builder, Lanes, Value, constant, intrinsic, routine

__all__ = ["squares"]

_SUMS: Final = 8
"""Vectors that are summed apart: as many additions are on their way at a time."""

_PARTS: Final = 2
"""That are read side by side: a processor's own foresight ends with each page of memory."""

_AHEAD: Final = 1024
"""Elements: what lies so far ahead is asked for, a page of memory or more."""

_STEP: Final = _SUMS * LANES


def _squares(b: Builder, source: Value, count: Value, out: Value) -> None:
    v = Lanes(b, FLOAT, LANES)
    length = b.udiv(count, constant(_PARTS))
    before, loop, end = b.block, b.function.append_basic_block("loop"), b.function.append_basic_block("end")
    b.branch(loop)
    b.position_at_end(loop)
    at = b.phi(INT64)
    at.add_incoming(constant(0), before)
    sums: list[Any] = [b.phi(v.type) for _ in range(_SUMS)]
    following = []
    for number, phi in enumerate(sums):
        part, place = divmod(number, _SUMS // _PARTS)
        offset = b.add(b.add(at, b.mul(length, constant(part))), constant(place * LANES))
        x = v.load(source, offset)
        v.prefetch(source, b.add(offset, constant(_AHEAD)))
        following.append(v.add(phi, v.mul(x, x)))
        phi.add_incoming(v.all(0.0), before)
        phi.add_incoming(following[-1], loop)
    after = b.add(at, constant(_STEP // _PARTS))
    at.add_incoming(after, loop)
    b.cbranch(b.icmp_signed("<", after, length), loop, end)
    b.position_at_end(end)
    while len(following) > 1:
        following = [v.add(x, y) for x, y in zip(following[::2], following[1::2], strict=True)]
    v.store(following[0], out, constant(0))


@intrinsic
def _sum_squares(typing, source, count, out):  # type: ignore[no-untyped-def]
    """``out[:LANES]``: sums whose sum is that of the squares of ``count``, a multiple of ``_STEP`` above 0."""
    return routine("squares", "FiF", _squares, (source, count, out))


@compiled
def squares(source, count):  # type: ignore[no-untyped-def]
    """The sum of the squares of ``count`` float32 at the address ``source``, as float32."""
    total = np.float32(0)
    in_steps = count // _STEP * _STEP
    if in_steps > 0:
        lanes = np.empty(LANES, np.float32)
        _sum_squares(source, in_steps, lanes)
        for lane in range(LANES):
            total += lanes[lane]
    for at in range(in_steps, count):
        x = peek(source, at)
        total += x * x
    return total
