"""The lookahead alone, of any tensors, where no merge comes before it that could do it on the way; and its undoing."""

# mypy: disable-error-code="no-untyped-def,import-untyped,import-not-found"

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import rounded

__all__ = ["put_back_kernel", "shift_kernel"]


@triton.jit
def shift_kernel(
    tensors, runs, rates,
    SIZE: tl.constexpr, PARAM: tl.constexpr, DIRECTION: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """``saved = param``, then ``param -= rate * sign(direction)``.

    Args:
        tensors: ``(n, 4)`` int64: addresses of param, direction and saved, and how many elements each has.
        runs: ``(programs, 2)`` int64: a tensor, and where in it the program begins.
        rates: ``(n,)`` float32.
        SIZE: elements of a program, a power of two.
    """
    run = runs + tl.program_id(0).to(tl.int64) * 2
    tensor, start = tl.load(run), tl.load(run + 1)
    row = tensors + tensor * 4
    at = start + tl.arange(0, SIZE)
    inside = at < tl.load(row + 3)
    param = tl.load(row).to(tl.pointer_type(PARAM)) + at
    direction = tl.load(row + 1).to(tl.pointer_type(DIRECTION)) + at
    saved = tl.load(row + 2).to(tl.pointer_type(PARAM)) + at
    weight = tl.load(param, mask=inside, other=0.0)
    tl.store(saved, weight, mask=inside)
    x = tl.load(direction, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))
    tl.store(param, rounded(weight.to(tl.float32) - tl.load(rates + tensor) * x, PARAM, EMULATE), mask=inside)


@triton.jit
def put_back_kernel(tensors, runs, SIZE: tl.constexpr, PARAM: tl.constexpr):
    """``param = saved``; arguments as for :func:`shift_kernel`."""
    run = runs + tl.program_id(0).to(tl.int64) * 2
    tensor, start = tl.load(run), tl.load(run + 1)
    row = tensors + tensor * 4
    at = start + tl.arange(0, SIZE)
    inside = at < tl.load(row + 3)
    param = tl.load(row).to(tl.pointer_type(PARAM)) + at
    saved = tl.load(row + 2).to(tl.pointer_type(PARAM)) + at
    tl.store(param, tl.load(saved, mask=inside, other=0.0), mask=inside)
