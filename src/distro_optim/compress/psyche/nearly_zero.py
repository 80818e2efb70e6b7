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
from .basis import running_sums, sum_in_order
from .prepared import Prepared, Preparing

__all__ = ["NearlyZero", "Places"]

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
        for start in range(0, len(tile), _POSITIONS_AT_A_TIME):
            part = slice(start, start + _POSITIONS_AT_A_TIME)
            yield part, self._signs_of(*self._terms(block, tile[part], position[part], known, filled))

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

    def _signs_of(self, terms: Floats, running: npt.NDArray[np.integer]) -> Floats:
        sums = sum_in_order(terms, running)
        return np.where(np.abs(sums) > self._rounds_to_zero, np.sign(sums), np.float32(0))
