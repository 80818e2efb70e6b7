"""The plan of a model: tiles of the same shape, of all its tensors, in batches that fit in the cache.

Made once, by :mod:`.planning`. A :class:`Batch` numbers the tiles of its tensors one after the other and cuts the row
into :class:`Block`\\ s of a few megabytes; a block is processed from gradient to coefficients (or from coefficients to
weights) before the next one is touched, in scratch memory that is reused. Small tensors share a block, a large one
has many.

How elements get from a tensor into its tiles and back is precomputed too: a :class:`Piece` is a run of tiles of one
tensor inside one block, and its :class:`Region`\\ s are strided windows, at most four (the inside, the last column,
the last row and the corner of a padded grid).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .profile import CPU, Profile
from .tiling import TileGrid

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
]

Arithmetic = Literal["exact", "float", "psyche"]
"""By which definition everybody's coefficients become a step on the weights."""

UpdateRule = Literal["sign", "rms"]
"""What the step on a tensor is made of: the signs of everybody's update, or the update itself in a fixed size."""

UPDATES: Final[tuple[UpdateRule, ...]] = get_args(UpdateRule)

PLACE_COLUMNS: Final = 6
"""Of :attr:`Batch.places`."""


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
