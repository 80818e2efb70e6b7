"""The second half of a step as Psyche's clients do it, bit for bit: everything in the dtype of the parameters.

Psyche (PsycheFoundation/psyche ``shared/modeling/src/distro.rs``: ``CompressDCT::batch_decompress``,
``TransformDCT::decode``, ``Distro::apply``) does this with the tensors of a whole model, in bfloat16 as a rule::

    x[position] = mean over those who sent it          sum in float32, in the order of the contributions, rounded;
                                                       divided by their number, rounded
    y[c, i]     = sum over rows r of x[r, c] B_h[r, i]     in float32, rounded
    z[i, j]     = sum over columns c of y[c, i] B_w[c, j]  in float32, rounded
    param       = param - lr * sign(z)                 in the dtype of the parameter; sign(NaN) is 0

``B`` is the inverse DCT of the unit matrix, computed in float32 and cast. It differs from the transpose of the forward
one in last bits, and has noise where a cosine is 0, which decides signs where everything else cancels: so it is
computed by the same operations (:func:`inverse_basis`).

A rounded sum depends on the order of its terms. PyTorch's product of bfloat16 matrices on a CPU without instructions
for them (checked with 2.9 and 2.13) has four running sums, of the terms 0, 4, 8..., 1, 5, 9... and so on, adds these up
in order, and puts what is left over at the end into the first; very small products are summed in plain order. That is
the definition here, on all machines (:func:`sum_in_order`). A product of two bfloat16 is exact in float32, so nothing
else can differ.

The engine below keeps to it without dense products. Of each tile only the coefficients that somebody sent are looked
at. What shares a column is added up in the order above, and rounded: ``y``. For ``z`` only the sign counts, so it is
summed in any order, as fast as the machine can; where the sum is so small that rounding might decide its sign, it is
summed again in the right order.

In float32 and float64 Psyche leaves the order to a BLAS, and so does this: nothing is rounded but the sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import override

from ..errors import ConfigurationError
from .dct import DCT, Transform
from .extraction import joined
from .merging import Merge, presence_of
from .plan import Batch, Block
from .sign import signs_to_values
from .update import CompressedUpdate
from .windows import descend

__all__ = ["PsycheMerge", "inverse_basis", "sum_in_order"]

_RUNNING_SUMS: Final = 4
"""Of PyTorch's product of half-precision matrices (``sum`` in ``aten/src/ATen/native/cpu/BlasKernel.cpp``)."""

_SMALL_PRODUCT: Final = 400
"""Rows times inner size times columns below which it sums in plain order (``bmm_out_or_baddbmm_`` in
``aten/src/ATen/native/LinearAlgebra.cpp``)."""

_UNIT_ROUNDOFF: Final = 2.0**-24
"""Of float32."""

_UNDERFLOW: Final = 1e-35
"""Added to bounds on errors, for terms that are too small for relative ones. Chosen arbitrarily, far above them."""

_SLACK: Final = 1.02
"""For the roundings of the bound itself and of what stands in a column."""

_FEW_COEFFICIENTS: Final = 64
"""Per tile of all contributors together, up to which those of all blocks are prepared before the first block: they
take some 20 bytes each until the next step. Chosen so that this is a sixth of bfloat16 weights in large tiles."""

_PREPARED_AT_A_TIME: Final = 1 << 18
"""Coefficients; chosen so that they stay in the cache."""

_POSITIONS_AT_A_TIME: Final = 1 << 14
"""Sums that are repeated together; bounds the memory that a hostile result can ask for."""


