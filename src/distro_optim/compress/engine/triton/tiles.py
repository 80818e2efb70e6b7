"""Where a tile lies in the memory of its tensor: what every kernel begins with.

``places`` is :attr:`~distro_optim.compress.plan.Batch.places`, one row for each tile; ``addresses`` has a row for each
tensor of the model, with the columns of :class:`~distro_optim.compress.engine.triton.tables.Column`.
"""

# mypy: disable-error-code="no-untyped-def,import-untyped,import-not-found"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["address", "place", "rounded", "signs_packed", "signs_unpacked"]


@triton.jit
def place(places, tile, H: tl.constexpr, W: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, ALIGNED: tl.constexpr):
    """The tensor, where in it a tile begins, its elements from there, ``[BH, BW]``, which of them exist, its number."""
    row = places + tile * 6
    tensor = tl.load(row)
    base = tl.load(row + 1)
    stride = tl.load(row + 2).to(tl.int32)
    if ALIGNED:
        # Without these hints every element is loaded by an instruction of its own.
        base = tl.multiple_of(base, 16)
        stride = tl.multiple_of(stride, 16)
    rows, columns = tl.load(row + 3).to(tl.int32), tl.load(row + 4).to(tl.int32)
    i, j = tl.arange(0, BH), tl.arange(0, BW)
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    return tensor, base, i[:, None] * stride + j[None, :], inside, tl.load(row + 5)


@triton.jit
def address(addresses, tensor, column: tl.constexpr, T: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer to the first element of a tensor, of elements ``T``."""
    number = tl.load(addresses + tensor * 8 + column)
    if ALIGNED:
        number = tl.multiple_of(number, 16)
    return number.to(tl.pointer_type(T))


@triton.jit
def rounded(x, T: tl.constexpr, EMULATE: tl.constexpr):
    """float32 to ``T``, to the nearest, ties to even.

    ``EMULATE``: bfloat16 by integers, since Triton's interpreter cuts the bits off.
    """
    if EMULATE and T == tl.bfloat16:  # noqa: SIM300
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(T)


@triton.jit
def signs_packed(x, BH: tl.constexpr, BW: tl.constexpr):
    """Signs of ``[BH, BW]`` numbers in 2 bits each, four to a byte, ``[BH, BW / 4] uint8``: 1 above 0, 2 below."""
    code = (x > 0).to(tl.int32) + 2 * (x < 0).to(tl.int32)
    four = tl.reshape(code, [BH, BW // 4, 4])
    return tl.sum(four << (2 * tl.arange(0, 4))[None, None, :], axis=2).to(tl.uint8)


@triton.jit
def signs_unpacked(codes, BH: tl.constexpr, BW: tl.constexpr):
    """The inverse: ``[BH, BW]`` float32 of -1, 0 and 1."""
    four = (codes.to(tl.int32)[:, :, None] >> (2 * tl.arange(0, 4))[None, None, :]) & 3
    code = tl.reshape(four, [BH, BW])
    return tl.where(code == 1, 1.0, tl.where(code == 2, -1.0, 0.0))
