"""What the coefficients of all contributors mean together: their means, tile by tile, in the order of Psyche's sums.

Only what somebody sent is kept. Each tile has the columns that hold any of it, and each column its running sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..extraction import joined
from ..merging import presence_of
from ..plan import Batch, Block
from ..profile import Profile
from ..sign import signs_to_values
from ..update import CompressedUpdate
from .basis import RUNNING_SUMS, SMALL_PRODUCT, running_sums
from .halves import Halves

__all__ = ["Prepared", "Preparing", "in_turn"]

_SUM_BITS: Final = 2
"""To number them."""

_UNIT_ROUNDOFF: Final = 2.0**-24
"""Of float32."""

_UNDERFLOW: Final = 1e-35
"""Added to bounds on errors, for terms that are too small for relative ones. Chosen arbitrarily, far above them."""

_SMALL_COEFFICIENT: Final = 1e-20
"""From here on, products with the basis, whose least elements are about 1e-9, are exact in float32: it does not matter
whether their sums are fused with them. Chosen arbitrarily, far above where it would matter."""

_SLACK: Final = 1.02
"""For the roundings of the bound itself and of what stands in a column."""

_ORDINARY: Final = 1e30
"""Sums of coefficients below this are neither infinite nor NaN, and the bounds on their errors are numbers."""


class Preparing:
    """Makes :class:`Prepared` of updates, for one batch of a plan.

    Args:
        number: of the batch in the plan.
        batch: itself.
        halves: of its parameters' dtype.
        largest: the largest product of two elements of the bases.
        rounds: whether sums are rounded to the dtype of the parameters, as in half precision.
    """

    def __init__(self, number: int, batch: Batch, halves: Halves, *, largest: float, rounds: bool) -> None:
        h, w, device = batch.h, batch.w, batch.device
        self.number = number
        self.batch = batch
        self.longest_sum = w // RUNNING_SUMS + 2 * (RUNNING_SUMS - 1)
        self._rounds = rounds
        self._largest = largest
        self._halves = halves if rounds and batch.profile.by_numpy else None
        # What rounds to 0 or nearly so, for which bounds on relative errors say nothing.
        self._tiny = max(_UNDERFLOW, torch.finfo(batch.value_dtype).tiny)
        self._ordinary = min(_ORDINARY, torch.finfo(batch.value_dtype).max / 2)
        # The places of a tile in the order of its sums: column, running sum and row, in so many bits each.
        self._row_bits, self._column_bits = (h - 1).bit_length(), (w - 1).bit_length()
        position = torch.arange(h * w, device="cpu")
        rows, columns = position // w, position % w
        in_order = (columns << (_SUM_BITS + self._row_bits)) + rows
        in_sums = in_order + (running_sums(h)[rows] << self._row_bits)
        self._order_bits = self._row_bits + _SUM_BITS + self._column_bits
        self._orders = torch.stack([in_sums, in_order]).to(_integers(self._order_bits)).to(device)
        # Tensors whose first, and whose second, product is summed in plain order.
        self._small = [
            {n for n, (start, stop) in batch.ranges.items() if (stop - start) * times * side * side < SMALL_PRODUCT}
            for times, side in ((w, h), (h, w))
        ]
        if self._small[1]:
            self.longest_sum = w

    def prepare(self, blocks: Sequence[Block], updates: Sequence[CompressedUpdate]) -> Prepared:
        """What everybody's coefficients mean together, for neighbouring blocks."""
        batch = self.batch
        start, stop = blocks[0].start, blocks[-1].stop
        n = stop - start
        position = joined([u.index[self.number][start:stop] for u in updates], dim=1)
        order = self._orders[0].index_select(0, position.view(-1)).view(position.shape)
        if (small := self.small_products(blocks, 0)) is not None:
            order = torch.where(small.unsqueeze(1), self._orders[1][position], order)
        # Equal positions stay in the order of the contributions.
        number_bits = (position.shape[1] - 1).bit_length()
        kind = _integers(self._order_bits + number_bits)
        number = torch.arange(position.shape[1], dtype=kind, device=batch.device)
        packed = _sorted_rows((order.to(kind) << number_bits) + number, batch.profile)
        by = packed & ((1 << number_bits) - 1)
        kind = _integers(self._order_bits + n.bit_length())
        tile = torch.arange(n, dtype=kind, device=batch.device).unsqueeze(1)
        key = ((packed >> number_bits).to(kind) + (tile << self._order_bits)).view(-1)
        firsts = _beginnings(key, batch.profile)
        mean = self._means(blocks, updates, by.long(), firsts)
        if len(firsts) - 1 < len(key):
            key = key.index_select(0, firsts[:-1])
        return self._sums(blocks, key, mean)

    def _means(
        self, blocks: Sequence[Block], updates: Sequence[CompressedUpdate], by: Tensor, firsts: Tensor
    ) -> Tensor:
        """What is the mean at each position that somebody named, ``(u,)``.

        Args:
            blocks: neighbours.
            updates: of all contributors.
            by: ``(n, m) int64``, in which order their coefficients come.
            firsts: ``(u + 1,)``, where in this order each position begins.
        """
        batch, dtype = self.batch, self.batch.value_dtype
        values = [u.value[self.number][blocks[0].start : blocks[-1].stop] for u in updates]
        if any(v.dtype != values[0].dtype for v in values):
            values = [signs_to_values(v, dtype) if v.dtype == torch.bool else v for v in values]
        value = joined(values, dim=1).gather(1, by)
        signs = value.dtype == torch.bool
        value = signs_to_values(value, batch.compute_dtype) if signs else value.to(dtype).to(batch.compute_dtype)
        weights = [presence_of(batch, [block], updates) for block in blocks]
        silent = any(weight is not None for weight in weights)
        if len(firsts) - 1 == value.numel() and not silent:
            return value.view(-1)
        every = torch.arange(value.numel(), dtype=torch.int32, device=value.device)
        if silent:
            weight = torch.cat(
                [
                    value.new_ones(block.tiles, by.shape[1]) if weight is None else weight
                    for block, weight in zip(blocks, weights, strict=True)
                ]
            ).gather(1, by)
            pairs = torch.stack([torch.where(weight > 0, value, 0), weight], dim=2).view(-1, 2)
            total, count = in_turn(pairs, every, firsts[:-1]).to(dtype).unbind(1)
        else:
            total = in_turn(value.view(-1, 1), every, firsts[:-1]).to(dtype).squeeze(1)
            count = firsts.diff().to(dtype)
        return (total / count.clamp_(min=1)).to(batch.compute_dtype)

    def _sums(self, blocks: Sequence[Block], key: Tensor, mean: Tensor) -> Prepared:
        """Which coefficients are added up to what.

        Args:
            blocks: neighbours.
            key: ``(u,)``, ascending: tile, column, running sum and row of each coefficient.
            mean: ``(u,)``, the coefficients.
        """
        start, n = blocks[0].start, blocks[-1].stop - blocks[0].start
        sums = key >> self._row_bits
        first = _beginnings(sums, self.batch.profile)
        columns = sums.index_select(0, first[:-1]) >> _SUM_BITS
        begin = _beginnings(columns, self.batch.profile)
        columns = columns.index_select(0, begin[:-1])
        counts = torch.bincount(columns >> self._column_bits, minlength=n)
        slots = int(counts.max())
        slot = torch.arange(slots, device=key.device)
        counts = counts.unsqueeze(1)
        at = counts.cumsum(0) - counts + torch.minimum(slot, counts)
        second = begin[at]  # an empty slot begins where the next one does
        # Of each block by itself.
        edges = [b.start - start for b in blocks]
        sums_before = [*second[edges, 0].tolist(), len(first) - 1]
        entries_before = first[sums_before].tolist()
        for number, (block, before) in enumerate(zip(blocks, sums_before, strict=False)):
            second[edges[number] : edges[number] + block.tiles] -= before
            first[before : sums_before[number + 1]] -= entries_before[number]
        spans = list(zip(sums_before, sums_before[1:], entries_before, entries_before[1:], strict=False))
        most = max(max(b.tiles * slots, end - entry) for b, (_, _, entry, end) in zip(blocks, spans, strict=True))
        columns = torch.cat([columns & ((1 << self._column_bits) - 1), columns.new_zeros(1)])
        magnitude = mean.abs()
        # Ours, and Psyche's: what is added to 0 is not rounded, nor are products.
        roundings = slots - 1 + min(slots - 1, self.longest_sum)
        size = torch.zeros(n, dtype=mean.dtype, device=mean.device)
        size.index_add_(0, (key >> self._order_bits).int(), torch.where(magnitude.isfinite(), magnitude, 0))
        # Two more make up for what is neglected and for products with a scale.
        bound, near = (
            torch.where(size > 0, size * (count * _UNIT_ROUNDOFF * _SLACK * self._largest) + self._tiny, 0)
            for count in (roundings + 2, roundings)
        )
        return Prepared(
            start=start,
            slots=slots,
            rows=(key & ((1 << self._row_bits) - 1)).int(),
            mean=mean,
            first=first,
            second=second,
            parts=dict(zip((b.start for b in blocks), spans, strict=True)),
            numbers=torch.arange(most, dtype=torch.int32, device=key.device),
            columns=torch.where(slot < counts, columns[at], 0).int(),
            bound=bound,
            near=self._near(near) if bool(size.max() < self._ordinary) and bool(magnitude.isfinite().all()) else None,
            silent=bool((bound == 0).any()),
            fuses=not self._rounds or not bool(((magnitude < _SMALL_COEFFICIENT) & (magnitude > 0)).any()),
        )

    def _near(self, bound: Tensor) -> npt.NDArray[np.int16] | None:
        """What :attr:`Prepared.near` is, for ordinary numbers."""
        if self._halves is None:
            return None
        return np.where(bound.numpy() > 0, self._halves.up_to(bound), np.int16(-1))

    def small_products(self, blocks: Sequence[Block], which: int) -> Tensor | None:
        """Which tiles ``(n,) bool`` are of tensors whose first or second product is summed in plain order; None: none.

        Args:
            blocks: neighbours.
            which: 0 or 1.
        """
        batch, small = self.batch, self._small[which]
        if not small:
            return None
        mark = torch.zeros(blocks[-1].stop - blocks[0].start, dtype=torch.bool, device=batch.device)
        for block in blocks:
            before = block.start - blocks[0].start
            for piece in block.pieces:
                if piece.param in small:
                    mark[before + piece.block_start : before + piece.block_stop] = True
        return mark


