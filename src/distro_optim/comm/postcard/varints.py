"""Many varints at once: token lists have thousands, filters have dozens, and a loop takes a microsecond for each.

All functions answer None where something is not as it should be; the caller then takes the plain loop, which says what
is wrong and where.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..declarations import IntShape

__all__ = ["WORTHWHILE", "decode_few", "decode_varints", "encode_varints"]

WORTHWHILE: Final = 256
"""For numpy. Fewer are as quick one by one (measured: even at about 128)."""

_BLOCK: Final = 1 << 14
"""Values handled at a time, so that for any input the intermediate results stay small and in the cache."""

_GROUP: Final = 7  # bits of a value in each byte


_VARINT: Final = re.compile(rb"[\x80-\xff]{0,9}[\x00-\x7f]")
"""One of at most 64 bits; bounded, so that a search in any bytes takes time in proportion to their number."""

_LANE: Final = 16
"""Bytes in which each of a few values is taken apart. The longest varint has ten."""

_MERGES: Final = (
    (0x007F_007F_007F_007F_007F_007F_007F_007F, 1),
    (0x0000_3FFF_0000_3FFF_0000_3FFF_0000_3FFF, 2),
    (0x0000_0000_0FFF_FFFF_0000_0000_0FFF_FFFF, 4),
    (0x0000_0000_0000_0000_00FF_FFFF_FFFF_FFFF, 8),
)
"""In each step neighbouring groups of bits move together: which of a pair stays, and by how much the other moves."""


def _max_length(bits: int) -> int:
    return -(-bits // _GROUP)


def encode_varints(values: Sequence[int], shape: IntShape) -> bytes | None:
    """The values one after the other, or None if one of them does not fit ``shape``."""
    parts = [_encode_block(values[start : start + _BLOCK], shape) for start in range(0, len(values), _BLOCK)]
    whole = [part for part in parts if part is not None]
    return b"".join(whole) if len(whole) == len(parts) else None


def _encode_block(values: Sequence[int], shape: IntShape) -> bytes | None:
    given = np.asarray(values)
    if given.ndim != 1 or given.dtype.kind not in "iu" or given.min() < shape.low or given.max() > shape.high:
        return None
    if shape.signed:
        signed = given.astype(np.int64)
        folded = ((signed << 1) ^ (signed >> 63)).astype(np.uint64)
    else:
        folded = given.astype(np.uint64)
    length = _max_length(max(1, int(folded.max()).bit_length()))
    shifts = np.arange(length, dtype=np.uint64) * np.uint64(_GROUP)
    groups = (folded[:, None] >> shifts).astype(np.uint8) & np.uint8(0x7F)  # (values, length)
    # The last byte of a value is that of its highest bit that is set.
    lengths = 1 + (folded[:, None] >> shifts[1:] != 0).sum(axis=1)
    place = np.arange(length)
    groups[place < lengths[:, None] - 1] |= np.uint8(0x80)
    return bytes(groups[place < lengths[:, None]].tobytes())


def decode_varints(data: memoryview, count: int, shape: IntShape) -> tuple[list[int], int] | None:
    """The first ``count`` values and how many bytes they take, or None if they are not all there and in order."""
    values: list[int] = []
    taken = 0
    while len(values) < count:
        block = _decode_block(data[taken:], min(_BLOCK, count - len(values)), shape)
        if block is None:
            return None
        values += block[0]
        taken += block[1]
    return values, taken


def _decode_block(data: memoryview, count: int, shape: IntShape) -> tuple[list[int], int] | None:
    length = _max_length(shape.bits)
    view = np.frombuffer(data[: count * length], dtype=np.uint8)
    ends = np.flatnonzero(view < 0x80)[:count]
    if len(ends) < count:
        return None
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > length:
        return None
    values: NDArray[np.uint64] = np.zeros(count, dtype=np.uint64)
    for place in range(int(lengths.max())):
        there = place < lengths
        group = view[starts[there] + place].astype(np.uint64) & np.uint64(0x7F)
        spare = shape.bits - place * _GROUP
        if spare < _GROUP and (group >> np.uint64(spare)).any():
            return None
        values[there] |= group << np.uint64(place * _GROUP)
    taken = int(ends[-1]) + 1
    if shape.signed:
        return ((values >> np.uint64(1)).astype(np.int64) ^ -(values & np.uint64(1)).astype(np.int64)).tolist(), taken
    return values.tolist(), taken


def decode_few(data: memoryview, count: int, bits: int) -> tuple[tuple[int, ...], int] | None:
    """The first ``count`` unsigned values of ``bits`` bits, up to 64, and how many bytes they take.

    All of them are one long integer in which each has a lane of its own; so a few operations do for any number.
    """
    length = _max_length(bits)
    begin = bytes(data[: count * length])
    groups = _VARINT.findall(begin)[:count]
    encoded = b"".join(groups)
    # What is no varint was passed over.
    if len(groups) < count or not begin.startswith(encoded) or (count and len(max(groups, key=len)) > length):
        return None
    lanes = int.from_bytes(b"".join([group.ljust(_LANE, b"\0") for group in groups]), "little")
    seven, merges, form = _for_lanes(count)
    lanes &= seven
    for stays, moves, distance in merges:
        lanes = (lanes & stays) | ((lanes & moves) >> distance)
    words = form.unpack(lanes.to_bytes(count * _LANE, "little"))
    values, above = words[::2], words[1::2]
    if any(above) or (bits < 64 and count and max(values) >> bits):
        return None
    return values, len(encoded)


@lru_cache(maxsize=64)
def _for_lanes(count: int) -> tuple[int, list[tuple[int, int, int]], struct.Struct]:
    """For so many lanes: the mask of all groups, the steps that merge them, and how the words are read."""

    def everywhere(mask: int) -> int:
        return int.from_bytes(mask.to_bytes(_LANE, "little") * count, "little")

    merges = [(everywhere(stays), everywhere(stays << 8 * distance), distance) for stays, distance in _MERGES]
    return everywhere(int.from_bytes(b"\x7f" * _LANE, "little")), merges, struct.Struct(f"<{2 * count}Q")
