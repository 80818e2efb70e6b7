"""Where everything lies in a complete result: one in which every tensor is present, with all its coefficients.

Of a complete result only the data vary. Its plan and its kind of value determine all else (shapes, kinds, lengths), and
so where the data are. A :class:`WireLayout` is that knowledge, made once per plan, so that a result is taken apart and
put together by a few operations on all tensors instead of some fifty on each. What is complete is spelled by the
same functions as any result: :mod:`~distro_optim.compress.wire`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

from ..buffer import Writer
from .plan import Batch, TilePlan
from .wire import MAX_SIDE, encode_shape
from .wire_tensor import KIND_BOOL, KIND_UINT8, VALUE_KINDS, data_size, encode_tensor_head, index_width

__all__ = ["BatchLayout", "Pick", "WireLayout", "signs_layout", "values_layout"]

Pick = Callable[[Any], tuple[Any, ...]]
"""Cuts a buffer into parts. One call: a loop in Python would cost more than copying what is cut."""


@dataclass(frozen=True)
class BatchLayout:
    """Where the data of one batch of the plan lie. All picks are in the order of the batch's tiles.

    Attributes:
        quantized: values are signs.
        index_dtype: numpy's name of an index as it travels.
        from_index: the indices of every tensor, of the results.
        from_value: its values.
        into_index: the indices of every tensor, of the indices of the batch as bytes.
        into_value: its values, of those of the batch: of their bytes, or, if they are signs that are ``padded``, of the
            unpacked ones.
        index_segments: which of the layout's segments the indices of every tensor are.
        value_segments: which its values are.
        padded: the packed signs of a tensor do not end with their last byte. Then those of a batch are no single run.
        from_bits: the signs of every tensor, of the bits in all of its bytes.
    """

    batch: Batch
    quantized: bool
    index_dtype: str
    from_index: Pick
    from_value: Pick
    into_index: Pick
    into_value: Pick
    index_segments: tuple[int, ...]
    value_segments: tuple[int, ...]
    padded: bool
    from_bits: Pick


@dataclass(frozen=True)
class WireLayout:
    """The results of a complete download, from behind its head to its end.

    Attributes:
        size: in bytes.
        present: of every complete update.
        frame: all bytes that are no data, as the runs between the segments: one run more than segments.
        frame_bytes: the same, joined.
        pick_frame: these runs, of the results.
        pick_data: the segments, of the results: indices and values of every tensor in turn, as they are committed to.
    """

    size: int
    present: tuple[bool, ...]
    frame: tuple[bytes, ...]
    frame_bytes: bytes
    pick_frame: Pick
    pick_data: Pick
    batches: tuple[BatchLayout, ...]


def signs_layout(plan: TilePlan) -> WireLayout | None:
    """Of complete results whose values are signs; None if the wire cannot hold them."""
    return _make_layout(plan, quantized=True)


def values_layout(plan: TilePlan) -> WireLayout | None:
    """Of complete results whose values are of their tensors' types; None if the wire cannot hold them."""
    return _make_layout(plan, quantized=False)


def _make_layout(plan: TilePlan, *, quantized: bool) -> WireLayout | None:
    if any(max(grid.coded_shape) > MAX_SIDE for grid in plan.grids):
        return None
    if not quantized and any(spec.dtype not in VALUE_KINDS for spec in plan.specs):
        return None
    # A plan without an element has no batch to say that its values are signs.
    signs = quantized and bool(plan.batches)
    frame: list[bytes] = []
    frame_cuts: list[slice] = []
    data_cuts: list[slice] = []
    writer, position = Writer(), 0

    def end_run(size: int) -> None:
        """The frame goes on behind ``size`` bytes of data."""
        nonlocal writer, position
        run = writer.finish()
        frame.append(run)
        frame_cuts.append(slice(position, position + len(run)))
        data_cuts.append(slice(position + len(run), position + len(run) + size))
        writer, position = Writer(), position + len(run) + size

    for spec, grid, k, home in zip(plan.specs, plan.grids, plan.topk, plan.home, strict=True):
        shape, kept = grid.coded_shape, 0 if home is None else k
        rows = shape[:-1] if len(shape) == 2 else shape[:-2]
        # A plan's tiles are too small for indices that travel as int64.
        index = (*rows, kept * index_width(grid.tile_size)), KIND_UINT8
        value = (*rows, kept), KIND_BOOL if signs else VALUE_KINDS[spec.dtype]
        for dims, kind in (index, value):
            size = data_size(math.prod(dims), kind)
            encode_tensor_head(writer, dims, kind, size)
            end_run(size)
        encode_shape(writer, shape, grid.tile_size)
    end_run(0)
    return WireLayout(
        size=position,
        present=tuple(home is not None for home in plan.home),
        frame=tuple(frame),
        frame_bytes=b"".join(frame),
        pick_frame=_pick(frame_cuts),
        pick_data=_pick(data_cuts[:-1]),
        batches=tuple(_batch_layout(batch, data_cuts, quantized) for batch in plan.batches),
    )


def _batch_layout(batch: Batch, data_cuts: Sequence[slice], quantized: bool) -> BatchLayout:
    numbers = tuple(batch.ranges)
    counts = [(stop - start) * batch.k for start, stop in batch.ranges.values()]
    width = index_width(batch.tile_size)
    packed = [data_size(count, KIND_BOOL) for count in counts]
    padded = any(count % 8 for count in counts)
    bits = _runs(8 * size for size in packed)
    sizes = (counts if padded else packed) if quantized else [count * batch.value_dtype.itemsize for count in counts]
    return BatchLayout(
        batch=batch,
        quantized=quantized,
        index_dtype=f"<u{width}",
        from_index=_pick([data_cuts[2 * number] for number in numbers]),
        from_value=_pick([data_cuts[2 * number + 1] for number in numbers]),
        into_index=_pick(_runs(count * width for count in counts)),
        into_value=_pick(_runs(sizes)),
        index_segments=tuple(2 * number for number in numbers),
        value_segments=tuple(2 * number + 1 for number in numbers),
        padded=padded,
        from_bits=_pick([slice(run.start, run.start + count) for run, count in zip(bits, counts, strict=True)]),
    )


def _runs(sizes: Iterable[int]) -> list[slice]:
    """Neighbouring runs of these sizes."""
    runs, start = [], 0
    for size in sizes:
        runs.append(slice(start, start + size))
        start += size
    return runs


def _pick(cuts: Sequence[slice]) -> Pick:
    # An itemgetter of one item gives that item, not a tuple of it, and there is none of no item.
    return itemgetter(*cuts) if len(cuts) > 1 else partial(_pick_few, tuple(cuts))


def _pick_few(cuts: tuple[slice, ...], buffer: Any) -> tuple[Any, ...]:
    return tuple(buffer[cut] for cut in cuts)
