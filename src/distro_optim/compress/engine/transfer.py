"""Updates between main memory and devices: one buffer and one copy for all contributors of a step.

In main memory an update is as it travels: nobody but the thread that trains touches a device. That thread packs all of
them side by side, in positions of 16 bits where tiles allow it, into memory from which a GPU can copy by itself
(pinned), and unpacks them on the other side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from ..plan import Batch, TilePlan
from ..update import CompressedUpdate

__all__ = ["Uploads", "downloaded"]

_ALIGNMENT: Final = 64
"""Bytes, of each part of the buffer: more than any element type wants."""

_Places = list[tuple[torch.dtype, torch.Size, int]]
"""Of each part: its type, its shape, and where in the buffer it begins."""


class Uploads:
    """The way of updates to one device, in buffers that are used again. Belongs to the thread that trains.

    Args:
        plan: of the updates.
        device: whose batches are uploaded.
    """

    def __init__(self, plan: TilePlan, device: torch.device) -> None:
        self._device = device
        self._batches = {n: batch for n, batch in enumerate(plan.batches) if batch.device == device}
        self._pinned = device.type == "cuda"
        self._buffer = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._copied: torch.cuda.Event | None = None

    def upload(self, updates: Sequence[CompressedUpdate]) -> dict[int, list[tuple[Tensor, Tensor]]]:
        """Indices and values of the updates, all of them in main memory, on the device.

        Returns:
            by batch, of each update: ``(tiles, k) int32`` and ``(tiles, k)`` of the type that it had.
        """
        places: _Places = []
        parts: list[list[Tensor]] = []
        size = 0
        for number, batch in self._batches.items():
            for rows, dtype in (
                ([u.index[number] for u in updates], _narrow(batch)),
                *(([u.value[number]], u.value[number].dtype) for u in updates),
            ):
                shape = torch.Size((len(rows), *rows[0].shape))
                places.append((dtype, shape, size))
                parts.append(rows)
                size += -(-shape.numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        here = self._room(size)
        for (dtype, shape, start), rows in zip(places, parts, strict=True):
            part = _part(here, dtype, shape, start)
            for row, into in zip(rows, part, strict=True):
                into.copy_(row)
        there = here.to(self._device, non_blocking=self._pinned)
        if self._pinned:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(self._device))
        elif there.data_ptr() == here.data_ptr():
            there = here.clone()
        arrived = iter(_part(there, dtype, shape, start) for dtype, shape, start in places)
        unpacked = {}
        for number, batch in self._batches.items():
            index = _widened(next(arrived), batch)
            unpacked[number] = [(index[n], next(arrived)[0]) for n in range(len(updates))]
        return unpacked

    def _room(self, size: int) -> Tensor:
        if self._copied is not None:
            self._copied.synchronize()  # the buffer may still be read
            self._copied = None
        if self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=self._pinned)
        return self._buffer[:size]


def _narrow(batch: Batch) -> torch.dtype:
    # A position that int16 cannot hold comes out negative, and is put right again.
    return torch.int16 if batch.tile_size <= 1 << 16 else torch.int32


def _widened(index: Tensor, batch: Batch) -> Tensor:
    if index.dtype == torch.int32:
        return index
    wide = index.to(torch.int32)
    return wide if batch.tile_size <= 1 << 15 else wide.bitwise_and_(0xFFFF)


def _part(buffer: Tensor, dtype: torch.dtype, shape: torch.Size, start: int) -> Tensor:
    return buffer[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)


def downloaded(update: CompressedUpdate) -> CompressedUpdate:
    """The update in main memory; itself, if it is there. Waits until it is complete."""
    present = update.present
    tensors = (*update.index, *update.value)
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return update
    on_gpu = [tensor for tensor in tensors if tensor.is_cuda]
    copies = [
        torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
        if tensor.is_cuda
        else tensor.cpu()
        for tensor in tensors
    ]
    for device in {tensor.device for tensor in on_gpu}:
        torch.cuda.current_stream(device).synchronize()
    count = len(update.index)
    return CompressedUpdate(update.plan, tuple(copies[:count]), tuple(copies[count:]), present)