@dataclass(frozen=True)
class Prepared:
    """The coefficients of neighbouring blocks, of each tile in the order in which they are summed.

    In the columns of a tile that have any, its ``slots``, they are added up: first what shares a running sum of a
    column, then these. Tiles with fewer such columns have empty slots at the end.

    Attributes:
        start: number of the first tile.
        slots: the most columns of a tile that have a coefficient.
        rows: ``(u,) int32``, where in its column each coefficient stands.
        mean: ``(u,)`` of the compute dtype, the coefficients.
        first: ``(a,) int32``: with which coefficient of its block each running sum begins.
        second: ``(n, slots) int32``: with which running sum of its block each slot begins.
        parts: for the number of the first tile of each block: its running sums, from one to another, and its
            coefficients.
        numbers: int32 from 0 on, as many as a block has coefficients.
        columns: ``(n, slots) int32``, which columns these are.
        bound: ``(n,)``: how far two sums of the same terms can be apart in each tile.
        near: ``(n,)``: magnitudes, as :class:`Halves` has them, whose sign such a distance may change, -1 where nothing
            was sent; None unless on the CPU, in half precision, and without infinities and NaN.
        silent: in some tile nothing was sent.
        fuses: products of ``mean`` with the basis are exact in float32.
        sums: ``(n, slots, h)`` of the parameters' dtype: what :meth:`columns_summed` gives, rounded; None: not yet.
    """

    start: int
    slots: int
    rows: Tensor
    mean: Tensor
    first: Tensor
    second: Tensor
    parts: dict[int, tuple[int, int, int, int]]
    numbers: Tensor
    columns: Tensor
    bound: Tensor
    near: npt.NDArray[np.int16] | None
    silent: bool
    fuses: bool
    sums: Tensor | None = None

    def tiles_of(self, block: Block) -> slice:
        """Where the tiles of ``block`` are."""
        return slice(block.start - self.start, block.stop - self.start)

    def with_sums(self, down: Tensor, blocks: Sequence[Block], dtype: torch.dtype) -> Prepared:
        """The same with :attr:`sums`, of all blocks: code that is called again and again stays in the cache.

        Args:
            down: ``(h, h)``, the basis of columns.
            blocks: all that this was made for.
            dtype: of the parameters.
        """
        sums = down.new_empty(self.columns.numel(), len(down), dtype=dtype)
        for block in blocks:
            here = self.tiles_of(block)
            sums[here.start * self.slots : here.stop * self.slots] = self.columns_summed(down, block)
        return replace(self, sums=sums.view(-1, self.slots, len(down)))

    def columns_summed(self, down: Tensor, block: Block) -> Tensor:
        """The columns of its tiles after the first product, ``(n * slots, h)``, not yet rounded.

        Args:
            down: ``(h, h)``, the basis of columns.
            block: one of those that this was made for.
        """
        begin, end, entry, entry_end = self.parts[block.start]
        rows, mean, first = self.rows[entry:entry_end], self.mean[entry:entry_end], self.first[begin:end]
        if self.fuses:
            sums = in_turn(down, rows, first, mean)
        else:
            sums = in_turn(down.index_select(0, rows).mul_(mean.unsqueeze(1)), self.numbers[: len(rows)], first)
        return in_turn(sums, self.numbers[: len(sums)], self.second[self.tiles_of(block)].view(-1))


