"""Signs that rounding decides: sums that are so near to 0 that they are done again, in Psyche's order.

A block has a few of them, and a hostile one may have as many as it has elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..plan import Batch, Block
from .basis import RUNNING_SUMS, running_sums, sum_in_order
from .prepared import Prepared, Preparing

__all__ = ["NearlyZero", "Places"]

_FEW: Final = 8
"""Sums that are repeated one by one, in plain Python, which takes less time than the first vector of a sum. Most blocks
have two or three."""

_NOTHING: Final = np.float32(0)

_POSITIONS_AT_A_TIME: Final = 1 << 14
"""Sums that are repeated together; bounds the memory that a hostile result can ask for."""

Places = npt.NDArray[np.intp]
Floats = npt.NDArray[np.float32]


class NearlyZero:
    """Sums again what is nearly zero; for one batch of a plan.

    Args:
        batch: the batch.
        preparing: of this batch.
        across: ``(w, w)``, the basis of rows.
    """

    def __init__(self, batch: Batch, preparing: Preparing, across: Tensor) -> None:
        self._w = batch.w
        self._preparing = preparing
        self._across = across.cpu().numpy()
        self._sums_of_columns = np.stack([running_sums(batch.w).numpy(), np.zeros(batch.w, dtype=np.int64)])
        # Half of the smallest number: what is no larger is rounded to 0.
        kind = torch.finfo(batch.value_dtype)
        self._rounds_to_zero = kind.tiny * kind.eps / 2

    def signs(
        self, block: Block, tile: Places, position: Places, known: Prepared, filled: Tensor
    ) -> Iterator[tuple[slice, Floats]]:
        """The signs of Psyche's sums, rounded as Psyche does, of parts of some elements of a block.

        Args:
            block: of the batch.
            tile, position: ``(u,)``, which elements, by their tile and where they are in it.
            known: of the block.
            filled: ``(n, slots, h)``: the terms are products of these columns with rows of the basis.
        """
        if 0 < len(tile) <= _FEW:
            with np.errstate(invalid="ignore", over="ignore"):
                sums = np.array([*self._one_by_one(block, tile, position, known, filled)], dtype=np.float32)
            yield slice(None), self._signs_of(sums)
            return
        for start in range(0, len(tile), _POSITIONS_AT_A_TIME):
            part = slice(start, start + _POSITIONS_AT_A_TIME)
            terms, running = self._terms(block, tile[part], position[part], known, filled)
            yield part, self._signs_of(sum_in_order(terms, running))

    def _one_by_one(
        self, block: Block, tile: Places, position: Places, known: Prepared, filled: Tensor
    ) -> Iterator[np.float32]:
        """The sums; arguments as for :meth:`signs`."""
        small = self._preparing.small_products([block], 1)
        columns, y = known.columns[known.tiles_of(block)].cpu().numpy(), filled.cpu().numpy()
        for n, place in zip(tile.tolist(), position.tolist(), strict=True):
            i, j = divmod(place, self._w)
            column = columns[n]
            running = self._sums_of_columns[int(small is not None and bool(small[n])), column]
            sums = [_NOTHING] * RUNNING_SUMS
            for number, term in zip(running.tolist(), y[n, :, i] * self._across[column, j], strict=True):
                sums[number] += term
            yield ((sums[0] + sums[1]) + sums[2]) + sums[3]

    def _terms(
        self, block: Block, tile: Places, position: Places, known: Prepared, filled: Tensor
    ) -> tuple[Floats, npt.NDArray[np.integer]]:
        i, j = np.divmod(position, self._w)
        column = known.columns[known.tiles_of(block)].cpu().numpy()[tile]
        with np.errstate(invalid="ignore"):  # infinity times 0
            terms = filled.cpu().numpy()[tile, :, i] * self._across[column, j[:, None]]
        small = self._preparing.small_products([block], 1)
        kind = 0 if small is None else small.cpu().numpy().astype(np.intp)[tile, None]
        return terms, self._sums_of_columns[kind, column]

    def _signs_of(self, sums: Floats) -> Floats:
        return np.where(np.abs(sums) > self._rounds_to_zero, np.sign(sums), np.float32(0))
