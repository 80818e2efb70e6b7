"""``exact-1`` as a :class:`~distro_optim.compress.merging.Merge`: the engines, and which of them does which tiles."""

from __future__ import annotations

from bisect import bisect_left
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
from .products import SPARSE_LIMIT, exact_tiles
from .rms import MAX_SQUARES, exponent_of, factor_of

__all__ = ["ExactMerge", "check_sums"]

_VALUES_OF_AN_ELEMENT: Final = 3 / 8
"""So many values, for each element of a block, become means together on an accelerator. Each takes some 32 bytes for a
moment, so that together they take no more memory than the three buffers of a block."""


def check_sums(batch: Batch) -> None:
    """Raises ConfigurationError where sums of squares of one of the tensors of a batch could exceed 64 bits."""
    terms = min(MAX_CONTRIBUTORS * batch.k, batch.tile_size)
    most_tiles = max(stop - start for start, stop in batch.ranges.values())
    if batch.update == "rms" and most_tiles * terms > MAX_SQUARES:
        raise ConfigurationError(
            f"update='rms' with arithmetic='exact' is proven for {MAX_SQUARES} coefficients of a tensor, those of "
            f"{MAX_CONTRIBUTORS} peers together: one of {most_tiles} tiles with compression_topk={batch.k} can "
            f"have {most_tiles * terms}; give it a group with update='sign'",
            name="update",
            value="rms",
        )


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
        check_sums(batch)
        self._largest: Tensor | None = None
        self._group: tuple[range, Means] | None = None  # of blocks that follow each other, and were last asked for
        self._plain = isinstance(transform, Identity)
        self._filters = fits_filter(batch.h, batch.w, batch.compute_dtype, batch.profile)

    @override
    def check(self, updates: Sequence[CompressedUpdate]) -> None:
        if len(updates) > MAX_CONTRIBUTORS:
            raise ConfigurationError(
                f"{len(updates)} updates in one step: arithmetic='exact' is proven for at most {MAX_CONTRIBUTORS}",
                name="updates",
                value=len(updates),
            )
        self._largest = self._largest_of_tensors(updates) if self.measures else None
        self._group = None

    def _largest_of_tensors(self, updates: Sequence[CompressedUpdate]) -> Tensor | None:
        """The largest magnitude of a tensor at all of its tiles, ``(tiles, 1)``: they share a unit. None for signs."""
        values = [u.value[self.number] for u in updates]
        if all(value.dtype == torch.bool for value in values):
            return None
        if self.sizes is not None:
            known = [self.sizes.largest[number] for number in self.batch.ranges]
            counts = torch.tensor([stop - start for start, stop in self.batch.ranges.values()], device="cpu")
            of_tiles = torch.tensor(known, dtype=self.batch.compute_dtype, device="cpu").repeat_interleave(counts)
            return of_tiles.unsqueeze(1).to(self.batch.device)
        largest = torch.zeros(self.batch.tiles, 1, dtype=self.batch.compute_dtype, device=self.batch.device)
        for update, value in zip(updates, values, strict=True):
            magnitude = values_of([value], self.batch.compute_dtype).abs().amax(1, keepdim=True)
            for number, (start, stop) in self.batch.ranges.items():
                if update.present[number]:
                    part = largest[start:stop]
                    torch.maximum(part, magnitude[start:stop].amax(), out=part)
        return largest

    @override
    def largest(self, updates: Sequence[CompressedUpdate]) -> dict[int, float]:
        largest = self._largest_of_tensors(updates)
        if largest is None:
            return {}
        firsts = torch.tensor([start for start, _ in self.batch.ranges.values()], device=self.batch.device)
        return dict(zip(self.batch.ranges, largest.view(-1)[firsts].tolist(), strict=True))

    @override
    def type_of_squares(self) -> torch.dtype:
        return torch.int64

    @override
    def squares_of_block(
        self, block: Block, worker: int, scratch: Sequence[Tensor], updates: Sequence[CompressedUpdate]
    ) -> Tensor:
        means = self._means(block, updates, scratch[1])
        return means.once(scratch[1].view(block.tiles, -1)).to(torch.int64).square_().sum(1)

    @override
    def factor(self, number: int, lr: float) -> float:
        squares, tiles = self.squares_and_tiles(number)
        h, w = self.batch.h, self.batch.w
        exponent, count = (0, h * w) if self._plain else (exponent_of(h, w), 1)
        double = self.batch.compute_dtype == torch.float64
        return factor_of(int(squares), tiles * count, exponent, lr, double=double)

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
        if self.measures:
            self.descend_measured(block, self._decode(means, tiles, coefficients, spare), params, lr)
            return
        if self._filters and not self._plain:
            filtered_signs(means, tiles, coefficients, spare)
        else:
            self._decode(means, tiles, coefficients, spare).sign_()
        # A sign of -1, 0 or 1 times the learning rate is exact, so that it does not matter whether the subtraction is
        # fused with it. The signs are float32 (or float64 with the weights): 16-bit weights are promoted.
        descend(block, tiles, params, lr, params, runs_first=self.batch.profile.runs_first)

    @override
    def decode_block(
        self, block: Block, worker: int, scratch: Sequence[Tensor], updates: Sequence[CompressedUpdate]
    ) -> Tensor:
        tiles, coefficients, spare = scratch
        means = self._means(block, updates, coefficients)
        decoded = self._decode(means, tiles, coefficients, spare)
        h, w = self.batch.h, self.batch.w
        factor = 1.0
        if not self._plain:
            for side in (h, w) if h > 1 else (w,):
                factor *= 2.0**-BASIS_BITS * (2 / side if side > 1 else 1.0) ** 0.5
        if means.unit is None:
            return decoded.mul_(factor / SIGN_SCALE)
        return torch.ldexp(decoded.mul_(factor), means.unit.unsqueeze(-1)).to(decoded.dtype)

    def _means(self, block: Block, updates: Sequence[CompressedUpdate], scratch: Tensor) -> Means:
        if self.batch.profile.by_threads or all(u.value[self.number].dtype == torch.bool for u in updates):
            return self._means_of([block], updates, scratch)
        if self._group is None or not self._group[0].start <= block.start < self._group[0].stop:
            blocks = self._with_next(block, len(updates) * self.batch.k)
            rows = range(blocks[0].start, blocks[-1].stop)
            self._group = rows, self._means_of(blocks, updates, scratch)
        rows, means = self._group
        if block.stop == rows.stop:
            self._group = None  # its memory is free until the next step
        return means.rows(slice(block.start - rows.start, block.stop - rows.start))

    def _with_next(self, block: Block, coefficients: int) -> Sequence[Block]:
        """A block and those after it, of whose values the means may be made together: each step of it is a launch."""
        blocks = self.batch.blocks
        at = bisect_left(blocks, block.start, key=lambda other: other.start)
        largest = max(other.tiles for other in blocks)
        if 2 * block.tiles < largest:
            return [block]  # in whose room few tiles can be added up at a time
        stop, most = at + 1, largest * self.batch.tile_size * _VALUES_OF_AN_ELEMENT
        while stop < len(blocks) and (blocks[stop].stop - block.start) * coefficients <= most:
            stop += 1
        return blocks[at:stop]

    def _means_of(self, blocks: Sequence[Block], updates: Sequence[CompressedUpdate], scratch: Tensor) -> Means:
        batch, rows, parts = self.batch, slice(blocks[0].start, blocks[-1].stop), len(updates)
        index = joined([u.index[self.number][rows] for u in updates], dim=1)
        if parts > 1 or parts * batch.k > SPARSE_LIMIT or self._plain or not batch.profile.float64:
            index = index.long()  # as whoever writes to these positions wants it
        values = [u.value[self.number][rows] for u in updates]
        weight = presence_of(batch, blocks, updates)
        flat = scratch.view(len(scratch), -1)
        if all(value.dtype == torch.bool for value in values):
            return means_of_signs(index, joined(values, dim=1), weight, parts=parts, scratch=flat)
        numbers = values_of(values, batch.compute_dtype)
        largest = None if self._largest is None else self._largest[rows]
        return means_of_values(
            index, numbers, weight, parts=parts, scratch=flat, profile=batch.profile, largest=largest
        )

    def _decode(self, means: Means, tiles: Tensor, scratch: Tensor, spare: Tensor) -> Tensor:
        """``tiles`` as numbers with the exact sign; overwrites the other two as well."""
        n = tiles.shape[0]
        if self.batch.profile.float64 and not self._plain:
            return exact_tiles(means, tiles, scratch, self.batch.profile, room=self._room(scratch, spare))
        q = means.once(scratch.view(n, -1))
        if self._plain:
            tiles.zero_().view(n, -1).scatter_add_(1, means.index, q)
            return tiles
        return tiles.copy_(integer_tiles(means.index, q, tiles.shape, self.batch.profile))

    def _room(self, first: Tensor, second: Tensor) -> Tensor | None:
        """Two scratch buffers as one of float64, on an accelerator, where they lie side by side."""
        if self.batch.profile.by_threads:
            return None  # what stays in the cache is faster
        if first.dtype == torch.float64:
            return second.view(-1)
        size = first.numel()
        if second.storage_offset() != first.storage_offset() + size or first.storage_offset() % 2:
            return None
        return first.view(-1).as_strided((2 * size,), (1,)).view(torch.float64)