def in_turn(rows: Tensor, which: Tensor, beginnings: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sums of rows of a table, ``(b, d)``, each from 0 on and one row after the other.

    Args:
        rows: ``(a, d)``, the table.
        which: ``(c,) int32``, rows of it.
        beginnings: ``(b,) int32``, ascending from 0: where in ``which`` each sum begins; it ends where the next begins.
        weight: ``(c,)``, factors of the rows.
    """
    return torch.embedding_bag(rows, which, beginnings, False, 0, False, weight)[0]


def _beginnings(key: Tensor, profile: Profile) -> Tensor:
    """Where in ``key``, ``(n,)`` with equals side by side, another one begins, and ``n``: ``(b + 1,) int32``."""
    another = torch.ones(len(key) + 1, dtype=torch.bool, device=key.device)
    torch.ne(key[1:], key[:-1], out=another[1:-1])
    if profile.by_numpy:
        return torch.from_numpy(np.flatnonzero(another.numpy()).astype(np.int32))
    return another.nonzero().squeeze(1).int()


def _sorted_rows(numbers: Tensor, profile: Profile) -> Tensor:
    """Each row of integers ``(n, m)`` in ascending order."""
    if profile.by_numpy:  # numpy has vector instructions for it
        return torch.from_numpy(np.sort(numbers.numpy(), axis=1))
    return numbers.sort(dim=1).values


def _integers(bits: int) -> torch.dtype:
    """The type for numbers of so many bits."""
    return torch.int32 if bits <= 31 else torch.int64
