"""What an audited trainer shows: a few leaves of its momentum before and after a step, and where it looked.

::

    version     u8, 1
    step        u32, little endian: the one that is audited
    leaves      varint count, and for each, in ascending order of numbers:
                  number (varint), elements before, elements after (each of the leaf's size),
                  siblings before, siblings after (each 32 bytes times the depth of the tree)
    signs       of the momentum before, which is where it looked ahead: a bit per element, 1 for negative, tensor by
                tensor, each filled up to whole bytes; the first element is the lowest bit
    zeros       varint length; zlib of as many bits, 1 where the momentum is 0 and has no sign

All sizes but the last follow from the plan, so a message of another size is refused before anything is allocated, and
the last one is bounded. A model of 124 million parameters opens 16 leaves in 17.7 MB, of which 15.5 MB are signs.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from ..buffer import Reader, Writer
from ..compress import TilePlan
from ..errors import ConfigurationError, ProtocolError
from .momentum import Snapshot, leaves_of

__all__ = [
    "MAX_LEAVES",
    "OpenedLeaf",
    "Opening",
    "decode_opening",
    "encode_opening",
    "make_opening",
    "max_opening_bytes",
]

MAX_LEAVES: Final = 64
"""That are opened at once. Chosen arbitrarily, four times as many as are asked for."""

_VERSION: Final = 1
_HASH: Final = 32

_ZEROS_SHARE: Final = 64
"""Elements for each byte of zeros, compressed, at most. Without zeros there are 8,000 for each."""

_ZEROS_BYTES: Final = 4096
"""That a small model may have more."""

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True)
class OpenedLeaf:
    """One leaf; see :mod:`.momentum`.

    Attributes:
        number: of the leaf.
        before, after: its elements at the beginning and at the end of the step, as bytes.
        path_before, path_after: siblings.
    """

    number: int
    before: bytes
    after: bytes
    path_before: tuple[bytes, ...]
    path_after: tuple[bytes, ...]


@dataclass(frozen=True, eq=False)
class Opening:
    """An answer to a challenge.

    Attributes:
        step: that is audited.
        leaves: in ascending order.
        signs: of the momentum before, one per tensor and shaped as it, int8: -1, 0 or 1.
    """

    step: int
    leaves: tuple[OpenedLeaf, ...]
    signs: tuple[Tensor, ...]


def make_opening(step: int, numbers: Sequence[int], before: Snapshot, after: Snapshot) -> Opening:
    """Opens leaves.

    Args:
        step: that is audited.
        numbers: of the leaves.
        before, after: snapshots at its beginning and at its end.
    """
    leaves = tuple(
        OpenedLeaf(n, bytes(before.leaf(n)), bytes(after.leaf(n)), before.path(n), after.path(n))
        for n in sorted(set(numbers))
    )
    return Opening(step, leaves, tuple(before.signs()))


def max_opening_bytes(plan: TilePlan, leaves: int = MAX_LEAVES) -> int:
    """The most bytes that an opening of so many leaves has."""
    table = leaves_of(plan)
    largest = sorted((table.size(table.first[b]) for b in range(len(plan.batches))), reverse=True)[:1]
    of_leaf = 10 + 2 * (sum(largest) + table.depth * _HASH)
    return 64 + leaves * of_leaf + _signs_bytes(plan) + _max_zeros(plan)


def encode_opening(opening: Opening, plan: TilePlan) -> bytes:
    """As bytes.

    Raises:
        ConfigurationError: it is too large; so much of the momentum is 0 without any order.
    """
    writer = Writer()
    writer.push_u8(_VERSION)
    writer.push_u32(opening.step)
    writer.push_varint(len(opening.leaves))
    for leaf in opening.leaves:
        writer.push_varint(leaf.number)
        for part in (leaf.before, leaf.after, *leaf.path_before, *leaf.path_after):
            writer.push_bytes(part)
    zeros = []
    for signs in opening.signs:
        flat = signs.reshape(-1).numpy()
        writer.push_bytes(np.packbits(flat < 0, bitorder="little").tobytes())
        zeros.append(np.packbits(flat == 0, bitorder="little").tobytes())
    packed = zlib.compress(b"".join(zeros), 1)
    if len(packed) > _max_zeros(plan):
        raise ConfigurationError(
            f"the zeros of the momentum take {len(packed)} bytes, an opening has room for {_max_zeros(plan)}",
            name="signs",
        )
    writer.push_blob(packed)
    return writer.finish()


def decode_opening(data: Bytes, plan: TilePlan) -> Opening:
    """Reads what a stranger sent.

    Raises:
        ProtocolError: it is no opening of a momentum of this plan.
    """
    if len(data) > max_opening_bytes(plan):
        raise ProtocolError(f"an opening has at most {max_opening_bytes(plan)} bytes, not {len(data)}")
    table = leaves_of(plan)
    reader = Reader(data)
    if reader.pull_u8() != _VERSION:
        raise ProtocolError("an opening of another version", offset=0)
    step = reader.pull_u32()
    opened: list[OpenedLeaf] = []
    for _ in range(reader.pull_length(limit=MAX_LEAVES)):
        number = reader.pull_varint(32)
        if number >= len(table) or (opened and number <= opened[-1].number):
            raise ProtocolError("leaves are not in ascending order, or there are not so many", field="leaves")
        before, after = (bytes(reader.pull_bytes(table.size(number))) for _ in range(2))
        paths = [tuple(bytes(reader.pull_bytes(_HASH)) for _ in range(table.depth)) for _ in range(2)]
        opened.append(OpenedLeaf(number, before, after, *paths))
    negative = reader.pull_bytes(_signs_bytes(plan))
    zeros = _unpacked(reader.pull_blob(limit=_max_zeros(plan)), _signs_bytes(plan))
    reader.expect_end()
    return Opening(step, tuple(opened), _signs(negative, zeros, plan))


# -- inside ------------------------------------------------------------------------------------------------------------


def _sizes(plan: TilePlan) -> list[int]:
    """Elements of each tensor."""
    return [torch.Size(spec.shape).numel() for spec in plan.specs]


def _signs_bytes(plan: TilePlan) -> int:
    return sum(-(-size // 8) for size in _sizes(plan))


def _max_zeros(plan: TilePlan) -> int:
    return sum(_sizes(plan)) // _ZEROS_SHARE + _ZEROS_BYTES


def _unpacked(data: Bytes, size: int) -> bytes:
    """``data`` inflated to exactly ``size`` bytes, and not to more."""
    inflater = zlib.decompressobj()
    try:
        raw = inflater.decompress(data, size + 1)
    except zlib.error as error:
        raise ProtocolError("zeros are not in the form of zlib", field="zeros") from error
    if len(raw) != size or not inflater.eof or inflater.unused_data:
        raise ProtocolError("zeros are not those of the model", field="zeros")
    return raw


def _signs(negative: Bytes, zeros: Bytes, plan: TilePlan) -> tuple[Tensor, ...]:
    found, start = [], 0
    for spec, size in zip(plan.specs, _sizes(plan), strict=True):
        stop = start + -(-size // 8)
        below, none = (
            np.unpackbits(np.frombuffer(bits[start:stop], np.uint8), count=size, bitorder="little").view(np.int8)
            for bits in (memoryview(negative), memoryview(zeros))
        )
        found.append(torch.from_numpy((1 - 2 * below) * (1 - none)).reshape(spec.shape))
        start = stop
    return tuple(found)
