"""Results, all tensors at once: a shortcut past :mod:`~distro_optim.compress.wire`, never another rule.

There is a result from every peer in every round. Tensor by tensor, most of the time goes into the interpreter, which
the training thread wants as well. Here a result is compared with the
:mod:`layouts <distro_optim.compress.wire_layout>` of its plan and then handled batch by batch.

What has no known layout, or is wrong in any way, is None here: the general codec decides about it and says why.
Everything else is, bit for bit, what the general codec makes of it.

Nothing is allocated before the length of the input is known to be that of a layout. Then a copy of its frame, of its
data, and what :data:`~distro_optim.compress.wire.EXPANSION` promises.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..buffer import Reader, Writer
from .distinct import has_repeats
from .plan import Batch, TilePlan
from .update import CompressedUpdate
from .wire import decode_download_head, encode_download_head
from .wire_layout import BatchLayout, KnownLayouts, WireLayout
from .wire_tensor import Bytes

__all__ = ["BulkDownload", "decode_bulk_download", "encode_bulk_download"]


@dataclass(frozen=True, slots=True)
class _BatchData:
    """What a result says about one batch of the plan, on the CPU.

    Attributes:
        index: of the present tensors, ``(tiles, k)`` unsigned integers of the wire's width.
        value: the same of bool or the batch's ``value_dtype``.
    """

    index: npt.NDArray[Any]
    value: Tensor

    def fits(self, batch: Batch, *, finite: bool) -> bool:
        """Whether :meth:`CompressedUpdate.check` finds nothing in it."""
        return self.index.size == 0 or (
            int(self.index.max()) < batch.tile_size
            and not has_repeats(self.index)
            and (not finite or self.value.dtype == torch.bool or bool(self.value.isfinite().all()))
        )


@dataclass(frozen=True, slots=True)
class BulkDownload:
    """A result with a known layout; :class:`~distro_optim.compress.wire.TransmittableDistroResult` is the general form.

    Attributes:
        step, trainer_nonce, batch_id: as there.
        data: the segments of all tensors, joined.
    """

    step: int
    trainer_nonce: int
    batch_id: tuple[int, int]
    data: bytes
    _plan: TilePlan
    _layout: WireLayout
    _results: memoryview

    def committed_segments(self) -> Iterator[tuple[Bytes, Bytes]]:
        """The bytes that a commitment covers: all in one, because a hash does not see where they are cut."""
        yield self.data, b""

    def to_update(self, *, finite: bool = True) -> CompressedUpdate | None:
        """The update it holds, or None if an index or a value is wrong; ``finite``: as for the general form."""
        index, value = [], []
        for layout in self._layout.batches:
            data = _to_batch(layout, self._results)
            if not data.fits(layout.batch, finite=finite):
                return None
            index.append(_spread(layout, torch.from_numpy(data.index.astype(np.int32))))
            value.append(_spread(layout, data.value))
        return CompressedUpdate(self._plan, tuple(index), tuple(value), self._layout.present)


def decode_bulk_download(data: Bytes, plan: TilePlan) -> BulkDownload | None:
    """Reads a download on ``plan``, or None if its layout is not known.

    Raises:
        ProtocolError: it does not begin as a download does.
    """
    reader = Reader(data)
    step, nonce, batch_id, count = decode_download_head(reader, max_results=max(1, len(plan)))
    if count != len(plan):
        return None
    results = reader.peek()
    layout = plan.derived(KnownLayouts).of_results(results)
    if layout is None:
        return None
    return BulkDownload(step, nonce, batch_id, b"".join(layout.pick_data(results)), plan, layout, results)


def encode_bulk_download(
    update: CompressedUpdate, *, step: int, trainer_nonce: int, batch_id: tuple[int, int]
) -> tuple[bytes, BulkDownload] | None:
    """A download of ``update``, and what :func:`decode_bulk_download` reads in it; None if it has no layout.

    Raises:
        ConfigurationError: a number does not fit its field.
    """
    plan = update.plan
    if not _is_regular(update):
        return None
    layout = plan.derived(KnownLayouts).of(update.present, quantized=update.quantized)
    if layout is None:
        return None
    head = Writer()
    encode_download_head(head, step=step, trainer_nonce=trainer_nonce, batch_id=batch_id, count=len(plan))
    segments: list[Bytes] = [b""] * (len(layout.frame) - 1)
    for batch, index, value in zip(layout.batches, update.index, update.value, strict=True):
        for number, segment in zip(batch.index_segments, _index_segments(batch, index), strict=True):
            segments[number] = segment
        for number, segment in zip(batch.value_segments, _value_segments(batch, value), strict=True):
            segments[number] = segment
    parts: list[Bytes] = [head.finish()] * (2 + 2 * len(segments))
    parts[1::2] = layout.frame
    parts[2::2] = segments
    blob = b"".join(parts)
    results = memoryview(blob)[len(head) :]
    return blob, BulkDownload(step, trainer_nonce, batch_id, b"".join(segments), plan, layout, results)


def _is_regular(update: CompressedUpdate) -> bool:
    """Whether coefficients are laid out as the plan says; a peer that keeps to it makes no others."""
    return all(
        index.shape == value.shape == (batch.tiles, batch.k)
        and value.dtype == (torch.bool if update.quantized else batch.value_dtype)
        for batch, index, value in zip(update.plan.batches, update.index, update.value, strict=True)
    )


def _index_segments(layout: BatchLayout, index: Tensor) -> tuple[Bytes, ...]:
    """``(tiles, k)`` to the bytes of every tensor."""
    narrow = index.detach().cpu().numpy().astype(layout.index_dtype, order="C")
    return layout.into_index(narrow.reshape(-1).view(np.uint8).data)


def _value_segments(layout: BatchLayout, value: Tensor) -> tuple[Bytes, ...]:
    """``(tiles, k)`` to the bytes of every tensor."""
    flat = value.detach().cpu().reshape(-1)
    if value.dtype != torch.bool:
        return layout.into_value(flat.view(torch.uint8).numpy().data)
    signs = flat.numpy()
    if layout.padded:
        return tuple(np.packbits(part, bitorder="little").tobytes() for part in layout.into_value(signs))
    return layout.into_value(np.packbits(signs, bitorder="little").data)


def _to_batch(layout: BatchLayout, results: memoryview) -> _BatchData:
    """The inverse of these two, in memory of its own; without the rows of absent tensors."""
    shape = layout.tiles, layout.batch.k
    index = np.frombuffer(b"".join(layout.from_index(results)), dtype=layout.index_dtype).reshape(shape)
    packed = bytearray().join(layout.from_value(results))
    if not packed:  # frombuffer takes no empty buffer
        kind = torch.bool if layout.quantized else layout.batch.value_dtype
        return _BatchData(index, torch.empty(shape, dtype=kind, device="cpu"))
    if not layout.quantized:
        return _BatchData(index, torch.frombuffer(packed, dtype=layout.batch.value_dtype).view(shape))
    signs = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), bitorder="little")
    if layout.padded:
        signs = np.concatenate(layout.from_bits(signs))
    return _BatchData(index, torch.from_numpy(signs.view(np.bool_).reshape(shape)))


def _spread(layout: BatchLayout, rows: Tensor) -> Tensor:
    """The rows of the present tensors, with rows of zeros for the absent ones."""
    if not layout.complete:
        present, position = rows, 0
        rows = torch.zeros(layout.batch.tiles, layout.batch.k, dtype=present.dtype, device="cpu")
        for run in layout.rows:
            stop = position + run.stop - run.start
            rows[run] = present[position:stop]
            position = stop
    return rows
