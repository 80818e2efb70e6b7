"""Psyche's lookahead in one pass over the memory: the weights kept aside, and shifted."""

from __future__ import annotations

from .caching import compiled
from .memory import peek, poke
from .vectors import FLOAT, LANES, Builder, Lanes, Value, for_each, intrinsic, routine

__all__ = ["shift"]


def _shift(b: Builder, param: Value, delta: Value, kept: Value, count: Value, rate: Value) -> None:
    v = Lanes(b, FLOAT, LANES)
    up, down, zero = v.splat(rate), v.splat(b.fneg(rate)), v.all(0.0)

    def vector(at: Value) -> None:
        weight, x = v.load(param, at), v.load(delta, at)
        v.store(weight, kept, at)
        below = b.select(b.fcmp_ordered("<", x, zero), down, zero)
        v.store(b.fsub(weight, b.select(b.fcmp_ordered(">", x, zero), up, below)), param, at)

    for_each(b, count, vector, step=LANES)


@intrinsic
def _shift_vectors(typing, param, delta, kept, count, rate):  # type: ignore[no-untyped-def]
    return routine("shift", "FFFif", _shift, (param, delta, kept, count, rate))


@compiled
def shift(param, delta, kept, count, rate):  # type: ignore[no-untyped-def]
    """``kept = param``, then ``param -= rate * sign(delta)``: addresses of ``count`` float32 each; ``rate`` float32."""
    in_vectors = count & -LANES
    _shift_vectors(param, delta, kept, in_vectors, rate)
    for at in range(in_vectors, count):
        weight = peek(param, at)
        x = peek(delta, at)
        poke(kept, at, weight)
        if x > 0:
            weight -= rate
        elif x < 0:
            weight += rate
        poke(param, at, weight)
