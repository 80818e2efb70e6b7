"""Psyche's lookahead in one pass over the memory: the weights kept aside, and shifted."""

from __future__ import annotations

from .caching import compiled
from .memory import peek, poke
from .vectors import FLOAT, LANES, Builder, Lanes, Value, for_each, intrinsic, routine

__all__ = ["shift"]


def _shift(b: Builder, param: Value, delta: Value, kept: Value, count: Value, rate: Value) -> None:
    v = Lanes(b, FLOAT, LANES)

    def vector(at: Value) -> None:
        weight = v.load(param, at)
        v.store(weight, kept, at)
        v.store(b.fsub(weight, v.signed(v.load(delta, at), rate)), param, at)

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
