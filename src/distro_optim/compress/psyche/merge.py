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
computed by the same operations (:func:`~.basis.inverse_basis`).

A rounded sum depends on the order of its terms. PyTorch's product of bfloat16 matrices on a CPU without instructions
for them (checked with 2.9 and 2.13) has four running sums, of the terms 0, 4, 8..., 1, 5, 9... and so on, adds these up
in order, and puts what is left over at the end into the first; very small products are summed in plain order. That is
the definition here, on all machines (:func:`~.basis.sum_in_order`). A product of two bfloat16 is exact in float32, so
nothing else can differ.

The engine below keeps to it without dense products. Of each tile only the coefficients that somebody sent are looked
at. What shares a column is added up in the order above, and rounded: ``y``. PyTorch's ``embedding_bag`` does that: it
adds up rows of a table, times weights, one after the other. For ``z`` only the sign counts, so it is summed in any
order, as fast as the machine can; where the sum is so small that rounding might decide its sign, it is summed again in
the right order.

In float32 and float64 Psyche leaves the order to a BLAS, and so does this: nothing is rounded but the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from ...errors import ConfigurationError
from ..dct import DCT, Transform
from ..merging import Merge
from ..plan import Batch, Block
from ..update import CompressedUpdate
from ..windows import descend
from .basis import inverse_basis
from .halves import Bits, Halves
from .nearly_zero import NearlyZero, Places
from .prepared import Prepared, Preparing, in_turn

__all__ = ["PsycheMerge"]

_MOST_COUNTED: Final = 1 << 24
"""Elements of a tile that float32 can count."""

_FEW_COEFFICIENTS: Final = 64
"""Per tile of all contributors together, up to which those of all blocks are prepared before the first block: they
take some 24 bytes each until the next step. Chosen so that this is a fifth of bfloat16 weights in large tiles."""

_VERY_FEW_COEFFICIENTS: Final = 16
"""Up to which their columns are summed ahead as well, which take two bytes for each element of a column until the next
step: chosen so that this is a quarter of bfloat16 weights in large tiles, and an eighth with the usual 8."""

_PREPARED_AT_A_TIME: Final = 1 << 18
"""Coefficients; chosen so that they stay in the cache."""


