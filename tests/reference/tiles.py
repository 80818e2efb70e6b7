"""Tiles and their transform, written out: reshape, pad, and the cosine formula."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad


def tile_side(size: int, chunk: int, tiling: str) -> int:
    """Length of a tile along a dimension of ``size``."""
    if tiling == "padded":
        return min(size, chunk)
    return max(d for d in range(1, min(size, chunk) + 1) if size % d == 0)


def as_matrices(x: Tensor, tiling: str) -> Tensor:
    """``(matrices, height, width)``: how a tensor of any shape is looked at."""
    if x.ndim <= 1:
        return x.reshape(1, 1, -1)
    if tiling == "padded":
        return x.reshape(1, x.shape[0], -1)
    return x.reshape(-1, *x.shape[-2:])


def to_tiles(x: Tensor, chunk: int, tiling: str) -> Tensor:
    """``(tiles, h, w)``, in row-major order of (matrix, tile row, tile column); what lies beyond is 0."""
    x = as_matrices(x, tiling)
    h, w = tile_side(x.shape[1], chunk, tiling), tile_side(x.shape[2], chunk, tiling)
    x = pad(x, (0, -x.shape[2] % w, 0, -x.shape[1] % h))
    x = x.reshape(x.shape[0], x.shape[1] // h, h, x.shape[2] // w, w)
    return x.transpose(2, 3).reshape(-1, h, w)


def from_tiles(tiles: Tensor, like: Tensor, tiling: str) -> Tensor:
    """The inverse: a tensor shaped as ``like``; what lies beyond is dropped."""
    matrices, height, width = as_matrices(like, tiling).shape
    h, w = tiles.shape[1:]
    rows, cols = -(-height // h), -(-width // w)
    x = tiles.reshape(matrices, rows, cols, h, w).transpose(2, 3).reshape(matrices, rows * h, cols * w)
    return x[:, :height, :width].reshape(like.shape)


def dct_matrix(n: int, dtype: torch.dtype) -> Tensor:
    """``F[j, k] = s_k cos(pi (2j + 1) k / 2n)``, ``s_0 = sqrt(1/n)``, ``s_k = sqrt(2/n)``."""
    j, k = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)[None, :]
    basis = torch.cos(math.pi * (2 * j + 1) * k / (2 * n)) * math.sqrt(2 / n)
    basis[:, 0] = math.sqrt(1 / n)
    return basis.to(dtype)


def encode(tiles: Tensor) -> Tensor:
    """Two-dimensional orthonormal DCT-II of each tile."""
    f_h, f_w = dct_matrix(tiles.shape[1], tiles.dtype), dct_matrix(tiles.shape[2], tiles.dtype)
    return torch.einsum("nij,ia,jb->nab", tiles, f_h, f_w)


def decode(coefficients: Tensor) -> Tensor:
    """Its inverse."""
    f_h = dct_matrix(coefficients.shape[1], coefficients.dtype)
    f_w = dct_matrix(coefficients.shape[2], coefficients.dtype)
    return torch.einsum("nab,ia,jb->nij", coefficients, f_h, f_w)


def largest(coefficients: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Index and value ``(tiles, k)`` of the ``k`` largest magnitudes of each tile."""
    flat = coefficients.flatten(1)
    index = flat.abs().topk(min(k, flat.shape[1])).indices
    return index, flat.gather(1, index)


def placed(index: Tensor, value: Tensor, tiles: Tensor) -> Tensor:
    """Coefficients ``(tiles, h, w)`` with ``value`` at ``index`` (mean where named more than once) and 0 elsewhere."""
    flat = torch.zeros_like(tiles).flatten(1)
    return flat.scatter_reduce(1, index, value, reduce="mean", include_self=False).view_as(tiles)
