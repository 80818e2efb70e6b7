"""Where everything lies in a result, if it is known which tensors are present in it, and of which kind the values are.

Then only the data vary. The plan determines all else (shapes, kinds, lengths), and so where the data are. A
:class:`WireLayout` is that knowledge, so that a result is taken apart and put together by a few operations on all
tensors instead of some fifty on each. It is spelled by the same functions as any result:
:mod:`~distro_optim.compress.wire`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from operator import itemgetter
from typing import Any, Final

from ..buffer import Writer
from .plan import Batch, TilePlan
from .wire import MAX_SIDE, encode_shape
from .wire_tensor import KIND_BOOL, KIND_UINT8, VALUE_KINDS, data_size, encode_tensor_head, index_width

__all__ = ["BatchLayout", "KnownLayouts", "Pick", "WireLayout"]

Pick = Callable[[Any], tuple[Any, ...]]
"""Cuts a buffer into parts. One call: a loop in Python would cost more than copying what is cut."""

MAX_INCOMPLETE: Final = 4
"""Chosen arbitrarily: a peer is silent about the same tensors most of the time, those that are frozen or not in use."""


@dataclass(frozen=True)
class BatchLayout:
    """Where the data of one batch of the plan lie. All picks are of the present tensors, in the order of their tiles.

    Attributes:
        quantized: values are signs.
        rows: the tiles of the present tensors.
        index_dtype: numpy's name of an index as it travels.
        from_index: the indices of every tensor, of the results.
        from_value: its values.
        into_index: the indices of every tensor, of the indices of the batch as bytes.
        into_value: its values, of those of the batch: of their bytes, or, if they are signs that are ``padded``, of the
            unpacked ones.
        index_segments: which of the layout's segments the indices of every tensor are.
        value_segments: which its values are.
        padded: the packed signs of a tensor do not fill their last byte, so those of a batch are not a single run.
        from_bits: the signs of every tensor, of the bits in all of their bytes.
    """

    batch: Batch
    quantized: bool
    rows: tuple[slice, ...]
    index_dtype: str
    from_index: Pick
    from_value: Pick
    into_index: Pick
    into_value: Pick
    index_segments: tuple[int, ...]
    value_segments: tuple[int, ...]
    padded: bool
    from_bits: Pick

    @property
    def complete(self) -> bool:
        """Whether all tensors of the batch are present."""
        return len(self.rows) == len(self.batch.ranges)

    @property
    def tiles(self) -> int:
        """Number of tiles of the present tensors."""
        return sum(run.stop - run.start for run in self.rows)


@dataclass(frozen=True)
class WireLayout:
    """The results of a download, from behind its head to its end.

    Attributes:
        quantized: values are signs.
        present: for each tensor, whether something is said about it.
        size: in bytes.
        frame: all bytes that are not data, as the runs between the segments: one run more than segments.
        frame_bytes: the same, joined.
        pick_frame: these runs, of the results.
        pick_data: the segments, of the results: indices and values of every tensor in turn, as they are committed to.
    """

    quantized: bool
    present: tuple[bool, ...]
    size: int
    frame: tuple[bytes, ...]
    frame_bytes: bytes
    pick_frame: Pick
    pick_data: Pick
    batches: tuple[BatchLayout, ...]


class KnownLayouts:
    """Layouts on one plan: of complete results, and of the incomplete ones that were asked for last.

    Only :meth:`of` adds any, so strangers cannot make us forget one. Safe to use in several threads.
    """

    def __init__(self, plan: TilePlan) -> None:
        self._plan = plan
        everything = tuple(home is not None for home in plan.home)
        made = [_make_layout(plan, everything, quantized=quantized) for quantized in (True, False)]
        self._complete = tuple(layout for layout in made if layout is not None)
        self._incomplete: tuple[WireLayout, ...] = ()

    def complete(self, *, quantized: bool) -> WireLayout | None:
        """Of results about all tensors; None if the wire cannot hold them."""
        return next((layout for layout in self._complete if layout.quantized == quantized), None)

    def of(self, present: tuple[bool, ...], *, quantized: bool) -> WireLayout | None:
        """Of results in which these tensors are present; None if the wire cannot hold them."""
        for layout in (*self._complete, *self._incomplete):
            if layout.quantized == quantized and layout.present == present:
                return layout
        made = _make_layout(self._plan, present, quantized=quantized)
        if made is not None:
            self._incomplete = (made, *self._incomplete[: MAX_INCOMPLETE - 1])
        return made

    def of_results(self, results: memoryview) -> WireLayout | None:
        """That of ``results``, all that a download holds behind its head; None if it is not known."""
        for layout in (*self._complete, *self._incomplete):
            # The length first: nothing is copied for what cannot fit.
            if layout.size == len(results) and b"".join(layout.pick_frame(results)) == layout.frame_bytes:
                return layout
        return None


def _make_layout(plan: TilePlan, present: tuple[bool, ...], *, quantized: bool) -> WireLayout | None:
    if any(max(grid.coded_shape) > MAX_SIDE for grid in plan.grids):
        return None
    if not quantized and any(spec.dtype not in VALUE_KINDS for spec in plan.specs):
        return None
    if any(here and home is None for here, home in zip(present, plan.home, strict=True)):
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

    for spec, grid, k, here in zip(plan.specs, plan.grids, plan.topk, present, strict=True):
        shape, kept = grid.coded_shape, k if here else 0
        rows = grid.tile_counts
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
        quantized=quantized,
        present=present,
        size=position,
        frame=tuple(frame),
        frame_bytes=b"".join(frame),
        pick_frame=_pick(frame_cuts),
        pick_data=_pick(data_cuts[:-1]),
        batches=tuple(_batch_layout(batch, present, data_cuts, quantized) for batch in plan.batches),
    )


def _batch_layout(batch: Batch, present: tuple[bool, ...], data_cuts: Sequence[slice], quantized: bool) -> BatchLayout:
    numbers = [number for number in batch.ranges if present[number]]
    rows = [slice(*batch.ranges[number]) for number in numbers]
    counts = [(run.stop - run.start) * batch.k for run in rows]
    width = index_width(batch.tile_size)
    # Of all tensors, because they are packed all at once if they can be.
    padded = any((stop - start) * batch.k % 8 for start, stop in batch.ranges.values())
    starts = [run.start for run in _runs(8 * data_size(count, KIND_BOOL) for count in counts)]

    def of_batch(size: Fraction) -> Pick:
        """The present tensors in a buffer of the whole batch with elements of ``size``."""
        factor = batch.k * size
        return _pick([slice(int(run.start * factor), int(run.stop * factor)) for run in rows])

    value_size = Fraction(batch.value_dtype.itemsize)
    if quantized:
        value_size = Fraction(1) if padded else Fraction(1, 8)
    return BatchLayout(
        batch=batch,
        quantized=quantized,
        rows=tuple(rows),
        index_dtype=f"<u{width}",
        from_index=_pick([data_cuts[2 * number] for number in numbers]),
        from_value=_pick([data_cuts[2 * number + 1] for number in numbers]),
        into_index=of_batch(Fraction(width)),
        into_value=of_batch(value_size),
        index_segments=tuple(2 * number for number in numbers),
        value_segments=tuple(2 * number + 1 for number in numbers),
        padded=padded,
        from_bits=_pick([slice(start, start + count) for start, count in zip(starts, counts, strict=True)]),
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
