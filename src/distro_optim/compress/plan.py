"""The plan of a model: tiles of the same shape, of all its tensors, in batches that fit in the cache.

Made once. A :class:`Batch` numbers the tiles of its tensors one after the other and cuts the row into
:class:`Block`\\ s of a few megabytes; a block is processed from gradient to coefficients (or from coefficients to
weights) before the next one is touched, in scratch memory that is reused. Small tensors share a block, a large one
has many.

How elements get from a tensor into its tiles and back is precomputed too: a :class:`Piece` is a run of tiles of one
tensor inside one block, and its :class:`Region`\\ s are strided windows, at most four (the inside, the last column,
the last row and the corner of a padded grid).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import ConfigurationError
from .profile import CPU, Profile, profile_of
from .tiling import TileGrid, Tiling, tile_grid

_T = TypeVar("_T")

__all__ = [
    "PLACE_COLUMNS",
    "UPDATES",
    "Arithmetic",
    "Batch",
    "Block",
    "ParamSpec",
    "Piece",
    "Region",
    "TilePlan",
    "UpdateRule",
    "compute_dtype",
    "make_plan",
    "plan_of_part",
]

Arithmetic = Literal["exact", "float", "psyche"]
"""By which definition everybody's coefficients become a step on the weights."""

UpdateRule = Literal["sign", "rms"]
"""What the step on a tensor is made of: the signs of everybody's update, or the update itself in a fixed size."""

UPDATES: Final[tuple[UpdateRule, ...]] = get_args(UpdateRule)

_DEFINITIONS: Final[dict[Arithmetic, str]] = {"exact": "exact-1", "float": "", "psyche": "psyche-1"}
"""What goes into the layout: a definition that changes its results gets another name."""

_STEPS: Final[dict[UpdateRule, str]] = {"sign": "sign", "rms": "rms-1"}
"""What goes into the layout where a step is not the published one."""

PLACE_COLUMNS: Final = 6
"""Of :attr:`Batch.places`."""

_WORTH_FILLING: Final = 8
"""Where blocks are few, a tensor is cut to fill one of which more than the eighth part is empty."""

_MAX_TILE_SIZE: Final = torch.iinfo(torch.int32).max
"""Positions in a tile are held as int32."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of the arithmetic on tensors of ``dtype``: half precision would lose small gradients in the momentum."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class ParamSpec:
    """What the plan has to know of a tensor.

    Attributes:
        group: settings it shares with others (index of its parameter group).
        chunk: longest side of a tile.
        topk: coefficients kept per tile.
        update: what a step is made of.
        gain: what its learning rate is multiplied with.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    group: int
    chunk: int
    topk: int
    update: UpdateRule = "sign"
    gain: float = 1.0


