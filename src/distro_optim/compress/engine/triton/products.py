"""Products with the DCT's basis on tensor cores, in nearly the precision of float32.

A float32 number is the sum of two bfloat16 and a rest of 2**-17 of it, so a product of matrices is four products of
bfloat16 matrices that are added up in float32. In 3,000 tiles no other coefficient was picked than by a DCT in float64.
"""

# mypy: disable-error-code="no-untyped-def,import-untyped,import-not-found"

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import rounded

__all__ = ["basis_times", "split", "sum_of_few", "times_basis"]


@triton.jit
def split(x, EMULATE: tl.constexpr):
    """Two bfloat16 tensors whose sum is nearly ``x``; ``EMULATE``: the same numbers in float32.

    Triton's interpreter multiplies the bits of bfloat16 matrices as if they were integers.
    """
    if EMULATE:
        upper = rounded(x, tl.bfloat16, True).to(tl.float32)
        return upper, rounded(x - upper, tl.bfloat16, True).to(tl.float32)
    else:
        upper = x.to(tl.bfloat16)
        return upper, (x - upper.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _added(left, right, out, PRECISION: tl.constexpr, EMULATE: tl.constexpr):
    """``out + left @ right`` in float32."""
    if PRECISION != "split":
        return tl.dot(left, right, out, input_precision=PRECISION)
    elif EMULATE:
        return tl.dot(left, right, out, input_precision="ieee")
    else:
        return tl.dot(left, right, out)


@triton.jit
def times_basis(x, table, parts, BH: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr):
    """``x @ F``, with ``x`` ``[BH, BN]`` float32.

    Args:
        x: of which other values of ``PRECISION`` than ``"split"``, those of ``tl.dot``, make what they will.
        table: ``(parts, BN, BN)``, whose sum is ``F``.
        parts: how many; known to the program only when it runs. A loop that could be unrolled would be, and then all
            of the basis would be held in registers at the same time, of which there are not enough.
    """
    i, j = tl.arange(0, BN)[:, None], tl.arange(0, BN)[None, :]
    out = tl.zeros([BH, BN], tl.float32)
    if PRECISION == "split":
        upper, lower = split(x, EMULATE)
        for part in range(parts):
            basis = tl.load(table + part * (BN * BN) + i * BN + j)
            out = _added(lower, basis, out, PRECISION, EMULATE)
            out = _added(upper, basis, out, PRECISION, EMULATE)
    else:
        out = _added(x, tl.load(table + i * BN + j), out, PRECISION, EMULATE)
    return out


@triton.jit
def basis_times(table, x, parts, BN: tl.constexpr, BW: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr):
    """``F^T @ x``, with ``x`` ``[BN, BW]``; the rest is as for :func:`times_basis`."""
    i, j = tl.arange(0, BN)[:, None], tl.arange(0, BN)[None, :]
    out = tl.zeros([BN, BW], tl.float32)
    if PRECISION == "split":
        upper, lower = split(x, EMULATE)
        for part in range(parts):
            basis = tl.load(table + part * (BN * BN) + j * BN + i)
            out = _added(basis, lower, out, PRECISION, EMULATE)
            out = _added(basis, upper, out, PRECISION, EMULATE)
    else:
        out = _added(tl.load(table + j * BN + i), x, out, PRECISION, EMULATE)
    return out


@triton.jit
def sum_of_few(
    position, value, fh, fw, parts,
    H: tl.constexpr, W: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, KP: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """The tile of ``KP`` coefficients, ``[BH, BW]`` float32, as one product of two thin matrices.

    Args:
        position: ``[KP]`` int32, in the tile; value: ``[KP]`` float32.
        fh, fw: as ``table`` of :func:`times_basis`; tiles of one row need no ``fh``.
    """
    i, j = tl.arange(0, BH)[:, None], tl.arange(0, BW)[None, :]
    row, column = (position // W)[None, :], (position % W)[:, None]
    at = j * BW + column
    right = tl.zeros([KP, BW], tl.float32)
    for part in range(parts):
        right += value[:, None] * tl.load(fw + part * (BW * BW) + at).to(tl.float32)
    out = tl.zeros([BH, BW], tl.float32)
    if H > 1:
        if PRECISION == "split":
            upper, lower = split(right, EMULATE)
            for part in range(parts):
                left = tl.load(fh + part * (BH * BH) + i * BH + row)
                out = _added(left, lower, out, PRECISION, EMULATE)
                out = _added(left, upper, out, PRECISION, EMULATE)
        else:
            out = _added(tl.load(fh + i * BH + row), right, out, PRECISION, EMULATE)
    else:
        out = tl.where(i == 0, tl.sum(right, axis=0)[None, :], 0.0)
    return out
