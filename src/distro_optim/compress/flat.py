"""A contribution as bytes for peers that are known to share the plan: no shapes, no headers per tensor.

=====================  =================================================================================
bytes                  meaning
=====================  =================================================================================
1                      format, 1
1                      1 if values are signs, else 0
32                     the plan's ``layout``
``ceil(tensors / 8)``  which tensors are present, one bit each, as in :mod:`~distro_optim.compress.sign`
per batch              indices of the present tensors: 1, 2 or 4 bytes each, little endian
per batch              their values: signs packed over the whole batch, or raw elements, little endian
=====================  =================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..buffer import Reader, Writer
from ..errors import ProtocolError
from .plan import Batch, TilePlan
from .sign import pack_signs, unpack_signs
from .update import CompressedUpdate

__all__ = ["decode_flat", "encode_flat", "flat_size", "max_flat_size"]

_FORMAT: Final = 1
_LAYOUT_SIZE: Final = 32


def _index_dtype(tile_size: int) -> npt.DTypeLike:
    return "u1" if tile_size <= 1 << 8 else "<u2" if tile_size <= 1 << 16 else "<u4"


def _data_sizes(batch: Batch, rows: int, quantized: bool) -> tuple[int, int]:
    """Bytes of the indices and of the values of ``rows`` tiles."""
    count = rows * batch.k
    index_size = count * np.dtype(_index_dtype(batch.tile_size)).itemsize
    return index_size, -(-count // 8) if quantized else count * batch.value_dtype.itemsize


def flat_size(plan: TilePlan, present: Sequence[bool], *, quantized: bool) -> int:
    """Bytes of an update in which these tensors are present."""
    head = 2 + _LAYOUT_SIZE + -(-len(plan) // 8)
    return head + sum(sum(_data_sizes(b, _count(_present_rows(b, present)), quantized)) for b in plan.batches)


def max_flat_size(plan: TilePlan, *, quantized: bool) -> int:
    """Bytes of an update in which every tensor is present: no update is longer."""
    return flat_size(plan, (True,) * len(plan), quantized=quantized)


def _count(rows: list[slice]) -> int:
    return sum(r.stop - r.start for r in rows)


def _present_rows(batch: Batch, present: Sequence[bool]) -> list[slice]:
    return [slice(start, stop) for number, (start, stop) in batch.ranges.items() if present[number]]


def _gather(data: Tensor, rows: list[slice], batch: Batch) -> Tensor:
    if len(rows) == len(batch.ranges):
        return data
    return torch.cat([data[r] for r in rows]) if rows else data[:0]


def encode_flat(update: CompressedUpdate) -> bytes:
    """``update`` as bytes."""
    writer = Writer()
    writer.push_u8(_FORMAT)
    writer.push_bool(update.quantized)
    writer.push_bytes(update.plan.layout)
    writer.push_bytes(pack_signs(torch.tensor(update.present, dtype=torch.bool, device="cpu")))
    for batch, index, value in zip(update.plan.batches, update.index, update.value, strict=True):
        rows = _present_rows(batch, update.present)
        indices = _gather(index, rows, batch).cpu().numpy()
        writer.push_bytes(indices.astype(_index_dtype(batch.tile_size)).tobytes())
        values = _gather(value, rows, batch)
        if update.quantized:
            writer.push_bytes(pack_signs(values))
        else:
            writer.push_bytes(values.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return writer.finish()


def decode_flat(data: bytes | bytearray | memoryview, plan: TilePlan, *, check: bool = True) -> CompressedUpdate:
    """The inverse of :func:`encode_flat`.

    Args:
        check: verify indices and values too (:meth:`CompressedUpdate.check`); without it only for trusted peers.

    Raises:
        ProtocolError: the bytes are not an update on ``plan``.
    """
    reader = Reader(data)
    if (version := reader.pull_u8()) != _FORMAT:
        raise ProtocolError(f"the update has format {version}, expected format {_FORMAT}", offset=0)
    quantized = reader.pull_bool()
    if bytes(reader.pull_bytes(_LAYOUT_SIZE)) != plan.layout:
        raise ProtocolError("the update was made for another model, tiling, top-k or arithmetic", field="layout")
    bits = unpack_signs(reader.pull_bytes(-(-len(plan) // 8)), len(plan))
    present: tuple[bool, ...] = tuple(bits.tolist())

    # All sizes are known now: compare before anything is allocated for the batches.
    rows = [_present_rows(batch, present) for batch in plan.batches]
    sizes = [_data_sizes(batch, _count(held), quantized) for batch, held in zip(plan.batches, rows, strict=True)]
    if sum(map(sum, sizes)) != reader.remaining:
        raise ProtocolError(f"{sum(map(sum, sizes))} bytes of data are due, got {reader.remaining}", offset=reader.pos)

    update = CompressedUpdate.empty(plan, quantized=quantized)
    for number, (batch, held, (index_size, value_size)) in enumerate(zip(plan.batches, rows, sizes, strict=True)):
        raw = np.frombuffer(reader.pull_bytes(index_size), dtype=_index_dtype(batch.tile_size))
        packed = reader.pull_bytes(value_size)
        index = torch.from_numpy(raw.astype(np.int32)).view(-1, batch.k)
        if quantized:
            value = unpack_signs(packed, index.numel()).view(-1, batch.k)
        else:
            # frombuffer takes no empty buffer.
            kind = batch.value_dtype
            value = (
                torch.frombuffer(bytearray(packed), dtype=kind)
                if value_size
                else torch.empty(0, dtype=kind, device="cpu")
            )
            value = value.view(-1, batch.k)
        position = 0
        for r in held:
            stop = position + r.stop - r.start
            update.index[number][r].copy_(index[position:stop])
            update.value[number][r].copy_(value[position:stop])
            position = stop
    update = CompressedUpdate(plan, update.index, update.value, present)
    if check:
        update.check()
    return update
