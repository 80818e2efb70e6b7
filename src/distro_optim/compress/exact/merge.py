"""``exact-1`` as a :class:`~distro_optim.compress.merging.Merge`: the engines, and which of them does which tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from typing_extensions import override

from ...errors import ConfigurationError
from ..dct import Identity, Transform
from ..extraction import joined
from ..merging import Merge, presence_of, values_of
from ..plan import Batch, Block
from ..update import CompressedUpdate
from ..windows import descend
from .definition import BASIS_BITS, MAX_CONTRIBUTORS, MAX_TERMS, SIGN_SCALE
from .filtered import filtered_signs, fits_filter
from .limbs import integer_tiles
from .means import Means, means_of_signs, means_of_values
from .products import exact_tiles

__all__ = ["ExactMerge"]

_HAVE_FLOAT64: Final = ("cpu", "cuda")
"""Devices whose products in float64 are IEEE 754's; others get :mod:`~.limbs`."""


class ExactMerge(Merge):
    """Equal bits on all machines, in whatever order updates come.

    Raises:
        ConfigurationError: tiles are so large that the proof of the definition does not cover them.
    """

    def __init__(self, number: int, batch: Batch, transform: Transform, workers: int) -> None:
        super().__init__(number, batch, transform, workers)
        terms = min(MAX_CONTRIBUTORS * batch.k, batch.tile_size)
        if terms > MAX_TERMS:
            raise ConfigurationError(
                f"arithmetic='exact' is proven for {MAX_TERMS} coefficients in a tile, those of {MAX_CONTRIBUTORS} "
                f"peers together: tiles of {batch.h} x {batch.w} with compression_topk={batch.k} can have {terms}; "
                "give a smaller compression_chunk or compression_topk",
                name="compression_chunk",
                value=max(batch.h, batch.w),
            )
        self._plain = isinstance(transform, Identity)
        self._filters = fits_filter(batch.h, batch.w, batch.compute_dtype, batch.device)
        self._in_float64 = batch.device.type in _HAVE_FLOAT64

    @override
    def check(self, updates: Sequence[CompressedUpdate]) -> None:
        if len(updates) > MAX_CONTRIBUTORS:
            raise ConfigurationError(
                f"{len(updates)} updates in one step: arithmetic='exact' is proven for at most {MAX_CONTRIBUTORS}",
                name="updates",
                value=len(updates),
            )

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
        tiles, coefficients, spare = scratch
        means = self._means(block, updates, coefficients)
        if self._filters and not self._plain:
            filtered_signs(means, tiles, coefficients, spare)
        else:
            self._decode(means, tiles, coefficients).sign_()
        # A sign of -1, 0 or 1 times the learning rate is exact, so that it does not matter whether the subtraction is
        # fused with it. The signs are float32 (or float64 with the weights): 16-bit weights are promoted.
        descend(block, tiles, params, lr, params)

    @override
    def decode_block(
        self, block: Block, worker: int, scratch: Sequence[Tensor], updates: Sequence[CompressedUpdate]
    ) -> Tensor:
        tiles, coefficients, _ = scratch
        means = self._means(block, updates, coefficients)
        decoded = self._decode(means, tiles, coefficients)
        h, w = self.batch.h, self.batch.w
        factor = 1.0
        if not self._plain:
            for side in (h, w) if h > 1 else (w,):
                factor *= 2.0**-BASIS_BITS * (2 / side if side > 1 else 1.0) ** 0.5
        if means.unit is None:
            return decoded.mul_(factor / SIGN_SCALE)
        return torch.ldexp(decoded.mul_(factor), means.unit.unsqueeze(-1)).to(decoded.dtype)

    def _means(self, block: Block, updates: Sequence[CompressedUpdate], scratch: Tensor) -> Means:
        batch, rows, parts = self.batch, slice(block.start, block.stop), len(updates)
        index = joined([u.index[self.number][rows] for u in updates], dim=1).long()
        values = [u.value[self.number][rows] for u in updates]
        weight = presence_of(block, batch, updates)
        flat = scratch.view(block.tiles, -1)
        if all(value.dtype == torch.bool for value in values):
            return means_of_signs(index, joined(values, dim=1), weight, parts=parts, scratch=flat)
        numbers = values_of(values, batch.compute_dtype)
        return means_of_values(index, numbers, weight, parts=parts, scratch=flat)

    def _decode(self, means: Means, tiles: Tensor, scratch: Tensor) -> Tensor:
        """``tiles`` as numbers with the exact sign."""
        n = tiles.shape[0]
        q = means.once(scratch.view(n, -1))
        if self._plain:
            tiles.zero_().view(n, -1).scatter_add_(1, means.index, q)
            return tiles
        if self._in_float64:
            return exact_tiles(means.index, q, tiles)
        return tiles.copy_(integer_tiles(means.index, q, tiles.shape))
