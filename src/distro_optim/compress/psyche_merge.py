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
at. What shares a column is added up in the order above, and rounded: ``y``. PyTorch's ``embedding_bag`` does that: it
adds up rows of a table, times weights, one after the other. For ``z`` only the sign counts, so it is summed in any
order, as fast as the machine can; where the sum is so small that rounding might decide its sign, it is summed again in
the right order.

In float32 and float64 Psyche leaves the order to a BLAS, and so does this: nothing is rounded but the sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
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

_SUM_BITS: Final = 2
"""To number them."""

_SMALL_PRODUCT: Final = 400
"""Rows times inner size times columns below which it sums in plain order (``bmm_out_or_baddbmm_`` in
``aten/src/ATen/native/LinearAlgebra.cpp``)."""

_UNIT_ROUNDOFF: Final = 2.0**-24
"""Of float32."""

_UNDERFLOW: Final = 1e-35
"""Added to bounds on errors, for terms that are too small for relative ones. Chosen arbitrarily, far above them."""

_SMALL_COEFFICIENT: Final = 1e-20
"""From here on, products with the basis, whose least elements are about 1e-9, are exact in float32: it does not matter
whether their sums are fused with them. Chosen arbitrarily, far above where it would matter."""

_MOST_COUNTED: Final = 1 << 24
"""Elements of a tile that float32 can count."""

_SLACK: Final = 1.02
"""For the roundings of the bound itself and of what stands in a column."""

_FEW_COEFFICIENTS: Final = 64
"""Per tile of all contributors together, up to which those of all blocks are prepared before the first block: they
take some 24 bytes each until the next step. Chosen so that this is a fifth of bfloat16 weights in large tiles."""

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


