"""A whole tensor as the coefficients of its tiles, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from .dct import DCT
from .tiling import TileGrid

__all__ = ["from_coefficients", "to_coefficients"]


def to_coefficients(tensor: Tensor, grid: TileGrid) -> Tensor:
    """The DCT of all tiles, ``(tiles, h, w)``.

    Args:
        tensor: of the shape ``grid.shape``, float32 or float64.
        grid: whose tiles all lie inside the tensor.
    """
    tiles = tensor.reshape(grid.batch, grid.rows, grid.h, grid.cols, grid.w).transpose(2, 3)
    tiles = tiles.reshape(grid.tiles, grid.h, grid.w)
    return _transform(tensor, grid).encode([tiles], out=torch.empty_like(tiles), scratch=torch.empty_like(tiles))


def from_coefficients(coefficients: Tensor, grid: TileGrid) -> Tensor:
    """The inverse of :func:`to_coefficients`.

    Args:
        coefficients: ``(tiles, h, w)``, float32 or float64.
        grid: whose tiles all lie inside the tensor.

    Returns:
        the tensor, of the shape ``grid.shape`` and the dtype of ``coefficients``.
    """
    buffers = [torch.empty_like(coefficients) for _ in range(2)]
    tiles = _transform(coefficients, grid).decode(coefficients, out=buffers[0], scratch=buffers[1])
    matrices = tiles.view(grid.batch, grid.rows, grid.cols, grid.h, grid.w).transpose(2, 3)
    return matrices.reshape(grid.shape)


def _transform(tensor: Tensor, grid: TileGrid) -> DCT:
    return DCT(grid.h, grid.w, tensor.dtype, tensor.device)
