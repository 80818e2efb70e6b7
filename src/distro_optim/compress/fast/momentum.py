"""The first half of a step, tile by tile: a gradient into the momentum, and the largest coefficients out of it.

Tensors are given by their addresses, so that one call does many tiles of many tensors. ``places``, ``(tiles, 6)``
int64, says of each tile of a batch: its tensor, the offset of its first element there, the distance of its rows, how
many rows and columns of it lie in the tensor, and its number among the tensor's tiles. Lists of addresses are
``(tensors,)`` int64; a gradient's is 0 where there is none.
"""

from __future__ import annotations

import numpy as np

from .caching import compiled
from .decoding import FILLED, PITCH, decode
from .encoding import encode_columns, encode_rows, encode_rows_onto
from .memory import peek, peek_int, poke, poke_int
from .passes import (
    accumulate,
    accumulate_without,
    clear,
    clear_beyond,
    fetch_part,
    put_back_part,
    subtract,
)
from .places import ahead_of
from .products import encode_some_columns, encode_some_rows, encode_some_rows_onto
from .selection import CANDIDATES, GROUPS, select
from .vectors import LANES

__all__ = ["extract_from_coefficients", "extract_from_weights"]


@compiled
def extract_from_coefficients(  # type: ignore[no-untyped-def]
    places,
    first,
    last,
    height,
    width,
    grads,
    momenta,
    rate,
    keep,
    k,
    encode_down,
    encode_along,
    index,
    values,
    signs,
    spoken,
):
    """For tiles ``[first, last)`` with momentum as coefficients: what is sent leaves it at once.

    Args:
        places: of the batch; all tiles are whole.
        first, last: rows of it, and of the outputs.
        height, width: of a tile, from 16 to 64.
        grads: addresses.
        momenta: addresses of ``(tiles of the tensor, height, width)`` float32.
        rate: of learning, float32, as is ``keep``.
        k: coefficients of a tile.
        encode_down, encode_along: bases for sides other than 64, as in
            :func:`~distro_optim.compress.fast.products.encode_some_columns`.
        index: ``(tiles, k)`` int32, filled.
        values: ``(tiles, k)`` float32, filled; without rows where signs are sent.
        signs: ``(tiles, k)`` bool, filled; without rows where values are sent.
        spoken: ``(tiles,)`` bool, filled: whether any coefficient is not 0.
    """
    space = np.zeros(3 * 4096 + 16, np.float32)
    turned = (space.ctypes.data + 63) & -64
    part = turned + 16384
    folded = part + 16384
    spare = np.zeros(64, np.float32)
    largest = np.zeros((64, LANES), np.int32)
    groups = np.empty(GROUPS, np.int32)
    chosen = np.empty(CANDIDATES, np.int32)
    bits = np.empty(CANDIDATES, np.int32)
    value = np.empty(GROUPS, np.float32)
    for t in range(first, last):
        param = places[t, 0]
        if grads[param] == 0:
            continue
        grad = grads[param] + 4 * places[t, 1]
        momentum = momenta[param] + 4 * height * width * places[t, 5]
        following = momentum + 4 * height * width
        _encode_down(
            grad, places[t, 2], height, width, encode_down, folded, turned,
            grads[param] + ahead_of(places, t, height, width),
        )  # fmt: skip
        if width == 64:
            kept = momentum
            encode_rows_onto(turned, height, kept, spare, largest, following, rate, keep)
        else:
            kept = part
            encode_some_rows_onto(
                turned, encode_along, width, height, folded, kept, largest, following, rate, keep, momentum
            )
        select(kept, largest, k, height, width, groups, chosen, bits)
        _say(kept, t, k, width, chosen, value, index, values, signs, spoken)
        for i in range(k):
            poke(kept, np.int64(chosen[i]), np.float32(0))
        if width != 64:
            put_back_part(part, momentum, width, height, width)
    # Its address was in use until here.
    return space[0]


