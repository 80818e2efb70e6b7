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
    number = torch.arange(size)
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
        rows, columns = torch.arange(h * w) // w, torch.arange(h * w) % w
        in_sums = (columns * _RUNNING_SUMS + _running_sums(h)[rows]) * h + rows
        in_order = columns * _RUNNING_SUMS * h + rows
        self._orders = torch.stack([in_sums, in_order]).to(device)
        tiles = torch.arange(max(block.tiles for block in batch.blocks), device=device)
        self._beginnings = tiles.unsqueeze(1) * (w * _RUNNING_SUMS * h)
        self._small = {block.start: _small_products(batch, block) for block in batch.blocks}
        self._sums_of_columns = np.stack([_running_sums(w).numpy(), np.zeros(w, dtype=np.int64)])

    @override
    def check(self, updates: Sequence[CompressedUpdate]) -> None:
        if not isinstance(self.transform, DCT):
            raise ConfigurationError(
                f'arithmetic="psyche" needs transform="dct", not {type(self.transform).__name__}: leave transform out',
                name="arithmetic",
                value="psyche",
            )

    @override
    def decode_block(
        self, block: Block, worker: int, scratch: Sequence[Tensor], updates: Sequence[CompressedUpdate]
    ) -> Tensor:
        """The signs are Psyche's; the values only nearly so. NaN where Psyche's is."""
        tiles, spare = scratch[0], scratch[1]
        n, m, w = block.tiles, len(updates) * self.batch.k, self.batch.w
        key, mean = self._means(block, updates)
        column, filled = self._columns(key, mean)
        torch.bmm(filled.transpose(1, 2), self._bw.index_select(0, column).view(n, m, w), out=tiles)
        if self._rounds:
            self._settle(block, tiles, spare, mean, column.view(n, m), filled)
        return tiles

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
        signs = self.decode_block(block, worker, scratch, updates).sign_()
        if self._rounds:
            # In the parameters' own dtype, which decides how the learning rate is rounded.
            room = scratch[1].view(-1).view(self.batch.value_dtype)[: signs.numel()].view(signs.shape)
            signs = room.copy_(signs)
        descend(block, signs, params, lr, params)

    # -- coefficients of all contributors ------------------------------------------------------------------------------

    def _means(self, block: Block, updates: Sequence[CompressedUpdate]) -> tuple[Tensor, Tensor]:
        """What everybody's coefficients mean together, in the order in which they are summed.

        Returns:
            keys, ``(n * m,) int64``, ascending: ``((tile * w + column) * 4 + running sum) * h + row``; and the means,
            ``(n, m)`` of the compute dtype. Where a position occurs several times, all but the first have the mean 0.
        """
        batch, number, dtype = self.batch, self.number, self.batch.value_dtype
        rows = slice(block.start, block.stop)
        position = joined([u.index[number][rows] for u in updates], dim=1)
        values = [u.value[number][rows] for u in updates]
        if any(v.dtype != values[0].dtype for v in values):
            values = [signs_to_values(v, dtype) if v.dtype == torch.bool else v for v in values]
        value = joined(values, dim=1)
        order = self._orders[0].index_select(0, position.view(-1)).view_as(position)
        if (small := self._small[block.start][0]) is not None:
            order = torch.where(small.unsqueeze(1), self._orders[1][position], order)
        order, by = order.sort(dim=1, stable=True)  # equal positions stay in the order of the contributions
        value = value.gather(1, by)
        value = (
            signs_to_values(value, batch.compute_dtype)
            if value.dtype == torch.bool
            else value.to(dtype).to(batch.compute_dtype)
        )
        key = order.add_(self._beginnings[: block.tiles]).view(-1)
        weight = presence_of(block, batch, updates)
        if len(updates) == 1 and weight is None:
            return key, value
        weight = torch.ones_like(value) if weight is None else weight.gather(1, by)
        pairs = torch.stack([torch.where(weight > 0, value, 0), weight], dim=2).view(-1, 2)
        _fold(pairs, key, None)
        total, count = pairs.to(dtype).unbind(1)
        return key, (total / count.clamp_(min=1)).to(batch.compute_dtype).view_as(value)

    def _columns(self, key: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """``y``: column numbers ``(n * m,) int64``, ascending in each tile, and what stands in them, ``(n, m, h)``.

        Where a column occurs several times, all but the first are 0.
        """
        h, w = self.batch.h, self.batch.w
        in_sums = torch.div(key, h, rounding_mode="floor")
        columns = torch.div(in_sums, _RUNNING_SUMS, rounding_mode="floor")
        if h == 1:
            filled = mean.view(-1, 1)
        else:
            filled = self._bh.index_select(0, key - in_sums * h).mul_(mean.view(-1, 1))
            if self._rounds:
                heads = _fold(filled, in_sums, None)
                _fold(filled, columns, heads)
                filled = filled.to(self.batch.value_dtype).to(self.batch.compute_dtype)
        return columns.remainder_(w), filled.view(*mean.shape, h)

    def _settle(self, block: Block, tiles: Tensor, spare: Tensor, mean: Tensor, column: Tensor, filled: Tensor) -> None:
        """Sums again, in the right order, what is so near to 0 in ``tiles`` that the order may decide its sign."""
        h, w, dtype = self.batch.h, self.batch.w, self.batch.value_dtype
        # Two sums of m exact products differ by at most m - 1 roundings each; a few more make up for what is neglected.
        share = 2 * (mean.shape[1] + 1) * _UNIT_ROUNDOFF * _SLACK * self._largest
        size = torch.where(mean.isfinite(), mean.abs(), 0).sum(dim=1)
        bound = torch.where(size > 0, size * share + self._tiny, 0)
        torch.abs(tiles, out=spare)
        near = (spare.view(len(spare), -1).amin(dim=1) < bound).logical_or_(bound.isinf()).nonzero().squeeze(1)
        if not len(near):
            return
        # Where the bound overflows, the sums may have done so, too: all of them are summed again.
        near_in = (spare[near] < bound[near].view(-1, 1, 1)).logical_or_(bound[near].isinf().view(-1, 1, 1))
        which = near_in.view(-1).nonzero().squeeze(1)
        near = near[torch.div(which, h * w, rounding_mode="floor")] * (h * w) + which % (h * w)
        small = self._small[block.start][1]
        for at in near.split(_POSITIONS_AT_A_TIME):
            tile, i, j = at // (h * w), at // w % h, at % w
            columns = column[tile]
            terms = filled[tile, :, i] * self._bw[columns, j.unsqueeze(1)]
            plain = 0 if small is None else small[tile].long().cpu().numpy()[:, None]
            running = self._sums_of_columns[plain, columns.cpu().numpy()]
            again = torch.from_numpy(sum_in_order(terms.cpu().numpy(), running)).to(dtype)
            tiles.view(-1)[at] = again.to(device=tiles.device, dtype=tiles.dtype)


def _small_products(batch: Batch, block: Block) -> tuple[Tensor | None, Tensor | None]:
    """Which tiles ``(n,) bool`` are of tensors whose first, and whose second, product is summed in plain order."""
    marks = [torch.zeros(block.tiles, dtype=torch.bool, device=batch.device) for _ in range(2)]
    for piece in block.pieces:
        start, stop = batch.ranges[piece.param]
        for mark, rows, side in zip(marks, (batch.w, batch.h), (batch.h, batch.w), strict=True):
            if (stop - start) * rows * side * side < _SMALL_PRODUCT:
                mark[piece.block_start : piece.block_stop] = True
    first, second = (mark if bool(mark.any()) else None for mark in marks)
    return first, second


def _fold(rows: Tensor, key: Tensor, among: Tensor | None) -> Tensor:
    """Adds rows with equal keys to the first of them, one after the other, and makes the others 0.

    Args:
        rows: ``(n, d)``, changed in place.
        key: ``(n,) int64``; equal keys are neighbours.
        among: the rows that count, ``(a,) int64``, ascending; the others are 0. None is all.

    Returns:
        which rows are the first of their key, ``(b,) int64``.
    """
    if among is not None:
        key = key[among]
    first = torch.ones(len(key), dtype=torch.bool, device=key.device)
    torch.ne(key[1:], key[:-1], out=first[1:])
    rest = (~first).nonzero().squeeze(1)
    if not len(rest):
        return torch.arange(len(key), device=key.device) if among is None else among
    left, far = rest, 1
    while len(left):  # those that stand `far` behind the first of their key
        now = first[left - far]
        here = left[now]
        source, target = (here, here - far) if among is None else (among[here], among[here - far])
        rows.index_copy_(0, target, rows.index_select(0, target).add_(rows.index_select(0, source)))
        left, far = left[~now], far + 1
    rows.index_fill_(0, rest if among is None else among[rest], 0)
    heads = first.nonzero().squeeze(1)
    return heads if among is None else among[heads]