@lru_cache(maxsize=256)
def inverse_basis(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``B``: orthonormal inverse DCT of the unit vectors, ``(size, size)``, row = frequency, column = index.

    The operations and their order are those of ``TransformDCT::idct`` in Psyche's ``distro.rs``: in float32 on the
    device of the parameters, then cast.
    """
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        unit = torch.eye(size, dtype=torch.float32, device=device)
        real = unit / 2.0
        real[:, :1].mul_(math.sqrt(size) * 2.0)
        real[:, 1:].mul_(math.sqrt(size / 2.0) * 2.0)
        angle = (torch.arange(size, dtype=torch.float32, device=device) * (math.pi / (2.0 * size))).unsqueeze(0)
        cosine, sine = angle.cos(), angle.sin()
        imaginary = torch.cat([real[:, :1] * 0.0, -real.flip([1])[:, : size - 1]], 1)
        turned = torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], 2)
        wave = torch.fft.irfft(torch.view_as_complex(turned), n=size, dim=1)
        basis = torch.zeros_like(unit)
        basis[:, 0::2] += wave[:, : size - size // 2]
        basis[:, 1::2] += wave.flip([1])[:, : size // 2]
        return basis.to(dtype)


def sum_in_order(terms: npt.NDArray[np.float32], running: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
    """Sums ``(n,)`` of float32 ``terms``, ``(n, m)``, each of which belongs to one of the running sums.

    Args:
        terms: in the order in which they are added; a term of 0 is as good as none.
        running: ``(n, m)``: the number of its running sum, from 0.
    """
    kept = np.where(running[:, None, :] == np.arange(_RUNNING_SUMS)[:, None], terms[:, None, :], np.float32(0))
    # Accumulating adds one after the other, where a sum of numpy's would add up pairs.
    with np.errstate(invalid="ignore", over="ignore"):
        sums = np.add.accumulate(kept, axis=2, dtype=np.float32)[:, :, -1]
        total: npt.NDArray[np.float32] = ((sums[:, 0] + sums[:, 1]) + sums[:, 2]) + sums[:, 3]
    return total


def _running_sums(size: int) -> Tensor:
    """To which running sum each of ``size`` terms belongs, ``(size,) int64``."""
    number = torch.arange(size, device="cpu")
    return torch.where(number < size // _RUNNING_SUMS * _RUNNING_SUMS, number % _RUNNING_SUMS, 0)


class PsycheMerge(Merge):
    """Psyche's definition; see the module. For the transform ``"dct"``, the only one that Psyche has."""

    def __init__(self, number: int, batch: Batch, transform: Transform, workers: int) -> None:
        super().__init__(number, batch, transform, workers)
        h, w, device = batch.h, batch.w, batch.device
        self._rounds = batch.value_dtype in (torch.bfloat16, torch.float16)
        self._bh = inverse_basis(h, batch.value_dtype, device).to(batch.compute_dtype)
        self._bw = inverse_basis(w, batch.value_dtype, device).to(batch.compute_dtype)
        self._largest = float(self._bh.abs().max() * self._bw.abs().max())
        # What rounds to 0 or nearly so, for which bounds on relative errors say nothing.
        self._tiny = max(_UNDERFLOW, torch.finfo(batch.value_dtype).tiny)
        position = torch.arange(h * w, device="cpu")
        rows, columns = position // w, position % w
        in_sums = (columns * _RUNNING_SUMS + _running_sums(h)[rows]) * h + rows
        in_order = columns * _RUNNING_SUMS * h + rows
        self._orders = torch.stack([in_sums, in_order]).to(device)
        self._prepared: dict[int, _Prepared] = {}
        # Tensors whose first, and whose second, product is summed in plain order.
        self._small = [
            {n for n, (start, stop) in batch.ranges.items() if (stop - start) * times * side * side < _SMALL_PRODUCT}
            for times, side in ((w, h), (h, w))
        ]
        self._sums_of_columns = np.stack([_running_sums(w).numpy(), np.zeros(w, dtype=np.int64)])

    @override
    def check(self, updates: Sequence[CompressedUpdate]) -> None:
        if not isinstance(self.transform, DCT):
            raise ConfigurationError(
                f'arithmetic="psyche" needs transform="dct", not {type(self.transform).__name__}: leave transform out',
                name="arithmetic",
                value="psyche",
            )
        # Many small tensors of indices take longer than few large ones.
        self._prepared = {}
        each = max(1, len(updates) * self.batch.k)
        group: list[Block] = []
        for block in self.batch.blocks if each <= _FEW_COEFFICIENTS else ():
            group.append(block)
            if block is self.batch.blocks[-1] or (block.stop - group[0].start) * each >= _PREPARED_AT_A_TIME:
                self._prepared.update(dict.fromkeys((b.start for b in group), self._prepare(group, updates)))
                group = []

    @override
    def decode_block(
        self, block: Block, worker: int, scratch: Sequence[Tensor], updates: Sequence[CompressedUpdate]
    ) -> Tensor:
        """The signs are Psyche's; the values only nearly so. NaN where Psyche's is."""
        return self._decode(block, scratch, updates)[0]

    def _decode(
        self, block: Block, scratch: Sequence[Tensor], updates: Sequence[CompressedUpdate]
    ) -> tuple[Tensor, Tensor]:
        """The tiles in the compute dtype and in that of the parameters, both ``(n, h, w)`` in ``scratch``."""
        tiles, spare = scratch[0], scratch[1]
        batch = self.batch
        known = self._prepared.get(block.start) or self._prepare([block], updates)
        m = known.mean.shape[1]
        here = slice(block.start - known.start, block.stop - known.start)
        entries = slice(here.start * m, here.stop * m)
        columns, rows = known.columns[entries], known.rows[entries]
        filled = known.mean[here].reshape(-1, 1)
        if batch.h > 1:
            filled = self._bh.index_select(0, rows).mul_(filled)
            if self._rounds:
                known.fold(filled, entries)
                filled = filled.to(batch.value_dtype).to(batch.compute_dtype)
        shape = (block.tiles, m)
        filled = filled.view(*shape, batch.h)
        torch.bmm(filled.transpose(1, 2), self._bw.index_select(0, columns).view(*shape, batch.w), out=tiles)
        if not self._rounds:
            return tiles, tiles
        halves = spare.view(-1).view(batch.value_dtype)[: tiles.numel()].view(tiles.shape)
        halves.copy_(tiles)
        self._settle(block, tiles, halves, known.bound[here], columns.view(shape), filled)
        return tiles, halves

    @override
    def merge_block(
        self,
        block: Block,
        worker: int,
        scratch: Sequence[Tensor],
        updates: Sequence[CompressedUpdate],
        params: Sequence[Tensor],
        lr: float,
    ) -> None:
        tiles, halves = self._decode(block, scratch, updates)
        signs = tiles.sign_()
        # In the parameters' own dtype, which decides how the learning rate is rounded.
        descend(block, halves.copy_(signs) if self._rounds else signs, params, lr, params)

    # -- coefficients of all contributors ------------------------------------------------------------------------------

    def _prepare(self, blocks: Sequence[Block], updates: Sequence[CompressedUpdate]) -> _Prepared:
        """What everybody's coefficients mean together, for neighbouring blocks."""
        batch, number, dtype = self.batch, self.number, self.batch.value_dtype
        start, stop = blocks[0].start, blocks[-1].stop
        position = joined([u.index[number][start:stop] for u in updates], dim=1)
        values = [u.value[number][start:stop] for u in updates]
        if any(v.dtype != values[0].dtype for v in values):
            values = [signs_to_values(v, dtype) if v.dtype == torch.bool else v for v in values]
        value = joined(values, dim=1)
        order = self._orders[0].index_select(0, position.view(-1)).view_as(position)
        if (small := self._small_products(blocks, 0)) is not None:
            order = torch.where(small.unsqueeze(1), self._orders[1][position], order)
        order, by = order.sort(dim=1, stable=True)  # equal positions stay in the order of the contributions
        value = value.gather(1, by)
        signs = value.dtype == torch.bool
        mean = (signs_to_values(value, dtype) if signs else value.to(dtype)).to(batch.compute_dtype)
        beginnings = torch.arange(stop - start, device=batch.device).unsqueeze(1) * (batch.w * _RUNNING_SUMS * batch.h)
        key = order.add_(beginnings).view(-1)
        weights = [presence_of(block, batch, updates) for block in blocks]
        if len(updates) > 1 or weights != [None] * len(blocks):
            weight = torch.cat(
                [
                    mean.new_ones(block.tiles, mean.shape[1]) if weight is None else weight
                    for block, weight in zip(blocks, weights, strict=True)
                ]
            ).gather(1, by)
            pairs = torch.stack([torch.where(weight > 0, mean, 0), weight], dim=2).view(-1, 2)
            _Fold.of(key).add_up(pairs, slice(0, len(pairs)))
            total, count = pairs.to(dtype).unbind(1)
            mean = (total / count.clamp_(min=1)).to(batch.compute_dtype).view_as(mean)
        in_sums = torch.div(key, batch.h, rounding_mode="floor")
        columns = torch.div(in_sums, _RUNNING_SUMS, rounding_mode="floor")
        folds = []
        if self._rounds and batch.h > 1:
            first = _Fold.of(in_sums)
            folds = [first, _Fold.of(columns, first.heads)]
        return _Prepared(
            start=start,
            rows=key - in_sums * batch.h,
            columns=columns.remainder_(batch.w),
            mean=mean,
            bound=self._bound(mean),
            folds=folds,
        )

    def _bound(self, mean: Tensor) -> Tensor:
        """How far two sums of the same terms can be apart in each tile, ``(n,)``."""
        # At most m - 1 roundings in each; a few more make up for what is neglected.
        share = 2 * (mean.shape[1] + 1) * _UNIT_ROUNDOFF * _SLACK * self._largest
        size = torch.where(mean.isfinite(), mean.abs(), 0).sum(dim=1)
        return torch.where(size > 0, size * share + self._tiny, 0)

    def _settle(
        self, block: Block, tiles: Tensor, halves: Tensor, bound: Tensor, column: Tensor, filled: Tensor
    ) -> None:
        """Sums again, in the right order, what is so near to 0 that the order may decide its sign.

        Args:
            block: of the batch.
            tiles: ``(n, h, w)``, changed in place.
            halves: the same rounded to the dtype of the parameters, changed likewise.
            bound: ``(n,)``, what is near.
            column, filled: ``(n, m)`` and ``(n, m, h)``: the terms are products of these with rows of the basis.
        """
        h, w, dtype = self.batch.h, self.batch.w, self.batch.value_dtype
        near = (_least_magnitudes(halves) < bound * _SLACK).logical_or_(bound.isinf()).nonzero().squeeze(1)
        if not near.numel():
            return
        # Where the bound overflows, the sums may have done so, too: all of them are summed again.
        limit = bound[near].view(-1, 1, 1)
        which = (tiles[near].abs_() < limit).logical_or_(limit.isinf()).view(-1).nonzero().squeeze(1)
        near = near[torch.div(which, h * w, rounding_mode="floor")] * (h * w) + which % (h * w)
        small = self._small_products([block], 1)
        for at in near.split(_POSITIONS_AT_A_TIME):
            tile, i, j = at // (h * w), at // w % h, at % w
            columns = column[tile]
            terms = filled[tile, :, i] * self._bw[columns, j.unsqueeze(1)]
            plain = 0 if small is None else small[tile].long().cpu().numpy()[:, None]
            running = self._sums_of_columns[plain, columns.cpu().numpy()]
            again = torch.from_numpy(sum_in_order(terms.cpu().numpy(), running)).to(dtype)
            for values in (tiles, halves):
                values.view(-1)[at] = again.to(device=values.device, dtype=values.dtype)

    def _small_products(self, blocks: Sequence[Block], which: int) -> Tensor | None:
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


def _least_magnitudes(halves: Tensor) -> Tensor:
    """The least magnitude of each tile of 16-bit floats ``(n, h, w)``, ``(n,) float32``; NaN counts as the largest."""
    bits = halves.view(torch.int16).view(len(halves), -1)
    if halves.device.type == "cpu":  # numpy has vector instructions for it
        least = torch.from_numpy(np.bitwise_and(bits.numpy(), 0x7FFF).min(axis=1))
    else:
        least = bits.bitwise_and(0x7FFF).amin(dim=1)
    return least.view(halves.dtype).float()  # without a sign, floats are in the order of their bits


@dataclass(frozen=True)
class _Prepared:
    """The coefficients of neighbouring blocks, of each tile in the order in which they are summed.

    Attributes:
        start: number of the first tile.
        rows, columns: ``(n * m,) int64``, where they stand in their tiles.
        mean: ``(n, m)`` of the compute dtype; where a position occurs several times, all but the first have 0.
        bound: ``(n,)``; see :meth:`PsycheMerge._bound`.
        folds: of what shares a running sum of a column, and of what shares a column.
    """

    start: int
    rows: Tensor
    columns: Tensor
    mean: Tensor
    bound: Tensor
    folds: Sequence[_Fold]

    def fold(self, filled: Tensor, entries: slice) -> None:
        """Adds up what shares a column, in the first of it, in the right order; the others become 0.

        Args:
            filled: ``(b, h)``, the products of the coefficients ``entries`` with rows of the basis; changed in place.
        """
        for fold in self.folds:
            fold.add_up(filled, entries)


@dataclass(frozen=True)
class _Fold:
    """Which rows are added to which.

    Attributes:
        heads: those that take, and those that are alone, ``(a,) int64``.
        pairs: one after the other: takers and givers, ascending, ``(b,) int64`` each. No two of one pair have the same
            taker.
        givers: all of them.
    """

    heads: Tensor
    pairs: Sequence[tuple[Tensor, Tensor]]
    givers: Tensor

    @classmethod
    def of(cls, key: Tensor, among: Tensor | None = None) -> _Fold:
        """Each row is added to the first with the same key, in order.

        Args:
            key: ``(n,) int64``; equal keys are neighbours.
            among: the rows that count, ``(a,) int64``, ascending; the others are 0. None is all.
        """
        if among is None:
            among = torch.arange(len(key), device=key.device)
        else:
            key = key[among]
        first = torch.ones(len(key), dtype=torch.bool, device=key.device)
        torch.ne(key[1:], key[:-1], out=first[1:])
        rest = left = (~first).nonzero().squeeze(1)
        pairs, far = [], 1
        while left.numel():  # those that stand `far` behind the first of their key
            now = first[left - far]
            here = left[now]
            pairs.append((among[here - far], among[here]))
            left, far = left[~now], far + 1
        return cls(among[first], pairs, among[rest])

    def add_up(self, rows: Tensor, part: slice) -> None:
        """Does it to ``rows``, ``(b, d)``, which are the rows ``part`` of all."""
        ends = torch.tensor([part.start, part.stop], device=rows.device)
        for takers, givers in self.pairs:
            start, stop = torch.searchsorted(givers, ends).tolist()
            if start < stop:
                to, source = takers[start:stop] - part.start, givers[start:stop] - part.start
                rows.index_copy_(0, to, rows.index_select(0, to).add_(rows.index_select(0, source)))
        start, stop = torch.searchsorted(self.givers, ends).tolist()
        if start < stop:
            rows.index_fill_(0, self.givers[start:stop] - part.start, 0)
