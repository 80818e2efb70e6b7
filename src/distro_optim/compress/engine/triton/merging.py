"""The second half of a step by the definition ``exact-1``, one program for each tile: coefficients to new weights.

Everything up to the sign is a product of matrices of 8-bit integers, which tensor cores add up in 32 bits without any
rounding. So the order of contributors, of products and of programs cannot matter.

1. Positions as rows of a one-hot matrix: two products with it add up the signs (or values) of all contributors at each
   position of a tile, and count them. No sorting, no atomics, and positions that several contributors name are no
   special case.
2. Means, by the definition: integers ``q`` of at most 13 bits and a sign.
3. ``Y = B_h q``, of 30 bits and a sign, and ``X = Y B_w^T``, in two words of 32 bits.

Bounds: :mod:`~distro_optim.compress.engine.triton.bounds` proves them, for every side of a tile.
"""

# mypy: disable-error-code="no-untyped-def,import-untyped,import-not-found"

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import address, place, rounded, signs_unpacked

__all__ = ["merge_kernel"]


@triton.jit
def _digits(x):
    """The lowest of base 256, from -128 to 127, as int8, and the rest."""
    low = x.to(tl.int8)
    return low, (x - low.to(tl.int32)) >> 8


@triton.jit
def _one_hot(position, value, BN: tl.constexpr):
    """``[BN, CHUNK]`` int8: ``value`` in the row that ``position`` names, 0 in the others."""
    hot = tl.arange(0, BN)[:, None] == position[None, :]
    return tl.where(hot, value[None, :], 0).to(tl.int8)


@triton.jit
def _spoken_by(said, present, tensor, m, K: tl.constexpr, total, tensors):
    """Contributors of the entries ``m``, and whether each speaks of the tensor."""
    r = m // K
    live = m < total
    live = live & (tl.load(present + r.to(tl.int64) * tensors + tensor, mask=live, other=0) != 0)
    return r, live


@triton.jit
def _bits_of_values(said, r, live, entry, VALUE: tl.constexpr):
    """As float32, of which the bits are."""
    values = tl.load(said + 2 * r + 1, mask=live, other=0).to(tl.pointer_type(VALUE))
    return tl.load(values + entry, mask=live, other=0.0).to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def _to_integers(bits, largest):
    """float32 values to integers of at most 2**12, in a unit that is set by the largest biased exponent."""
    exponent = (bits >> 23) & 255
    mantissa = tl.where(exponent > 0, (bits & 0x7FFFFF) | 0x800000, 0)
    shift = tl.minimum(largest - exponent + 12, 31)
    # Half a unit is at most 2**30, and a mantissa is below 2**24.
    magnitude = (mantissa + (1 << (shift - 1))) >> shift
    return tl.where(bits < 0, -magnitude, magnitude)


@triton.jit
def _exact_sign(q_turned, bh, bw, H: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr):
    """The sign of ``X``, ``[BH, BW]`` float32, of integer coefficients ``[BW, BH]``, row = column of the tile."""
    i, j = tl.arange(0, BH), tl.arange(0, BW)
    q0, q1 = _digits(q_turned)
    q1 = q1.to(tl.int8)
    if H > 1:
        left = bh + i[:, None] * BH + i[None, :]
        a0, a1 = tl.load(left), tl.load(left + BH * BH)
        q0, q1 = tl.trans(q0), tl.trans(q1)
        y = tl.dot(a0, q0, out_dtype=tl.int32)
        middle = tl.dot(a0, q1, out_dtype=tl.int32)
        middle = tl.dot(a1, q0, middle, out_dtype=tl.int32)
        y += middle << 8
        y += tl.dot(a1, q1, out_dtype=tl.int32) << 16
    else:
        y = tl.trans(q_turned)
    y0, y = _digits(y)
    y1, y = _digits(y)
    y2, y = _digits(y)
    y3 = y.to(tl.int8)
    right = bw + j[None, :] * BW + j[:, None]
    b0, b1 = tl.load(right), tl.load(right + BW * BW)
    # X = low + 2**16 * high; sums of 64 products of two digits are below 2**21.
    low = tl.dot(y1, b0, out_dtype=tl.int32)
    low = tl.dot(y0, b1, low, out_dtype=tl.int32) << 8
    low = tl.dot(y0, b0, low, out_dtype=tl.int32)
    high = tl.dot(y3, b1, out_dtype=tl.int32) << 8
    high = tl.dot(y3, b0, high, out_dtype=tl.int32)
    high = tl.dot(y2, b1, high, out_dtype=tl.int32) << 8
    high = tl.dot(y2, b0, high, out_dtype=tl.int32)
    high = tl.dot(y1, b1, high, out_dtype=tl.int32)
    high += low >> 16
    rest = low & 0xFFFF
    return tl.where(high < 0, -1.0, tl.where((high > 0) | (rest > 0), 1.0, 0.0))


