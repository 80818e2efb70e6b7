"""The first half of a step, one program for each tile: a gradient into the momentum, the largest coefficients out.

All tensors of a batch in one launch. What :class:`~distro_optim.compress.extraction.Extraction` does in nine passes
over memory, each element of gradient and momentum is read once for here, and written once.
"""

# mypy: disable-error-code="no-untyped-def,import-untyped,import-not-found"

from __future__ import annotations

import triton
import triton.language as tl

from .products import basis_times, sum_of_few, times_basis
from .selecting import largest, ranks
from .tiles import address, place, rounded, signs_packed

__all__ = ["extract_kernel"]


@triton.jit
def _encoded(
    x,
    fh,
    fw,
    parts,
    H: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """``F_h^T @ x @ F_w``, without ``F_h`` where a tile is one row."""
    out = times_basis(x, fw, parts, BH, BW, PRECISION, EMULATE)
    if H > 1:
        out = basis_times(fh, out, parts, BH, BW, PRECISION, EMULATE)
    return out


@triton.jit
def extract_kernel(
    first, places, addresses, present, fh, fw, index_out, value_out, left_out, spoken, codes, numbers, parts,
    H: tl.constexpr, W: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    OWN: tl.constexpr, AS_COEFFICIENTS: tl.constexpr, SIGNS: tl.constexpr,
    GRAD: tl.constexpr, VALUE: tl.constexpr, LIMIT: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A tile of :class:`~distro_optim.compress.extraction.Extraction`.

    Args:
        first: tile of the batch that is the first program's.
        places, addresses: see :mod:`~distro_optim.compress.engine.triton.tiles`.
        present: ``(tensors,)`` int32: 0 leaves a gradient out.
        fh, fw: ``(parts, B, B)``, bases, zeros beyond the sides of a tile.
        index_out: ``(tiles, K)`` int32, filled in ascending order.
        value_out: ``(tiles, K)``: 1 for negative in uint8 where ``SIGNS``, otherwise of the type ``VALUE``.
        left_out: ``(tiles, KP)`` float32, room for what leaves the momentum at once; used neither with ``OWN`` nor with
            ``AS_COEFFICIENTS``.
        spoken: ``(tensors,)`` int32: becomes 1 where anything that is not 0 is sent.
        codes: ``(tiles, BH * BW / 4)`` uint8, filled where ``OWN``: the signs of the new momentum, for the lookahead.
        numbers: ``(2,)`` float32: the learning rate, and the decay.
        parts: of the bases, as for :func:`~distro_optim.compress.engine.triton.products.times_basis`.
        H, W: of a tile. BH, BW: powers of two from 32, not less. KP: not less than K and 16.
        OWN: what was sent a step ago leaves now; not with ``AS_COEFFICIENTS``.
        LIMIT: the largest number of the type ``VALUE``.
    """
    tile = first + tl.program_id(0).to(tl.int64)
    tensor, base, offsets, inside, local = place(places, tile, H, W, BH, BW, ALIGNED)
    here = tl.load(present + tensor) != 0
    rate, keep = tl.load(numbers), tl.load(numbers + 1)
    i, j = tl.arange(0, BH), tl.arange(0, BW)
    in_tile = (i < H)[:, None] & (j < W)[None, :]
    linear = i[:, None] * W + j[None, :]

    keeps = tl.where(here, keep, 1.0)
    momentum = address(addresses, tensor, 1, tl.float32, ALIGNED)
    grad_ptr = address(addresses, tensor, 0, GRAD, ALIGNED) + base
    if AS_COEFFICIENTS:
        momentum += local * (H * W)
        grad = tl.load(grad_ptr + offsets, mask=inside & here, other=0.0).to(tl.float32)
        c = rate * _encoded(grad, fh, fw, parts, H, BH, BW, PRECISION, EMULATE)
        c += keep * tl.load(momentum + linear, mask=in_tile, other=0.0)
    else:
        momentum += base
        if OWN:
            # Before the tile is loaded, so that it does not fill registers meanwhile.
            at = tl.arange(0, KP)
            own_index = address(addresses, tensor, 2, tl.int32, False) + local * K
            own_value = address(addresses, tensor, 3, tl.float32, False) + local * K
            position = tl.load(own_index + at, mask=at < K, other=0)
            value = tl.load(own_value + at, mask=at < K, other=0.0)
            own = sum_of_few(position, value, fh, fw, parts, H, W, BH, BW, KP, PRECISION, EMULATE)
            x = tl.load(momentum + offsets, mask=inside, other=0.0) - own
        else:
            x = tl.load(momentum + offsets, mask=inside, other=0.0)
        grad = tl.load(grad_ptr + offsets, mask=inside & here, other=0.0).to(tl.float32)
        x = tl.where(inside, keeps * x + rate * grad, 0.0)
        if OWN:
            tl.store(momentum + offsets, x, mask=inside)
            codes_at = i[:, None] * (BW // 4) + tl.arange(0, BW // 4)[None, :]
            tl.store(codes + tile * (BH * BW // 4) + codes_at, signs_packed(x, BH, BW))
        c = _encoded(x, fh, fw, parts, H, BH, BW, PRECISION, EMULATE)

    chosen, most = largest(c, in_tile, K)
    if SIGNS:
        tl.store(spoken + tensor, 1, mask=(most > 0) & here)
    position = ranks(chosen.to(tl.int32))
    chosen = chosen & (position < K)
    sent = c
    if not (SIGNS or VALUE == tl.float32):  # noqa: SIM300
        sent = rounded(tl.minimum(tl.maximum(sent, -LIMIT), LIMIT), VALUE, EMULATE).to(tl.float32)
    to = tile * K + position
    tl.store(index_out + to, linear, mask=chosen)
    if SIGNS:
        tl.store(value_out + to, (sent.to(tl.int32, bitcast=True) < 0).to(tl.uint8), mask=chosen)
    else:
        tl.store(value_out + to, rounded(sent, VALUE, EMULATE), mask=chosen)

    if AS_COEFFICIENTS:
        left = tl.where(chosen, c - sent, c)
        tl.store(momentum + linear, left, mask=in_tile & here)
    elif OWN:
        tl.debug_barrier()  # everybody has read what was sent before
        to = local * K + position
        own_index = address(addresses, tensor, 2, tl.int32, False)
        own_value = address(addresses, tensor, 3, tl.float32, False)
        tl.store(own_index + to, linear, mask=chosen & here)
        tl.store(own_value + to, tl.where(here, sent, 0.0), mask=chosen)
    else:
        tl.store(left_out + tile * KP + position, sent, mask=chosen)
        tl.debug_barrier()  # everybody has written
        at = tl.arange(0, KP)
        positions = tl.load(index_out + tile * K + at, mask=at < K, other=0)
        values = tl.load(left_out + tile * KP + at, mask=at < K, other=0.0)
        leaving = sum_of_few(positions, values, fh, fw, parts, H, W, BH, BW, KP, PRECISION, EMULATE)
        tl.store(momentum + offsets, x - leaving, mask=inside & here)