@compiled
def extract_from_weights(  # type: ignore[no-untyped-def]
    places,
    first,
    last,
    height,
    width,
    grads,
    deltas,
    own_index,
    own_value,
    rate,
    keep,
    k,
    encode_down,
    encode_along,
    decode_down,
    decode_along,
    index,
    values,
    signs,
    spoken,
):
    """The same with momentum shaped as the tensors; tiles may reach beyond them.

    Args as in :func:`extract_from_coefficients`, and:
        deltas: addresses of the momenta.
        own_index: addresses of ``(tiles of the tensor, k)`` int32: what was sent in the round before, which leaves the
            momentum now, and is replaced by what is sent now. Where it is 0, that leaves the momentum at once.
        own_value: addresses of ``(tiles of the tensor, k)`` float32.
        decode_down, decode_along: of the inverse transform, as in :func:`~distro_optim.compress.fast.decoding.decode`.
    """
    space = np.empty(5 * 4096 + 64 * PITCH + 16, np.float32)
    tile = (space.ctypes.data + 63) & -64
    leaving = tile + 16384
    delta_part = leaving + 16384
    grad_part = delta_part + 16384
    folded = grad_part + 16384
    turned = folded + 16384
    spare = np.empty(64, np.float32)
    largest = np.zeros((64, LANES), np.int32)
    groups = np.empty(GROUPS, np.int32)
    chosen = np.empty(CANDIDATES, np.int32)
    bits = np.empty(CANDIDATES, np.int32)
    value = np.empty(GROUPS, np.float32)
    frequency = np.empty(64, np.int64)
    filled = np.empty(FILLED, np.int64)
    for t in range(first, last):
        param = places[t, 0]
        stride = places[t, 2]
        rows = places[t, 3]
        columns = places[t, 4]
        whole = columns == 64
        overlaps = own_index[param] != 0
        own = k * places[t, 5]
        sent_before = False
        if overlaps:
            for i in range(k):
                at = peek_int(own_index[param], own + i)
                chosen[i] = at if 0 <= at < height * width else 0
                value[i] = peek(own_value[param], own + i)
                sent_before = sent_before or value[i] != 0
            if sent_before:
                decode(
                    chosen, value, k, height, width, decode_down, decode_along, turned, frequency, filled, leaving,
                    leaving,
                )  # fmt: skip
        if grads[param] == 0 and not sent_before:
            continue
        delta = deltas[param] + 4 * places[t, 1]
        memory = delta
        if not whole:
            fetch_part(memory, stride, rows, columns, delta_part)
            delta = delta_part
            if sent_before:
                # Beyond the edges there is no momentum.
                clear_beyond(leaving, rows, columns)
        pitch = stride if whole else 64
        count = rows if whole else np.int64(64)
        if grads[param] == 0:
            subtract(delta, pitch, count, leaving)
            for i in range(k):
                poke(own_value[param], own + i, np.float32(0))
        else:
            grad = grads[param] + 4 * places[t, 1]
            if not whole:
                fetch_part(grad, stride, rows, columns, grad_part)
                grad = grad_part
            if count < height:
                clear(tile)
            if sent_before:
                accumulate_without(delta, grad, pitch, count, keep, rate, tile, leaving)
            else:
                accumulate(delta, grad, pitch, count, keep, rate, tile)
            following = ahead_of(places, t, height, width)
            _encode_down(tile, 64, height, width, encode_down, folded, turned, grads[param] + following)
            if width == 64:
                encode_rows(turned, height, tile, spare, largest, deltas[param] + following, np.float32(1))
            else:
                encode_some_rows(
                    turned, encode_along, width, height, folded, tile, largest, deltas[param] + following,
                    np.float32(1),
                )  # fmt: skip
            select(tile, largest, k, height, width, groups, chosen, bits)
            _say(tile, t, k, width, chosen, value, index, values, signs, spoken)
            if overlaps:
                for i in range(k):
                    poke_int(own_index[param], own + i, index[t, i])
                    poke(own_value[param], own + i, value[i])
            else:
                for i in range(k):
                    chosen[i] = index[t, i]
                decode(
                    chosen, value, k, height, width, decode_down, decode_along, turned, frequency, filled, leaving,
                    leaving,
                )  # fmt: skip
                subtract(delta, pitch, count, leaving)
        if not whole:
            put_back_part(delta_part, memory, stride, rows, columns)
    # Its address was in use until here.
    return space[0]


@compiled
def _encode_down(source, stride, height, width, basis, folded, turned, following):  # type: ignore[no-untyped-def]
    """The transform of the columns of a tile to ``turned``, in rows; what is beyond these means nothing."""
    if height == 64:
        encode_columns(source, stride, width, turned, following)
    else:
        encode_some_columns(source, stride, basis, height, width, folded, turned, following)


@compiled
def _say(coefficients, t, k, width, chosen, value, index, values, signs, spoken):  # type: ignore[no-untyped-def]
    """Fills row ``t`` of the outputs, and ``value[:k]``."""
    says = False
    for i in range(k):
        x = peek(coefficients, np.int64(chosen[i]))
        value[i] = x
        index[t, i] = (chosen[i] >> 6) * width + (chosen[i] & 63)
        says = says or x != 0
        if len(signs):
            signs[t, i] = np.signbit(x)
        else:
            values[t, i] = x
    spoken[t] = says