class PsycheMerge(Merge):
    """Psyche's definition; see the module. For the transform ``"dct"``, the only one that Psyche has."""

    def __init__(self, number: int, batch: Batch, transform: Transform, workers: int) -> None:
        super().__init__(number, batch, transform, workers)
        h, w, device = batch.h, batch.w, batch.device
        self._rounds = batch.value_dtype in (torch.bfloat16, torch.float16)
        self._bh = inverse_basis(h, batch.value_dtype, device).to(batch.compute_dtype)
        self._bw = inverse_basis(w, batch.value_dtype, device).to(batch.compute_dtype)
        largest = float(self._bh.abs().max() * self._bw.abs().max())
        self._halves = Halves(batch.value_dtype)
        self._preparing = Preparing(number, batch, self._halves, largest=largest, rounds=self._rounds)
        self._prepared: dict[int, Prepared] = {}
        self._nearly_zero = NearlyZero(batch, self._preparing, self._bw)

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
        known = self._preparing.prepare(blocks, updates)
        if self._rounds and len(updates) * self.batch.k <= _VERY_FEW_COEFFICIENTS:
            known = known.with_sums(self._bh, blocks, self.batch.value_dtype)
        self._prepared.update(dict.fromkeys((block.start for block in blocks), known))

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
            self._sum_again(block, tiles, tile, position, known, filled)
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
        # In the parameters' own dtype, which decides how the learning rate is rounded.
        halves = spare.view(-1).view(self.batch.value_dtype)[: tiles.numel()].view(tiles.shape)
        if known.near is None:
            # Scaled so that less than a half is what may have the wrong sign.
            filled = self._multiply(known, block, tiles, scaled=True)
            tiles.clamp_(-1, 1).round_()
            self._settle(block, tiles, known, filled)
            signs = halves.copy_(tiles)
        else:
            signs = self._multiply_to_signs(known, block, known.near[known.tiles_of(block)], halves, tiles)
        descend(block, signs, params, lr, params)

    def _known(self, block: Block, updates: Sequence[CompressedUpdate]) -> Prepared:
        return self._prepared.get(block.start) or self._preparing.prepare([block], updates)

    def _multiply(self, known: Prepared, block: Block, tiles: Tensor, *, scaled: bool) -> Tensor:
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
        if known.sums is not None:
            filled = known.sums[known.tiles_of(block)].to(batch.compute_dtype)
        else:
            filled = known.columns_summed(self._bh, block)
            if self._rounds:
                filled = filled.to(batch.value_dtype).to(batch.compute_dtype)
        column = known.columns[known.tiles_of(block)].view(-1)
        if scaled:
            bound = known.bound[known.tiles_of(block)]
            factor = torch.where(bound > 0, 0.5 / bound, 1).repeat_interleave(known.slots)
            along = in_turn(self._bw, column, known.numbers[: len(column)], factor)
        else:
            along = self._bw.index_select(0, column)
        filled = filled.view(block.tiles, -1, batch.h)
        torch.bmm(filled.transpose(1, 2), along.view(block.tiles, -1, batch.w), out=tiles)
        return filled

    def _multiply_to_signs(self, known: Prepared, block: Block, near: Bits, halves: Tensor, tiles: Tensor) -> Tensor:
        """The signs of ``z``, by its bits; summed again, in the right order, where rounding may decide them.

        Args:
            known: of this block.
            block: of the batch.
            near: ``(n,)``, of this block; see :class:`Prepared`.
            halves: ``(n, h, w)`` of the parameters' dtype, overwritten.
            tiles: ``(n, h, w)`` of the compute dtype, overwritten.

        Returns:
            ``(n, h, w)`` of the parameters' dtype, in the memory of ``tiles``.
        """
        filled = self._multiply(known, block, tiles, scaled=False)
        numbers = halves.copy_(tiles)
        # What is in the cache still, and not needed any more.
        signs = tiles.view(-1).view(halves.dtype)[: halves.numel()].view(halves.shape)
        self._halves.signs(numbers, out=signs)
        bits = self._halves.bits(numbers.view(block.tiles, -1))
        odd = (self._halves.smallest(bits) <= near).nonzero()[0]
        if odd.size:
            number, position = (self._halves.magnitudes(bits[odd]) <= near[odd, None]).nonzero()
            tile, flat = odd[number], self._halves.bits(signs.view(block.tiles, -1))
            for part, right in self._nearly_zero.signs(block, tile, position, known, filled):
                flat[tile[part], position[part]] = self._halves.of_signs(right)
        if known.silent:
            self._halves.bits(signs)[near < 0] = 0
        return signs

    # -- signs that rounding decides -----------------------------------------------------------------------------------

    def _settle(self, block: Block, tiles: Tensor, known: Prepared, filled: Tensor) -> None:
        """Sums again, in the right order, what is so near to 0 that the order may decide its sign.

        Args:
            block: of the batch.
            tiles: ``(n, h, w)`` of 1, -1, 0 for what is near, and NaN; changed to signs in place.
            known: of this block.
            filled: ``y``.
        """
        n, size, here = block.tiles, self.batch.tile_size, known.tiles_of(block)
        flat = tiles.view(n, size)
        by_numpy = self.batch.profile.by_numpy
        if by_numpy:
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
        signs = rows[odd] if by_numpy else flat[torch.from_numpy(odd).to(flat.device)].cpu().numpy()
        near = signs == 0
        if np.isnan(counted).any():
            # The sign of NaN is 0. But where the bound overflows, the sums may have done so, too.
            near |= np.isnan(signs) & np.isinf(bound)[:, None]
            flat.nan_to_num_(0.0)
        number, position = np.divmod(np.flatnonzero(near), size)
        self._sum_again(block, tiles, odd[number], position, known, filled)

    def _sum_again(
        self, block: Block, tiles: Tensor, tile: Places, position: Places, known: Prepared, filled: Tensor
    ) -> None:
        """Puts into tiles, ``(n, h, w)``, the signs of Psyche's sums; for the rest see :meth:`NearlyZero.signs`."""
        flat = tiles.view(block.tiles, -1)
        for part, signs in self._nearly_zero.signs(block, tile, position, known, filled):
            where = torch.from_numpy(tile[part]), torch.from_numpy(position[part])
            flat[where[0].to(flat.device), where[1].to(flat.device)] = torch.from_numpy(signs).to(flat.device)