@dataclass(frozen=True)
class Region:
    """A window of whole or partial tiles: the same ``size``, once in the tensor and once in the block.

    ``size`` is (matrices, tile rows, tile columns, rows in a tile, columns in a tile).
    """

    size: tuple[int, ...]
    tensor_stride: tuple[int, ...]
    tensor_offset: int
    block_stride: tuple[int, ...]
    block_offset: int

    @cached_property
    def is_shuffled_run(self) -> bool:
        """Whether the window is one run of the tensor's memory, whole rows of it, that lies in the block reordered."""
        matrices, tile_rows, tile_columns, rows, columns = self.size
        matrix_stride, _, _, row_stride, _ = self.tensor_stride
        whole_rows = tile_columns * columns == row_stride
        whole_matrices = matrices == 1 or tile_rows * rows * row_stride == matrix_stride
        return whole_rows and whole_matrices and tile_columns > 1 and rows > 1

    def of_tensor(self, tensor: Tensor) -> Tensor:
        """The window in a contiguous tensor of the planned shape."""
        return tensor.as_strided(self.size, self.tensor_stride, tensor.storage_offset() + self.tensor_offset)

    def of_block(self, block: Tensor) -> Tensor:
        """The window in a contiguous ``(n, h, w)`` block."""
        return block.as_strided(self.size, self.block_stride, block.storage_offset() + self.block_offset)

    def run_of_tensor(self, tensor: Tensor) -> Tensor:
        """Of a shuffled run, or of a flat piece: its elements in the tensor, ``(numel,)``."""
        return tensor.view(-1)[self.tensor_offset : self.tensor_offset + math.prod(self.size)]

    def runs(self, tensor: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
        """Of a flat piece: its elements in the tensor and in the block, ``(numel,)``."""
        run = slice(self.block_offset, self.block_offset + math.prod(self.size))
        return self.run_of_tensor(tensor), block.view(-1)[run]

    def run_in_block(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """Room for these in a block of the same size, ``(numel,)``, and as a window of the shape ``size``."""
        run = block.view(-1)[self.block_offset : self.block_offset + math.prod(self.size)]
        return run, run.as_strided(self.size, self.tensor_stride, run.storage_offset())


@dataclass(frozen=True)
class Piece:
    """Tiles ``[start, stop)`` of tensor ``param``, at ``[block_start, block_stop)`` of their block.

    Attributes:
        regions: windows that together hold every element of the tensor in these tiles once.
        partial: some tiles reach beyond the tensor, so that the regions do not cover them.
        flat: tiles have one row, and the piece is of a vector: regions are runs of memory, in the tensor and the block.
    """

    param: int
    start: int
    stop: int
    block_start: int
    regions: tuple[Region, ...]
    partial: bool
    flat: bool = False

    @property
    def block_stop(self) -> int:
        """One past its last tile in the block."""
        return self.block_start + self.stop - self.start


@dataclass(frozen=True)
class Block:
    """Tiles ``[start, stop)`` of a batch."""

    start: int
    stop: int
    pieces: tuple[Piece, ...]

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return self.stop - self.start


@dataclass(frozen=True)
class Batch:
    """All tiles of one shape that share settings, element types and device, and are exact or not.

    Attributes:
        k: coefficients per tile.
        compute_dtype: of the arithmetic, by :func:`compute_dtype`.
        value_dtype: of a transmitted value: that of the tensors.
        ranges: tensor -> its tiles ``[start, stop)`` in the batch.
        update, gain: as in :class:`ParamSpec`.
        profile: how torch works on it.
        tiles_of_all: tiles of the batch in the whole model, where this is the plan of a part of it: what is chosen by
            size is chosen alike.
    """

    group: int
    h: int
    w: int
    k: int
    compute_dtype: torch.dtype
    value_dtype: torch.dtype
    device: torch.device
    tiles: int
    ranges: dict[int, tuple[int, int]]
    blocks: tuple[Block, ...] = field(repr=False)
    update: UpdateRule = "sign"
    gain: float = 1.0
    profile: Profile = CPU
    tiles_of_all: int = 0

    @property
    def tile_size(self) -> int:
        """Elements in a tile."""
        return self.h * self.w

    @cached_property
    def places(self) -> npt.NDArray[np.int64]:
        """Where each tile lies, ``(tiles, PLACE_COLUMNS)``, for code that goes through memory itself.

        The columns: the tensor's number; the offset of the tile's first element in it and the distance of its rows,
        in elements; how many of its rows and columns lie in the tensor; its number among the tiles of the tensor.
        """
        places = np.zeros((self.tiles, PLACE_COLUMNS), np.int64)
        for block in self.blocks:
            for piece in block.pieces:
                # Every tile lies in one region.
                for region in piece.regions:
                    box = np.indices(region.size[:3]).reshape(3, -1)
                    tiles = (
                        np.dot(region.block_stride[:3], box) // self.tile_size + region.block_offset // self.tile_size
                    )
                    offsets = region.tensor_offset + np.dot(region.tensor_stride[:3], box)
                    columns = (piece.param, offsets, region.tensor_stride[3], *region.size[3:])
                    for column, values in enumerate((*columns, piece.start + tiles - piece.block_start)):
                        places[block.start + tiles, column] = values
        return places


@dataclass(frozen=True)
class TilePlan:
    """All batches of a model; tensors are numbered in the order in which they were given.

    Attributes:
        grids: of every tensor, by number.
        home: tensor -> index of its batch, or None where it has no elements.
        layout: 32 bytes that are equal on two peers exactly if their plans are.
        arithmetic: by which definition updates are merged.
    """

    specs: tuple[ParamSpec, ...]
    grids: tuple[TileGrid, ...]
    topk: tuple[int, ...]
    batches: tuple[Batch, ...]
    home: tuple[int | None, ...]
    layout: bytes
    arithmetic: Arithmetic = "float"
    _derived: dict[Callable[[TilePlan], Any], Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.specs)

    def derived(self, make: Callable[[TilePlan], _T]) -> _T:
        """``make(self)``, computed once and kept as long as the plan.

        Args:
            make: a function of a module, by which the answer is found again. Two threads that come first at the same
                time may both call it.
        """
        if make not in self._derived:
            self._derived[make] = make(self)
        answer: _T = self._derived[make]
        return answer


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
    capacity = max(1, profile.block_elements // grid.tile_size, -(-tiles // (profile.most_blocks or tiles)))
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
