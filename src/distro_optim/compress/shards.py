"""Parts of tensors that are cut as the whole: the tiles of a shard.

Where a boundary between shards cuts tiles, the question is whose they are:

- Those that a shard *touches* are decoded by each rank that has a part of them: each weight steps by itself, where it
  lies, and updates are everywhere (:func:`box_around`).
- Those that a shard *owns*, of which it has the first element, have their momentum there. So each tile has one owner,
  or of copies of a shard each, and the neighbours' rows of its gradient have to come there (:func:`box_owned`): at most
  63 with tiles of 64.

Either way the tiles of a shard are a rectangle of whole tiles, its *box*. Where shards meet on an edge of tiles, both
boxes are the shard. Tiles know nothing of each other, so a box can be compressed by itself, with the bits that its
tiles have in the whole tensor.

What has no rows of tiles that could be told apart (vectors, tensors of more than two dimensions that are cut in another
one than the first, tiles of one row) has the whole tensor for its boxes: vectors are a thousandth of a model, and their
products would be rounded by how many are multiplied together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from .tiling import TileGrid

__all__ = ["Box", "Span", "box_around", "box_owned", "common_part", "part_of"]

Span = tuple[int, int]
"""Elements ``[start, stop)`` of a dimension."""


def common_part(first: Sequence[Span], second: Sequence[Span]) -> tuple[Span, ...] | None:
    """The elements that are in both rectangles of a tensor; None where there are none."""
    both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(first, second, strict=True))
    return None if any(start >= stop for start, stop in both) else both


def part_of(tensor: Tensor, spans: Sequence[Span], part: Sequence[Span]) -> Tensor:
    """The elements ``part`` of the whole tensor in one that has its elements ``spans``, a view."""
    inside = (slice(start - first, stop - first) for (start, stop), (first, _) in zip(part, spans, strict=True))
    return tensor[tuple(inside)]


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
    """A rectangle of tiles of one tensor, and the shard that they belong to.

    Attributes:
        spans: of the box, for each dimension of the tensor.
        shard: of the shard, likewise.
        grid: of the box, a tensor of its own.
        rows, cols: tiles of the tensor's grid that are in the box; rows of all its matrices, one after the other. The
            whole grid where the box is the whole tensor.
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
        """Whether the box has the elements of the shard and no others."""
        return self.spans == self.shard

    def of_whole(self, tensor: Tensor) -> Tensor:
        """The box in a tensor of the whole shape, a view."""
        return tensor[tuple(slice(start, stop) for start, stop in self.spans)]

    def shard_of(self, tensor: Tensor) -> Tensor:
        """The shard in a tensor of the shape of the box, which has all of it, a view."""
        if any(start == stop for start, stop in self.shard):
            return tensor.new_empty([stop - start for start, stop in self.shard])
        return part_of(tensor, self.spans, self.shard)

    def tiles(self, whole: TileGrid) -> Tensor:
        """Numbers of its tiles among those of the tensor, in their order: ``(tiles,) int64``."""
        if self.grid.tiles == whole.tiles:
            return torch.arange(whole.tiles, device="cpu")
        rows, cols = (torch.arange(*span, device="cpu") for span in (self.rows, self.cols))
        return (rows[:, None] * whole.cols + cols).reshape(-1)


def box_around(shard: Sequence[Span], whole: TileGrid) -> Box:
    """The tiles that a shard has any element of.

    Args:
        shard: of the tensor of ``whole``, dimension by dimension.
        whole: its grid.
    """
    return _box(shard, whole, owned=False)


def box_owned(shard: Sequence[Span], whole: TileGrid) -> Box:
    """The tiles that a shard has the first element of: none where it lies inside of a tile. Arguments as above."""
    return _box(shard, whole, owned=True)


def _box(shard: Sequence[Span], whole: TileGrid, *, owned: bool) -> Box:
    spans = tuple(shard)
    everything = tuple((0, size) for size in whole.shape)
    cut = [dim for dim, span in enumerate(spans) if span != everything[dim]]
    rows_are_told_apart = len(spans) >= 2 and whole.h > 1
    if not cut or not rows_are_told_apart or (len(spans) > 2 and cut != [0]):
        return Box(everything, spans, whole, (0, whole.batch * whole.rows), (0, whole.cols))
    if any(start >= stop for start, stop in spans):
        return _nothing(_without(spans, cut), whole, cut)
    if whole.lead:
        # Whole matrices, of which each has whole tiles.
        each = math.prod(whole.lead[1:]) * whole.rows
        start, stop = spans[0]
        shape = (stop - start, *whole.shape[1:])
        grid = PartGrid(shape, shape[: len(whole.lead)], whole.height, whole.width, whole.h, whole.w, whole.exact)
        return Box(spans, spans, grid, (start * each, stop * each), (0, whole.cols))
    rows, cols = _tiles(spans[0], whole.h, owned), (0, whole.cols)
    around = [_elements(rows, whole.h, whole.height), *everything[1:]]
    if len(spans) == 2:
        cols = _tiles(spans[1], whole.w, owned)
        around[1] = _elements(cols, whole.w, whole.width)
    if rows[0] == rows[1] or cols[0] == cols[1]:
        return _nothing(spans, whole, cut)
    shape = tuple(stop - start for start, stop in around)
    grid = PartGrid(shape, (), shape[0], math.prod(shape[1:]), whole.h, whole.w, whole.exact)
    return Box(tuple(around), spans, grid, rows, cols)


def _without(spans: tuple[Span, ...], cut: Sequence[int]) -> tuple[Span, ...]:
    return tuple((0, 0) if dim in cut else span for dim, span in enumerate(spans))


def _nothing(shard: tuple[Span, ...], whole: TileGrid, cut: Sequence[int]) -> Box:
    """The box of a shard without tiles."""
    spans = _without(shard, cut)
    shape = tuple(stop - start for start, stop in spans)
    return Box(spans, shard, PartGrid(shape, (0,), 1, 1, whole.h, whole.w, whole.exact), (0, 0), (0, 0))


def _tiles(span: Span, side: int, owned: bool) -> Span:
    return -(-span[0] // side) if owned else span[0] // side, -(-span[1] // side)


def _elements(tiles: Span, side: int, length: int) -> Span:
    return tiles[0] * side, min(tiles[1] * side, length)
