"""Plans a model: which tiles its tensors have, and how they are laid in batches, blocks and pieces."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch

from ..errors import ConfigurationError
from .plan import Arithmetic, Batch, Block, ParamSpec, Piece, Region, TilePlan, UpdateRule, compute_dtype
from .profile import Profile, profile_of
from .tiling import TileGrid, Tiling, tile_grid

__all__ = ["make_plan", "plan_of_part"]

_DEFINITIONS: Final[dict[Arithmetic, str]] = {"exact": "exact-1", "float": "", "psyche": "psyche-1"}
"""What goes into the layout: a definition that changes its results gets another name."""

_STEPS: Final[dict[UpdateRule, str]] = {"sign": "sign", "rms": "rms-1"}
"""What goes into the layout where a step is not the published one."""

_WORTH_FILLING: Final = 8
"""Where blocks are few, a tensor is cut to fill one of which more than the eighth part is empty."""

_MAX_TILE_SIZE: Final = torch.iinfo(torch.int32).max
"""Positions in a tile are held as int32."""


def make_plan(
    specs: Sequence[ParamSpec],
    tiling: Tiling,
    *,
    agreed: str = "",
    arithmetic: Arithmetic = "float",
    profile: Callable[[torch.device], Profile] = profile_of,
) -> TilePlan:
    """Plans the tiles of tensors ``specs`` under ``tiling``.

    Args:
        specs: of the tensors.
        tiling: how tensors are cut.
        agreed: what else peers must have in common to understand each other's updates; goes into the plan's layout.
        arithmetic: by which definition updates are merged; goes into the layout too.
        profile: how torch works on a device. Peers may differ in it.

    Raises:
        ConfigurationError: a tile is too large, or Psyche's clients know no such step.
    """
    if arithmetic == "psyche" and any((s.update, s.gain) != ("sign", 1.0) for s in specs):
        raise ConfigurationError(
            "Psyche's clients step by signs of the size of the learning rate: give update='sign' and gain=1 with "
            "arithmetic='psyche'",
            name="update",
        )
    grids = tuple(tile_grid(s.shape, s.chunk, tiling) for s in specs)
    for spec, grid in zip(specs, grids, strict=True):
        if grid.tile_size > _MAX_TILE_SIZE:
            raise ConfigurationError(
                f"compression_chunk={spec.chunk} makes a tile of {grid.h} x {grid.w} of a tensor of shape "
                f"{spec.shape}: give a chunk of at most {math.isqrt(_MAX_TILE_SIZE)}",
                name="compression_chunk",
                value=spec.chunk,
            )
    topk = tuple(max(1, min(s.topk, g.tile_size)) for s, g in zip(specs, grids, strict=True))
    batches, home = _make_batches(specs, grids, topk, profile, None)
    definition = _DEFINITIONS[arithmetic]
    layout = _layout_hash(specs, grids, topk, f"{agreed}\0{definition}" if definition else agreed)
    return TilePlan(tuple(specs), grids, topk, batches, home, layout, arithmetic)


def plan_of_part(
    whole: TilePlan, grids: Sequence[TileGrid], *, profile: Callable[[torch.device], Profile] = profile_of
) -> TilePlan:
    """The plan of a part of each tensor, in tiles of the whole: its batches are those of ``whole``, with fewer tiles.

    Args:
        whole: of the model.
        grids: of the parts, with the tiles of ``whole`` and ``exact`` as there.
        profile: as for :func:`make_plan`.
    """
    specs = [replace(spec, shape=grid.shape) for spec, grid in zip(whole.specs, grids, strict=True)]
    batches, home = _make_batches(specs, grids, whole.topk, profile, whole)
    return TilePlan(tuple(specs), tuple(grids), whole.topk, batches, home, whole.layout, whole.arithmetic)


def _make_batches(
    specs: Sequence[ParamSpec],
    grids: Sequence[TileGrid],
    topk: Sequence[int],
    profile: Callable[[torch.device], Profile],
    whole: TilePlan | None,
) -> tuple[tuple[Batch, ...], tuple[int | None, ...]]:
    members: dict[tuple[object, ...], list[int]] = {}
    for number, (spec, grid) in enumerate(zip(specs, grids, strict=True)):
        if grid.tiles:
            key = (
                spec.group,
                spec.update,
                spec.gain,
                grid.h,
                grid.w,
                grid.exact,
                topk[number],
                spec.dtype,
                spec.device,
            )
            members.setdefault(key, []).append(number)

    home: list[int | None] = [None] * len(specs)
    batches: list[Batch] = []
    for numbers in members.values():
        for number in numbers:
            home[number] = len(batches)
        batch = _make_batch(numbers, specs, grids, topk, profile(specs[numbers[0]].device))
        of_all = None if whole is None else whole.home[numbers[0]]
        if whole is not None and of_all is not None:
            batch = replace(batch, tiles_of_all=whole.batches[of_all].tiles)
        batches.append(batch)
    return tuple(batches), tuple(home)


def _make_batch(
    numbers: list[int],
    specs: Sequence[ParamSpec],
    grids: Sequence[TileGrid],
    topk: Sequence[int],
    profile: Profile,
) -> Batch:
    spec, grid = specs[numbers[0]], grids[numbers[0]]
    tiles = sum(grids[number].tiles for number in numbers)
    capacity = _capacity(tiles, grid.tile_size, profile)
    blocks: list[Block] = []
    pieces: list[Piece] = []
    ranges: dict[int, tuple[int, int]] = {}
    total = block_start = 0
    for number in numbers:
        ranges[number] = (total, total + grids[number].tiles)
        room = capacity - (total - block_start)
        # A block more is some forty launches more, a piece three.
        fills = profile.most_blocks is not None and room * _WORTH_FILLING >= capacity
        for window in _windows(grids[number], capacity, first=room if fills else capacity):
            size = window.tiles
            if total + size - block_start > capacity:
                blocks.append(Block(block_start, total, tuple(pieces)))
                pieces, block_start = [], total
            pieces.append(window.piece(number, total - block_start))
            total += size
    blocks.append(Block(block_start, total, tuple(pieces)))
    return Batch(
        group=spec.group,
        h=grid.h,
        w=grid.w,
        k=topk[numbers[0]],
        compute_dtype=compute_dtype(spec.dtype),
        value_dtype=spec.dtype,
        device=spec.device,
        tiles=total,
        ranges=ranges,
        blocks=tuple(blocks),
        update=spec.update,
        gain=spec.gain,
        profile=profile,
        tiles_of_all=total,
    )


def _capacity(tiles: int, tile_size: int, profile: Profile) -> int:
    """The most tiles of a block, in a batch of so many."""
    usual = max(1, profile.block_elements // tile_size)
    smaller = max(-(-tiles // profile.fewest_blocks), -(-usual // 2))
    larger = -(-tiles // (profile.most_blocks or tiles))
    return max(min(usual, smaller), larger)


@dataclass(frozen=True)
class _Window:
    """A box of tiles that is a run in row-major order: matrices b0:b1, tile rows y0:y1, tile columns x0:x1."""

    grid: TileGrid
    b0: int
    b1: int
    y0: int
    y1: int
    x0: int
    x1: int

    @property
    def tiles(self) -> int:
        return (self.b1 - self.b0) * (self.y1 - self.y0) * (self.x1 - self.x0)

    def piece(self, param: int, block_start: int) -> Piece:
        g = self.grid
        start = (self.b0 * g.rows + self.y0) * g.cols + self.x0
        regions = tuple(self._regions(block_start))
        covered = sum(math.prod(r.size) for r in regions)
        partial = covered < self.tiles * g.tile_size
        # A part of a matrix may have one row, too, but its tiles have more.
        flat = g.height == 1 and g.h == 1 and g.batch == 1
        return Piece(param, start, start + self.tiles, block_start, regions, partial, flat)

    def _regions(self, block_start: int) -> Iterator[Region]:
        g = self.grid
        matrices, tile = self.b1 - self.b0, g.tile_size
        columns = self.x1 - self.x0
        block_stride = ((self.y1 - self.y0) * columns * tile, columns * tile, tile, g.w, 1)
        tensor_stride = (g.height * g.width, g.h * g.width, g.w, g.width, 1)
        for y0, y1, rows in _whole_and_rest(self.y0, self.y1, g.h, g.height):
            for x0, x1, cols in _whole_and_rest(self.x0, self.x1, g.w, g.width):
                yield Region(
                    size=(matrices, y1 - y0, x1 - x0, rows, cols),
                    tensor_stride=tensor_stride,
                    tensor_offset=self.b0 * g.height * g.width + y0 * g.h * g.width + x0 * g.w,
                    block_stride=block_stride,
                    block_offset=(block_start + (y0 - self.y0) * columns + x0 - self.x0) * tile,
                )


def _whole_and_rest(start: int, stop: int, side: int, length: int) -> Iterator[tuple[int, int, int]]:
    """Cuts tiles ``start:stop`` of a dimension into those that lie inside it and the one that reaches beyond."""
    whole = min(stop, length // side)
    if whole > start:
        yield start, whole, side
    if stop > max(whole, start):
        yield max(whole, start), stop, length % side


def _windows(grid: TileGrid, capacity: int, *, first: int) -> Iterator[_Window]:
    """Cuts a grid into boxes of at most ``capacity`` tiles, in tile order; of a matrix, the first of at most ``first``.

    Args:
        grid: of the tensor.
        capacity: at least 1.
        first: at most ``capacity``; of other than matrices, and where no row of tiles fits, it does not count.
    """
    rows, cols, batch = grid.rows, grid.cols, grid.batch
    if batch == 1 and cols <= first < min(rows * cols, capacity):
        top = first // cols
        yield _Window(grid, 0, 1, 0, top, 0, cols)
        step = capacity // cols
        for y in range(top, rows, step):
            yield _Window(grid, 0, 1, y, min(y + step, rows), 0, cols)
    elif rows * cols <= capacity:
        step = capacity // (rows * cols)
        for b in range(0, batch, step):
            yield _Window(grid, b, min(b + step, batch), 0, rows, 0, cols)
    elif cols <= capacity:
        step = capacity // cols
        for b in range(batch):
            for y in range(0, rows, step):
                yield _Window(grid, b, b + 1, y, min(y + step, rows), 0, cols)
    else:
        for b in range(batch):
            for y in range(rows):
                for x in range(0, cols, capacity):
                    yield _Window(grid, b, b + 1, y, y + 1, x, min(x + capacity, cols))


def _layout_hash(specs: Sequence[ParamSpec], grids: Sequence[TileGrid], topk: Sequence[int], agreed: str) -> bytes:
    digest = hashlib.sha256(agreed.encode())
    for spec, grid, k in zip(specs, grids, topk, strict=True):
        digest.update(repr((spec.shape, str(spec.dtype), grid.h, grid.w, k)).encode())
        if (spec.update, spec.gain) != ("sign", 1.0):
            digest.update(repr((_STEPS[spec.update], spec.gain)).encode())
    return digest.digest()
