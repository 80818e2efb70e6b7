"""Integer coefficients to the exact elements of their tiles, in float64: every number in between is below ``2**53``."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from ..dct import LONGEST_SMALL_SIDE, multiply_small, sparse_factors
from ..profile import Profile
from .definition import basis, basis_rows
from .means import Means

__all__ = ["SPARSE_LIMIT", "exact_tiles"]

SPARSE_LIMIT: Final = 24
"""Up to so many coefficients of 64 x 64 tiles, summing basis functions one by one is faster than whole products."""


def exact_tiles(means: Means, out: Tensor, scratch: Tensor, profile: Profile, *, room: Tensor | None = None) -> Tensor:
    """``X`` of :mod:`~.definition`, correctly rounded to the type of ``out``: its sign is that of the exact one.

    ``float32_matmul_precision`` and autocast do not reach products in float64.

    Args:
        means: of ``n`` tiles.
        out: ``(n, h, w)``, overwritten.
        scratch: ``(n, h, w)`` of the type of the means, overwritten.
        profile: of a device that has float64.
        room: float64, of as many elements as ``out``, overwritten: then the work is done in one part, or two. It may
            lie where ``scratch`` is.
    """
    n, h, w = out.shape
    sparse = means.index.shape[1] <= SPARSE_LIMIT
    rooms = 1 if sparse else 2
    if room is None or n < rooms:
        step = max(1, profile.exact_elements // (h * w))
        room = torch.empty(rooms * min(step, n) * h * w, dtype=torch.float64, device=out.device)
        together = step
    else:
        step, together = n // rooms, n
    if not sparse:
        return _dense(means, out, step, profile, room)
    q = means.once(scratch.view(n, -1)).to(torch.float64)
    for first in range(0, n, together):
        some = slice(first, first + together)
        left, right = factors(means.index[some], q[some], h, w)
        tiles = room[: len(left) * h * w].view(-1, h, w)
        multiply(left.transpose(1, 2), right, tiles, profile)
        out[some].copy_(tiles)
    return out


def _dense(means: Means, out: Tensor, step: int, profile: Profile, room: Tensor) -> Tensor:
    """Two products. A position that occurs twice has the same coefficient both times: it is written, not added."""
    n, h, w = out.shape
    rows = basis_rows(w, torch.float64, out.device)
    wide = means.q.to(torch.float64)
    for start in range(0, n, step):
        index, q = means.index[start : start + step], wide[start : start + step]
        count = len(index)
        tiles, spare = room[: 2 * count * h * w].view(2, count, h, w)
        tiles.zero_().view(count, h * w).scatter_(1, index, q)
        multiply(tiles.view(count * h, w), rows, spare.view(count * h, w), profile)
        if h == 1:
            tiles = spare
        else:
            multiply(basis(h, torch.float64, out.device).expand(count, h, h), spare, tiles, profile)
        out[start : start + count].copy_(tiles)
    return out


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