@triton.jit
def merge_kernel(
    first, places, addresses, said, present, bh, bw, codes, numbers, total, tensors,
    H: tl.constexpr, W: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr,
    SIGNS: tl.constexpr, VALUE: tl.constexpr, PARAM: tl.constexpr, AHEAD: tl.constexpr,
    EMULATE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """``weight -= step * sign(X)`` for a tile, and, if ``AHEAD``, ``shifted = weight - rate * sign(momentum)``.

    Args:
        first: tile of the batch that is the first program's.
        places, addresses: see :mod:`~distro_optim.compress.engine.triton.tiles`.
        said: ``(contributors, 2)`` int64: addresses of ``(tiles, K)`` int32 positions, and of as many signs (bytes of 0
            and 1, which is negative) or values of the type ``VALUE``.
        present: ``(contributors, tensors)`` int32.
        bh, bw: ``(2, B, B)`` int8: the integer bases in digits of base 256, zeros beyond the sides of a tile.
        codes: of :func:`~distro_optim.compress.engine.triton.extracting.extract_kernel`, if ``AHEAD``.
        numbers: ``(2,)`` float32: the learning rate with its gain, and that of the lookahead.
        total: contributors times ``K``, at most ``2**14``.
        tensors: of the model.
        CHUNK: entries at a time, a power of two from 32.
    """
    tile = first + tl.program_id(0).to(tl.int64)
    tensor, base, offsets, inside, _ = place(places, tile, H, W, BH, BW, ALIGNED)
    # Both turned: row = column of the tile, as the next product wants it.
    sums = tl.zeros([BW, BH], tl.int32)
    counts = tl.zeros([BW, BH], tl.int32)
    largest = 0
    if not SIGNS:
        for start in range(0, total, CHUNK):
            m = start + tl.arange(0, CHUNK)
            r, live = _spoken_by(said, present, tensor, m, K, total, tensors)
            bits = _bits_of_values(said, r, live, tile * K + m % K, VALUE)
            largest = tl.maximum(largest, tl.max((bits >> 23) & 255))
    for start in range(0, total, CHUNK):
        m = start + tl.arange(0, CHUNK)
        r, live = _spoken_by(said, present, tensor, m, K, total, tensors)
        entry = tile * K + m % K
        indices = tl.load(said + 2 * r, mask=live, other=0).to(tl.pointer_type(tl.int32))
        position = tl.load(indices + entry, mask=live, other=0)
        rows = tl.trans(_one_hot(position // W, tl.where(live, 1, 0), BH))
        one = tl.full([CHUNK], 1, tl.int32)
        counts = tl.dot(_one_hot(position % W, one, BW), rows, counts, out_dtype=tl.int32)
        if SIGNS:
            signs = tl.load(said + 2 * r + 1, mask=live, other=0).to(tl.pointer_type(tl.uint8))
            value = 1 - 2 * tl.load(signs + entry, mask=live, other=0).to(tl.int32)
            sums = tl.dot(_one_hot(position % W, value, BW), rows, sums, out_dtype=tl.int32)
        else:
            value = _to_integers(_bits_of_values(said, r, live, entry, VALUE), largest)
            upper = (value + 64) >> 7
            sums = tl.dot(_one_hot(position % W, value - (upper << 7), BW), rows, sums, out_dtype=tl.int32)
            sums += tl.dot(_one_hot(position % W, upper, BW), rows, out_dtype=tl.int32) << 7
    if SIGNS:
        doubled = 2 * 2520 * tl.abs(sums)
    else:
        doubled = 2 * tl.abs(sums)
    q = (doubled + counts) // tl.maximum(2 * counts, 1)
    sign = _exact_sign(tl.where(sums < 0, -q, q), bh, bw, H, BH, BW)

    weight_ptr = address(addresses, tensor, 4, PARAM, ALIGNED) + base + offsets
    weight = tl.load(weight_ptr, mask=inside, other=0.0).to(tl.float32)
    # A sign times a number is exact: it does not matter whether the subtraction is fused with it.
    new = rounded(weight - tl.load(numbers) * sign, PARAM, EMULATE)
    tl.store(weight_ptr, new, mask=inside)
    if AHEAD:
        i, j = tl.arange(0, BH), tl.arange(0, BW // 4)
        packed = tl.load(codes + tile * (BH * BW // 4) + i[:, None] * (BW // 4) + j[None, :])
        shift = tl.load(numbers + 1) * signs_unpacked(packed, BH, BW)
        shifted_ptr = address(addresses, tensor, 5, PARAM, ALIGNED) + base
        moves = inside & (tl.load(addresses + tensor * 8 + 5) != 0)  # what is frozen does not look ahead
        tl.store(shifted_ptr + offsets, rounded(new.to(tl.float32) - shift, PARAM, EMULATE), mask=moves)