Places = npt.NDArray[np.intp]


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
        # The places of a tile in the order of its sums: column, running sum and row, in so many bits each.
        self._row_bits, self._column_bits = (h - 1).bit_length(), (w - 1).bit_length()
        position = torch.arange(h * w, device="cpu")
        rows, columns = position // w, position % w
        in_order = (columns << (_SUM_BITS + self._row_bits)) + rows
        in_sums = in_order + (_running_sums(h)[rows] << self._row_bits)
        self._order_bits = self._row_bits + _SUM_BITS + self._column_bits
        self._orders = torch.stack([in_sums, in_order]).to(_integers(self._order_bits)).to(device)
        self._prepared: dict[int, _Prepared] = {}
        # Tensors whose first, and whose second, product is summed in plain order.
        self._small = [
            {n for n, (start, stop) in batch.ranges.items() if (stop - start) * times * side * side < _SMALL_PRODUCT}
            for times, side in ((w, h), (h, w))
        ]
        # Half of the smallest number: what is no larger is rounded to 0.
        kind = torch.finfo(batch.value_dtype)
        self._rounds_to_zero = kind.tiny * kind.eps / 2
        self._bw_of_host = self._bw.cpu().numpy()
        self._sums_of_columns = np.stack([_running_sums(w).numpy(), np.zeros(w, dtype=np.int64)])
        self._longest_sum = w if self._small[1] else w // _RUNNING_SUMS + 2 * (_RUNNING_SUMS - 1)

    @override
    def check(self, updates: Sequence[CompressedUpdate]) -> None:
        if not isinstance(self.transform, DCT):
            raise ConfigurationError(
                f'arithmetic="psyche" needs transform="dct", not {type(self.transform).__name__}: leave transform out',
                name="arithmetic",
                value="psyche",
            )
        self._prepared = {}

    @override
    def preparations(self, updates: Sequence[CompressedUpdate]) -> Sequence[Callable[[], None]]:
        # Many small tensors of indices take longer than few large ones.
        each = max(1, len(updates) * self.batch.k)
        if each > _FEW_COEFFICIENTS:
            return ()
        most = min(_PREPARED_AT_A_TIME, -(-self.batch.tiles * each // self.workers))
        groups: list[list[Block]] = [[]]
        for block in self.batch.blocks:
            if groups[-1] and (block.stop - groups[-1][0].start) * each > most:
                groups.append([])
            groups[-1].append(block)
        return [partial(self._prepare_ahead, group, updates) for group in groups]

    def _prepare_ahead(self, blocks: Sequence[Block], updates: Sequence[CompressedUpdate]) -> None:
        self._prepared.update(dict.fromkeys((block.start for block in blocks), self._prepare(blocks, updates)))

    @override
    def decode_block(
        self, block: Block, worker: int, scratch: Sequence[Tensor], updates: Sequence[CompressedUpdate]
    ) -> Tensor:
        """The signs are Psyche's; the values only nearly so, and 1 where they are next to 0. NaN where Psyche's is."""
        tiles = scratch[0]
        known = self._known(block, updates)
        filled = self._multiply(known, block, tiles, scaled=False)
        if self._rounds:
            limit = known.bound[known.tiles_of(block)].view(-1, 1, 1)
            near = ((tiles.abs() < limit) | limit.isinf()).cpu().numpy().reshape(block.tiles, -1)
            tile, position = near.nonzero()
            self._sum_again(block, tiles, tile, position, known.columns[known.tiles_of(block)], filled)
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
        tiles, spare = scratch[0], scratch[1]
        known = self._known(block, updates)
        if not self._rounds:
            self._multiply(known, block, tiles, scaled=False)
            descend(block, tiles.sign_(), params, lr, params)
            return
        # Scaled so that less than a half is what may have the wrong sign.
        filled = self._multiply(known, block, tiles, scaled=True)
        tiles.clamp_(-1, 1).round_()
        self._settle(block, tiles, known, filled)
        # In the parameters' own dtype, which decides how the learning rate is rounded.
        halves = spare.view(-1).view(self.batch.value_dtype)[: tiles.numel()].view(tiles.shape)
        descend(block, halves.copy_(tiles), params, lr, params)

    def _known(self, block: Block, updates: Sequence[CompressedUpdate]) -> _Prepared:
        return self._prepared.get(block.start) or self._prepare([block], updates)

    def _multiply(self, known: _Prepared, block: Block, tiles: Tensor, *, scaled: bool) -> Tensor:
        """``z`` of all tiles of a block, summed in any order, scaled for :meth:`_settle` or not; returns ``y``.

        Args:
            known: of this block.
            block: of the batch.
            tiles: ``(n, h, w)`` of the compute dtype, overwritten.
            scaled: whether.

        Returns:
            ``(n, slots, h)``.
        """
        batch = self.batch
        filled = known.columns_summed(self._bh, block)
        if self._rounds:
            filled = filled.to(batch.value_dtype).to(batch.compute_dtype)
        column = known.columns[known.tiles_of(block)].view(-1)
        if scaled:
            factor = known.scale[known.tiles_of(block)].view(-1)
            along = _in_turn(self._bw, column, known.numbers[: len(column)], factor)
        else:
            along = self._bw.index_select(0, column)
        filled = filled.view(block.tiles, -1, batch.h)
        torch.bmm(filled.transpose(1, 2), along.view(block.tiles, -1, batch.w), out=tiles)
        return filled

    # -- coefficients of all contributors ------------------------------------------------------------------------------

    def _prepare(self, blocks: Sequence[Block], updates: Sequence[CompressedUpdate]) -> _Prepared:
        """What everybody's coefficients mean together, for neighbouring blocks."""
        batch = self.batch
        start, stop = blocks[0].start, blocks[-1].stop
        n = stop - start
        position = joined([u.index[self.number][start:stop] for u in updates], dim=1)
        order = self._orders[0].index_select(0, position.view(-1)).view(position.shape)
        if (small := self._small_products(blocks, 0)) is not None:
            order = torch.where(small.unsqueeze(1), self._orders[1][position], order)
        # Equal positions stay in the order of the contributions.
        number_bits = (position.shape[1] - 1).bit_length()
        kind = _integers(self._order_bits + number_bits)
        number = torch.arange(position.shape[1], dtype=kind, device=batch.device)
        packed = _sorted_rows((order.to(kind) << number_bits) + number)
        by = packed & ((1 << number_bits) - 1)
        kind = _integers(self._order_bits + n.bit_length())
        tile = torch.arange(n, dtype=kind, device=batch.device).unsqueeze(1)
        key = ((packed >> number_bits).to(kind) + (tile << self._order_bits)).view(-1)
        firsts = _beginnings(key)
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
        weights = [presence_of(block, batch, updates) for block in blocks]
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
            total, count = _in_turn(pairs, every, firsts[:-1]).to(dtype).unbind(1)
        else:
            total = _in_turn(value.view(-1, 1), every, firsts[:-1]).to(dtype).squeeze(1)
            count = firsts.diff().to(dtype)
        return (total / count.clamp_(min=1)).to(batch.compute_dtype)

    def _sums(self, blocks: Sequence[Block], key: Tensor, mean: Tensor) -> _Prepared:
        """Which coefficients are added up to what.

        Args:
            blocks: neighbours.
            key: ``(u,)``, ascending: tile, column, running sum and row of each coefficient.
            mean: ``(u,)``, the coefficients.
        """
        start, n = blocks[0].start, blocks[-1].stop - blocks[0].start
        sums = key >> self._row_bits
        first = _beginnings(sums)
        columns = sums.index_select(0, first[:-1]) >> _SUM_BITS
        begin = _beginnings(columns)
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
        # A term of 0 takes part in no rounding. A few more make up for what is neglected, and for the scale.
        roundings = slots + 2 + min(slots + 3, self._longest_sum) + 2
        size = torch.zeros(n, dtype=mean.dtype, device=mean.device)
        size.index_add_(0, (key >> self._order_bits).int(), torch.where(magnitude.isfinite(), magnitude, 0))
        bound = torch.where(size > 0, size * (roundings * _UNIT_ROUNDOFF * _SLACK * self._largest) + self._tiny, 0)
        return _Prepared(
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
            scale=torch.where(bound > 0, 0.5 / bound, 1).unsqueeze(1).repeat(1, slots),
            fuses=not self._rounds or not bool(((magnitude < _SMALL_COEFFICIENT) & (magnitude > 0)).any()),
        )

    # -- signs that rounding decides -----------------------------------------------------------------------------------

    def _settle(self, block: Block, tiles: Tensor, known: _Prepared, filled: Tensor) -> None:
        """Sums again, in the right order, what is so near to 0 that the order may decide its sign.

        Args:
            block: of the batch.
            tiles: ``(n, h, w)`` of 1, -1, 0 for what is near, and NaN; changed to signs in place.
            known: of this block.
            filled: ``y``.
        """
        n, size, here = block.tiles, self.batch.tile_size, known.tiles_of(block)
        flat = tiles.view(n, size)
        on_cpu = tiles.device.type == "cpu"
        if on_cpu:
            rows = flat.numpy()
            counted = np.matmul(rows[:, None, :], rows[:, :, None]).reshape(n)
        else:
            counted = torch.bmm(flat.unsqueeze(1), flat.unsqueeze(2)).view(n).cpu().numpy()
        if size > _MOST_COUNTED:
            counted = np.full(n, -1, dtype=np.float32)
        odd = np.flatnonzero(counted != size)
        if not odd.size:
            return
        bound = known.bound[here].cpu().numpy()[odd]
        nothing = (bound == 0) & (counted[odd] == 0)
        if nothing.any():
            flat[torch.from_numpy(odd[nothing]).to(flat.device)] = 0  # not -0
            odd, bound = odd[~nothing], bound[~nothing]
        signs = rows[odd] if on_cpu else flat[torch.from_numpy(odd).to(flat.device)].cpu().numpy()
        near = signs == 0
        if np.isnan(counted).any():
            # The sign of NaN is 0. But where the bound overflows, the sums may have done so, too.
            near |= np.isnan(signs) & np.isinf(bound)[:, None]
            flat.nan_to_num_(0.0)
        number, position = np.divmod(np.flatnonzero(near), size)
        self._sum_again(block, tiles, odd[number], position, known.columns[here], filled)

    def _sum_again(
        self, block: Block, tiles: Tensor, tile: Places, position: Places, columns: Tensor, filled: Tensor
    ) -> None:
        """Puts into tiles the signs of Psyche's sums, rounded as Psyche does.

        Args:
            block: of the batch.
            tiles: ``(n, h, w)``, changed in place.
            tile, position: ``(u,)``, which elements, by their tile and where they are in it.
            columns, filled: ``(n, slots)`` and ``(n, slots, h)``: the terms are products of these with rows of the
                basis.
        """
        h, w = self.batch.h, self.batch.w
        small = self._small_products([block], 1)
        plain_of = None if small is None else small.cpu().numpy().astype(np.intp)
        flat, column_of, left = tiles.view(-1, h * w), columns.cpu().numpy(), filled.cpu().numpy()
        for start in range(0, len(tile), _POSITIONS_AT_A_TIME):
            t, at = tile[start : start + _POSITIONS_AT_A_TIME], position[start : start + _POSITIONS_AT_A_TIME]
            i, j = np.divmod(at, w)
            column = column_of[t]
            with np.errstate(invalid="ignore"):  # infinity times 0
                terms = left[t, :, i] * self._bw_of_host[column, j[:, None]]
            sums = sum_in_order(terms, self._sums_of_columns[0 if plain_of is None else plain_of[t, None], column])
            signs = np.where(np.abs(sums) > self._rounds_to_zero, np.sign(sums), np.float32(0))
            if tiles.device.type == "cpu":
                flat.numpy()[t, at] = signs
            else:
                where = torch.from_numpy(t).to(flat.device), torch.from_numpy(at).to(flat.device)
                flat[where] = torch.from_numpy(signs).to(flat.device)

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


@dataclass(frozen=True)
class _Prepared:
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
        scale: ``(n, slots)``: half its reciprocal; 1 where it is 0.
        fuses: products of ``mean`` with the basis are exact in float32.
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
    scale: Tensor
    fuses: bool

    def tiles_of(self, block: Block) -> slice:
        """Where the tiles of ``block`` are."""
        return slice(block.start - self.start, block.stop - self.start)

    def columns_summed(self, down: Tensor, block: Block) -> Tensor:
        """The columns of its tiles after the first product, ``(n * slots, h)``, not yet rounded.

        Args:
            down: ``(h, h)``, the basis of columns.
            block: one of those that this was made for.
        """
        begin, end, entry, entry_end = self.parts[block.start]
        rows, mean, first = self.rows[entry:entry_end], self.mean[entry:entry_end], self.first[begin:end]
        if self.fuses:
            sums = _in_turn(down, rows, first, mean)
        else:
            sums = _in_turn(down.index_select(0, rows).mul_(mean.unsqueeze(1)), self.numbers[: len(rows)], first)
        return _in_turn(sums, self.numbers[: len(sums)], self.second[self.tiles_of(block)].view(-1))


def _in_turn(rows: Tensor, which: Tensor, beginnings: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sums of rows of a table, ``(b, d)``, each from 0 on and one row after the other.

    Args:
        rows: ``(a, d)``, the table.
        which: ``(c,) int32``, rows of it.
        beginnings: ``(b,) int32``, ascending from 0: where in ``which`` each sum begins; it ends where the next begins.
        weight: ``(c,)``, factors of the rows.
    """
    return torch.embedding_bag(rows, which, beginnings, False, 0, False, weight)[0]


def _beginnings(key: Tensor) -> Tensor:
    """Where in ``key``, ``(n,)`` with equals side by side, another one begins, and ``n``: ``(b + 1,) int32``."""
    another = torch.ones(len(key) + 1, dtype=torch.bool, device=key.device)
    torch.ne(key[1:], key[:-1], out=another[1:-1])
    if key.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(another.numpy()).astype(np.int32))
    return another.nonzero().squeeze(1).int()


def _sorted_rows(numbers: Tensor) -> Tensor:
    """Each row of integers ``(n, m)`` in ascending order."""
    if numbers.device.type == "cpu":  # numpy has vector instructions for it
        return torch.from_numpy(np.sort(numbers.numpy(), axis=1))
    return numbers.sort(dim=1).values


def _integers(bits: int) -> torch.dtype:
    """The type for numbers of so many bits."""
    return torch.int32 if bits <= 31 else torch.int64
