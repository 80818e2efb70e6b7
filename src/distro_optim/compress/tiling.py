"""How a tensor of any shape is cut into tiles.

Two rules, named after what they do with a dimension that is longer than ``chunk``:

``"divisor"``
    the published rule of DeMo and Psyche: the tile is the largest divisor of the dimension that is at most
    ``chunk`` long (bloc97/DeMo ``demo.py``, PsycheFoundation/psyche ``shared/modeling/src/distro.rs``). A prime
    dimension falls to tiles of 1. Only the last two dimensions are cut; leading ones are a batch.
``"padded"``
    tiles are ``chunk`` long and the last one is filled up with zeros. A tensor of more than two dimensions is
    first flattened to ``(shape[0], rest)``, so a 3x3 convolution compresses as well as a square matrix.

The two agree wherever a dimension is at most ``chunk`` or divides by it, and the tensor has at most two dimensions.
A scalar is a vector of one element; an empty tensor has no tiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal, get_args

__all__ = ["TILINGS", "TileGrid", "Tiling", "largest_divisor", "tile_grid"]

Tiling = Literal["divisor", "padded"]
TILINGS: Final[tuple[str, ...]] = get_args(Tiling)


def largest_divisor(size: int, limit: int) -> int:
    """The largest divisor of ``size`` that is at most ``limit``; both are at least 1."""
    best = 1
    for small in range(1, math.isqrt(size) + 1):
        if size % small == 0:
            if small <= limit:
                best = max(best, small)
            if size // small <= limit:
                best = max(best, size // small)
    return best


@dataclass(frozen=True)
class TileGrid:
    """The tiles of one tensor.

    The tensor is seen as a batch of matrices, ``(*lead, height, width)``, and each matrix as ``rows`` x ``cols``
    tiles of ``h`` x ``w`` elements. Tiles are numbered in row-major order of (matrix, row, column); inside a tile,
    elements are row-major too. In a padded grid the last row and the last column of tiles may reach beyond the matrix.
    """

    shape: tuple[int, ...]
    lead: tuple[int, ...]
    height: int
    width: int
    h: int
    w: int

    @property
    def batch(self) -> int:
        """Number of matrices."""
        return math.prod(self.lead)

    @property
    def rows(self) -> int:
        """Tiles of a matrix from top to bottom."""
        return -(-self.height // self.h)

    @property
    def cols(self) -> int:
        """Tiles of a matrix from left to right."""
        return -(-self.width // self.w)

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return self.batch * self.rows * self.cols

    @property
    def tile_size(self) -> int:
        """Elements in a tile, padding included: Psyche's ``totalk``."""
        return self.h * self.w

    @property
    def exact(self) -> bool:
        """Whether the tensor is a matrix, and each tile lies inside it and has two dimensions."""
        return len(self.shape) == 2 and self.h > 1 and self.height % self.h == 0 and self.width % self.w == 0

    @property
    def coded_shape(self) -> tuple[int, ...]:
        """Shape of the encoded tensor: Psyche's ``xshape``.

        ``(tiles, w)`` for a vector, ``(..., rows, cols, h, w)`` otherwise, with the leading dimensions of the
        tensor where they were kept as a batch.
        """
        if len(self.shape) <= 1:
            return (self.tiles, self.w)
        return (*self.lead, self.rows, self.cols, self.h, self.w)

    @property
    def tile_counts(self) -> tuple[int, ...]:
        """What is left of :attr:`coded_shape` without the tile, which has one dimension in a vector and else two."""
        shape = self.coded_shape
        return shape[:-1] if len(shape) == 2 else shape[:-2]


def tile_grid(shape: tuple[int, ...], chunk: int, tiling: Tiling) -> TileGrid:
    """Cuts a tensor of ``shape`` by the rule ``tiling`` with tiles of at most ``chunk`` x ``chunk``."""
    shape = tuple(shape)
    lead: tuple[int, ...] = ()
    if len(shape) <= 1:
        height, width = 1, math.prod(shape)
    elif tiling == "divisor":
        lead, height, width = shape[:-2], shape[-2], shape[-1]
    else:
        height, width = shape[0], math.prod(shape[1:])
    if math.prod(shape) == 0:
        return TileGrid(shape, lead=(0,), height=1, width=1, h=1, w=1)
    if tiling == "divisor":
        h, w = largest_divisor(height, chunk), largest_divisor(width, chunk)
    else:
        h, w = min(height, chunk), min(width, chunk)
    return TileGrid(shape, lead, height, width, h, w)
