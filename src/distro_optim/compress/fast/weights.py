"""The second half of a step, tile by tile: everybody's coefficients to new weights, by the definition "exact-1".

Where weights are to look ahead at once, they do in the same pass over the memory.

The means are integers, the basis is one, and a sum of their products stays far below 2^53, so that float64 holds it
exactly and only its sign is used: the bits of the weights are those of every other engine of the definition.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from .caching import compiled
from .decoding import FILLED, PITCH
from .encoding import SIDE
from .filtering import decode_signs
from .memory import peek_byte, peek_int
from .passes import clear, descend, descend_ahead, descend_ahead_streaming, fence, fetch_part, put_back_part
from .places import ahead_of
from .vectors import LANES, LINE

__all__ = ["COUNTS", "merge"]

COUNTS: Final = 22
"""A sum and a count share an int32: the count above this bit. 256 values of at most 2^12 sum up to 2^20."""


@compiled
def _means_of_signs(t, k, size, indices, values, present, param, table, senders, sums, position, mean):  # type: ignore[no-untyped-def]
    """Positions that anybody names in tile ``t`` and their means; how many there are."""
    named = np.uint64(0)
    for r in range(len(indices)):
        if present[r, param]:
            index = indices[r]
            value = values[r]
            for i in range(t * k, t * k + k):
                at = np.uint64(peek_int(index, i))
                at = at if at < size else np.uint64(0)
                both = sums[at]
                position[named] = at
                # Without a branch, which would often be guessed wrong.
                named += np.uint64((both == 0) & (named < size))
                sums[at] = both + (1 << COUNTS) + 1 - 2 * np.int32(peek_byte(value, i))
    for n in range(named):
        at = np.uint64(position[n])
        both = sums[at]
        sums[at] = 0
        count = (both + (1 << (COUNTS - 1))) >> COUNTS
        # table[count, total] for |total| <= count, row after row.
        entry = count * count + count + both - (count << COUNTS)
        mean[n] = table[np.uint64(entry)] if 0 < count <= senders else 0
    return np.int64(named)


@compiled
def _means_of_values(t, k, size, indices, values, present, param, value_bits, sums, position, mean):  # type: ignore[no-untyped-def]
    """The same of float32 values, scaled by a power of two that all of the tile have in common."""
    largest = np.int32(0)
    for r in range(len(indices)):
        if present[r, param]:
            value = values[r]
            for i in range(t * k, t * k + k):
                largest = max(largest, peek_int(value, i) & np.int32(0x7FFFFFFF))
    highest = np.int64(largest >> 23)
    named = np.uint64(0)
    for r in range(len(indices)):
        if present[r, param]:
            index = indices[r]
            value = values[r]
            for i in range(t * k, t * k + k):
                at = np.uint64(peek_int(index, i))
                at = at if at < size else np.uint64(0)
                bits = np.int64(peek_int(value, i))
                exponent = (bits >> 23) & 255
                shift = min(highest - exponent + 24 - value_bits, 31)
                rounded = (((bits & 0x7FFFFF) | 0x800000) + (1 << (shift - 1))) >> shift
                rounded *= exponent != 0
                both = sums[at]
                position[named] = at
                named += np.uint64((both == 0) & (named < size))
                sums[at] = both + (1 << COUNTS) + ((rounded ^ (bits >> 31)) - (bits >> 31))
    for n in range(named):
        at = np.uint64(position[n])
        both = sums[at]
        sums[at] = 0
        count = (both + (1 << (COUNTS - 1))) >> COUNTS
        total = both - (count << COUNTS)
        if count > 1:
            half = (2 * abs(total) + count) // (2 * count)
            total = -half if total < 0 else half
        mean[n] = total
    return np.int64(named)


@compiled
def merge(  # type: ignore[no-untyped-def]
    places,
    first,
    last,
    height,
    width,
    params,
    step,
    k,
    indices,
    values,
    quantized,
    present,
    table,
    senders,
    value_bits,
    down,
    along,
    deltas,
    shifted,
    ahead,
):
    """``param -= step * sign(merged update)`` for tiles ``[first, last)`` of a batch.

    Then ``shifted = param - ahead * sign(delta)``, where there is a ``shifted``.

    Args:
        places: see :mod:`~distro_optim.compress.fast.momentum`.
        first, last: rows of it.
        height, width: of a tile, from 2 to 64.
        params: ``(tensors,)`` int64, addresses of float32.
        step: float32.
        k: coefficients of a tile and contributor.
        indices: ``(contributors,)`` int64, addresses of ``(tiles, k)`` int32.
        values: ``(contributors,)`` int64, addresses of ``(tiles, k)``: bytes of 0 and 1 (negative), or float32.
        quantized: which of both.
        present: ``(contributors, tensors)`` bool.
        table: float64, means of signs: ``c * c + c + s`` holds that of a sum ``s`` of ``c`` signs.
        senders: the largest ``c`` in it.
        value_bits: of a rounded value.
        down, along: float64 of integers, as in :func:`~distro_optim.compress.fast.decoding.decode`.
        deltas, shifted: ``(tensors,)`` int64, addresses of float32, laid out as ``params``; 0 for a tensor that is not
            shifted.
        ahead: float32.
    """
    sums = np.zeros(SIDE * SIDE, np.int32)
    position = np.empty(SIDE * SIDE + 1, np.int32)
    mean = np.empty(SIDE * SIDE, np.float64)
    space = np.empty(4 * 4096 + 2 * 64 * PITCH + 16, np.float32)
    tile = (space.ctypes.data + 63) & -64
    part = tile + 16384
    delta_part = part + 16384
    shifted_part = delta_part + 16384
    row_sums = shifted_part + 16384
    frequency = np.empty(64, np.int64)
    filled = np.empty(FILLED, np.int64)
    least = np.empty(LANES, np.float32)
    size = height * width
    fast_down = down.astype(np.float32)
    fast_along = along.astype(np.float32)
    for t in range(first, last):
        param = places[t, 0]
        if quantized:
            named = _means_of_signs(
                t, k, np.uint64(size), indices, values, present, param, table, senders, sums, position, mean
            )
        else:
            named = _means_of_values(
                t, k, np.uint64(size), indices, values, present, param, value_bits, sums, position, mean
            )
        there = 4 * places[t, 1]
        stride = places[t, 2]
        weight = params[param] + there
        shifting = shifted[param]
        following = params[param] + ahead_of(places, t, height, width)
        says = named != 0 and decode_signs(
            position, mean, named, height, width, down, along, fast_down, fast_along, row_sums, frequency, filled,
            tile, following, least,
        )  # fmt: skip
        if not says:
            if shifting == 0:
                continue
            clear(tile)
        rows = places[t, 3]
        columns = places[t, 4]
        if columns == 64:
            if shifting == 0:
                descend(weight, stride, rows, tile, step)
            elif (shifting + there) % (4 * LINE) == 0 and stride % LINE == 0:
                descend_ahead_streaming(
                    weight, stride, rows, tile, step, deltas[param] + there, shifting + there, ahead
                )
            else:
                descend_ahead(weight, stride, rows, tile, step, deltas[param] + there, shifting + there, ahead)
        else:
            fetch_part(weight, stride, rows, columns, part)
            if shifting != 0:
                fetch_part(deltas[param] + there, stride, rows, columns, delta_part)
                descend_ahead(part, 64, 64, tile, step, delta_part, shifted_part, ahead)
                put_back_part(shifted_part, shifting + there, stride, rows, columns)
            else:
                descend(part, 64, 64, tile, step)
            put_back_part(part, weight, stride, rows, columns)
    fence()
    # Its address was in use until here.
    return space[0]
