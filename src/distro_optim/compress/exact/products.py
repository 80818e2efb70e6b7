"""Integer coefficients to the exact elements of their tiles, in float64: every number in between is below ``2**53``."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from ..dct import LONGEST_SMALL_SIDE, multiply_small, sparse_factors
from ..profile import Profile
from .definition import basis, basis_rows

__all__ = ["exact_tiles"]

_SPARSE_LIMIT: Final = 24
"""Up to so many coefficients of 64 x 64 tiles, summing basis functions one by one is faster than whole products."""


def exact_tiles(index: Tensor, q: Tensor, out: Tensor, profile: Profile) -> Tensor:
    """``X`` of :mod:`~.definition`, correctly rounded to the type of ``out``: its sign is that of the exact one.

    ``float32_matmul_precision`` and autocast do not reach products in float64.

    Args:
        index: ``(n, m) int64``, positions.
        q: ``(n, m)``, integers; what stands at a position that occurs twice is added up.
        out: ``(n, h, w)``, overwritten.
        profile: of a device that has float64.
    """
    n, h, w = out.shape
    step = max(1, profile.exact_elements // (h * w))
    room = torch.empty(2, min(step, n) * h * w, dtype=torch.float64, device=out.device)
    for start in range(0, n, step):
        stop = min(n, start + step)
        size = (stop - start) * h * w
        tiles, spare = (r[:size].view(stop - start, h, w) for r in room)
        product = _sparse if index.shape[1] <= _SPARSE_LIMIT else _dense
        product(index[start:stop], q[start:stop].to(torch.float64), tiles, spare, profile)
        out[start:stop].copy_(tiles)
    return out


def _dense(index: Tensor, q: Tensor, tiles: Tensor, spare: Tensor, profile: Profile) -> None:
    n, h, w = tiles.shape
    rows = basis_rows(w, torch.float64, tiles.device)
    if h == 1:
        spare.zero_().view(n, w).scatter_add_(1, index, q)
        multiply(spare.view(n, w), rows, tiles.view(n, w), profile)
        return
    tiles.zero_().view(n, h * w).scatter_add_(1, index, q)
    multiply(tiles.view(n * h, w), rows, spare.view(n * h, w), profile)
    multiply(basis(h, torch.float64, tiles.device).expand(n, h, h), spare, tiles, profile)


def _sparse(index: Tensor, q: Tensor, tiles: Tensor, spare: Tensor, profile: Profile) -> None:
    left, right = factors(index, q, *tiles.shape[1:])
    multiply(left.transpose(1, 2), right, tiles, profile)


def factors(index: Tensor, q: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
    """``(n, m, h)`` and ``(n, m, w)`` of the type of ``q``: what :func:`multiply` makes tiles of, term by term."""
    return sparse_factors(index, q, basis_rows(h, q.dtype, q.device), basis_rows(w, q.dtype, q.device))


def multiply(left: Tensor, right: Tensor, out: Tensor, profile: Profile) -> None:
    """``out = left @ right``, for matrices or batches of them.

    By torch only with ``out``, which autocast leaves alone.
    """
    if profile.by_numpy and max(*left.shape[-2:], *right.shape[-2:]) <= LONGEST_SMALL_SIDE:
        multiply_small(left, right, out)
    elif out.dim() == 2:
        torch.mm(left, right, out=out)
    else:
        torch.bmm(left, right, out=out)
