"""Parts of tensors that are cut as the whole: the tiles that a shard touches.

A *box* is the smallest rectangle of whole tiles around a shard. Where shards meet on an edge of tiles, a box is the
shard; otherwise it has, of each tile that is cut, the neighbour's elements too, at most 63 rows (or columns) on each
side with tiles of 64. Tiles know nothing of each other, so a box can be compressed by itself, with the bits that its
tiles have in the whole tensor.

What has no rows of tiles that could be told apart (vectors, batches of matrices, tensors of more than two dimensions
that are cut in another one than the first, tiles of one row) has the whole tensor for its box: vectors are a thousandth
of a model, and their products would be rounded by how many are multiplied together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from .tiling import TileGrid

__all__ = ["Box", "Span", "box_around"]

Span = tuple[int, int]
"""Elements ``[start, stop)`` of a dimension."""


@dataclass(frozen=True)
class PartGrid(TileGrid):
    """The tiles of a box, of the sizes that they have in the whole.

    Attributes:
        of_exact: whether the tensor's own grid is exact: all parts of it have the same form of momentum.
    """

    of_exact: bool = False

    @property
    @override
    def exact(self) -> bool:
        return self.of_exact


@dataclass(frozen=True)
class Box:
    """A rectangle of tiles of one tensor, and the shard in it.

    Attributes:
        spans: of the box, for each dimension of the tensor.
        shard: of the shard; it lies in ``spans``, or is empty.
        grid: of the box, a tensor of its own.
        rows, cols: tiles of the tensor's grid that are in the box; the whole grid where the box is the whole tensor.
    """

    spans: tuple[Span, ...]
    shard: tuple[Span, ...]
    grid: TileGrid
    rows: Span
    cols: Span

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the box."""
        return tuple(stop - start for start, stop in self.spans)

    @property
    def is_shard(self) -> bool:
        """Whether the box has nothing beside the shard."""
        return self.spans == self.shard

    def of_whole(self, tensor: Tensor) -> Tensor:
        """The box in a tensor of the whole shape, a view."""
        return tensor[tuple(slice(start, stop) for start, stop in self.spans)]

    def shard_of(self, tensor: Tensor) -> Tensor:
        """The shard in a tensor of the shape of the box, a view."""
        if any(start == stop for start, stop in self.shard):
            return tensor.new_empty([stop - start for start, stop in self.shard])
        inside = (
            slice(start - first, stop - first) for (start, stop), (first, _) in zip(self.shard, self.spans, strict=True)
        )
        return tensor[tuple(inside)]

    def tiles(self, whole: TileGrid) -> Tensor:
        """Numbers of its tiles among those of the tensor, in their order: ``(tiles,) int64``."""
        if self.grid.tiles == whole.tiles:
            return torch.arange(whole.tiles, device="cpu")
        rows, cols = (torch.arange(*span, device="cpu") for span in (self.rows, self.cols))
        return (rows[:, None] * whole.cols + cols).reshape(-1)


def box_around(shard: Sequence[Span], whole: TileGrid) -> Box:
    """The box of a shard.

    Args:
        shard: of the tensor of ``whole``, dimension by dimension.
        whole: its grid.
    """
    spans = tuple(shard)
    everything = tuple((0, size) for size in whole.shape)
    rows, cols = (0, whole.rows), (0, whole.cols)
    cut = [dim for dim, span in enumerate(spans) if span != everything[dim]]
    divisible = len(spans) >= 2 and whole.h > 1 and not whole.lead
    if not cut or not divisible or (len(spans) > 2 and cut != [0]):
        return Box(everything, spans, whole, rows, cols)
    if any(start >= stop for start, stop in spans):
        shape = tuple(0 if dim in cut else size for dim, size in enumerate(whole.shape))
        nothing = tuple((0, size) for size in shape)
        return Box(nothing, nothing, PartGrid(shape, (0,), 1, 1, whole.h, whole.w, whole.exact), (0, 0), (0, 0))
    rows = _tiles(spans[0], whole.h)
    around = [_elements(rows, whole.h, whole.height), *everything[1:]]
    if len(spans) == 2:
        cols = _tiles(spans[1], whole.w)
        around[1] = _elements(cols, whole.w, whole.width)
    shape = tuple(stop - start for start, stop in around)
    grid = PartGrid(shape, (), shape[0], math.prod(shape[1:]), whole.h, whole.w, whole.exact)
    return Box(tuple(around), spans, grid, rows, cols)


def _tiles(span: Span, side: int) -> Span:
    return span[0] // side, -(-span[1] // side)


def _elements(tiles: Span, side: int, length: int) -> Span:
    return tiles[0] * side, min(tiles[1] * side, length)
