"""The signs of tiles by products in float32: taken where they are proven, computed again where they are not.

A product of float32 matrices of integers is off by at most a bound that is known beforehand: with ``r`` roundings on
the way to an element, by ``r / (1 - r u) * u * sum |q| * 2**24``, ``u = 2**-24``, in whatever order it adds, with fused
operations or without. An element that is larger has the right sign. The few others, one in ten thousand, are summed
again in float64, exactly. This is an exact predicate behind a filter, as in computational geometry (Shewchuk, 1997).

Only for products in true float32: ``torch.set_float32_matmul_precision`` does not reach numpy, which is used here.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .definition import BASIS_BITS, basis, basis_rows
from .means import Means
from .products import exact_tiles, factors

__all__ = ["filtered_signs", "fits_filter"]

_LONGEST_SIDE: Final = 64
"""Longest side of matrices whose products OpenBLAS, with which numpy comes, does not share out among threads."""

_SPARSE_LIMIT: Final = 48
"""Up to this many coefficients per tile, summing basis functions one by one is faster than whole products."""

_EXTRA_ROUNDINGS: Final = 4
"""Of the coefficients that are scaled, of their products with the basis, and of the scale itself; one to spare."""

_TERM_BY_TERM_LIMIT: Final = 160
"""Up to so many coefficients per tile, an element is summed again term by term, beyond it by rows of its tile."""

_ELEMENTS_AT_ONCE: Final = 256
"""Elements that are summed again at a time: each takes a copy of a tile in :func:`_row_by_row`."""

_DIGIT: Final = 6
"""Bits of the lower digit of the basis, in :func:`_row_by_row`."""

_MANY: Final = 16
"""Elements of a doubtful tile, on average, beyond which whole tiles are computed in float64, which costs less. So the
cost of what an attacker could send is bounded."""


def fits_filter(h: int, w: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether :func:`filtered_signs` serves tiles of this kind."""
    return device.type == "cpu" and dtype == torch.float32 and h > 1 and max(h, w) <= _LONGEST_SIDE


def filtered_signs(means: Means, tiles: Tensor, coefficients: Tensor, spare: Tensor) -> Tensor:
    """The signs of the exact tiles: ``tiles``, overwritten with 1, 0 and -1, as are the other two, of the same shape.

    Args:
        means: of ``n`` tiles, float32.
        tiles, coefficients, spare: ``(n, h, w)`` float32.
    """
    n, h, w = tiles.shape
    m = means.q.shape[1]
    sparse = m <= _SPARSE_LIMIT
    q = means.once(spare.view(n, -1)) if sparse else means.q
    weight = q.abs().sum(1, keepdim=True)
    roundings = (m if sparse else min(m, h) + _longest_row(means.index, h, w)) + _EXTRA_ROUNDINGS
    # |computed - exact| <= bound. Scaled by half of 1 / bound, an element of less than a half is not proven.
    bound = weight * (roundings * 2.0**-24 * 2.0 ** (2 * BASIS_BITS) * 1.01)
    scaled = q * torch.where(weight > 0, 0.5 / bound, 0)
    if sparse:
        left, right = factors(means.index, scaled, h, w)
        np.matmul(left.transpose(1, 2).numpy(), right.numpy(), out=tiles.numpy())
    else:
        flat = coefficients.view(n, -1)
        flat.zero_().scatter_(1, means.index, scaled)
        np.matmul(coefficients.numpy(), basis_rows(w, q.dtype, q.device).numpy(), out=spare.numpy())
        np.matmul(basis(h, q.dtype, q.device).numpy(), spare.numpy(), out=tiles.numpy())
    tiles.clamp_(-1, 1).round_()
    flat_tiles = tiles.view(n, -1).numpy()
    proven = np.einsum("ij,ij->i", flat_tiles, flat_tiles)
    nothing = weight.view(n).numpy() == 0
    if nothing.any():
        flat_tiles[nothing] = 0  # not -0
    doubtful = np.flatnonzero((proven < h * w) & ~nothing)
    if doubtful.size:
        _complete(doubtful, means, q, tiles, spare)
    return tiles


def _longest_row(index: Tensor, h: int, w: int) -> int:
    """The most coefficients that a row of a tile has: adding the zeros between them rounds nothing."""
    row = torch.div(index, w, rounding_mode="floor")
    row += torch.arange(len(index)).mul_(h).unsqueeze(1)
    return min(int(torch.bincount(row.view(-1)).max()), w)


def _complete(doubtful: npt.NDArray[np.intp], means: Means, q: Tensor, tiles: Tensor, spare: Tensor) -> None:
    """Puts the signs of elements that are 0 in the tiles ``doubtful``, whose coefficients are ``q``."""
    n, h, w = tiles.shape
    size, where = h * w, torch.from_numpy(doubtful)
    signs = tiles.view(n, size)
    zeros = torch.from_numpy(np.flatnonzero(signs[where].numpy() == 0))
    tile = torch.div(zeros, size, rounding_mode="floor")
    position = zeros - tile * size
    index, q = means.index[where], q[where]
    room = spare[: len(doubtful)]
    if len(zeros) > _MANY * len(doubtful):
        once = Means(index, q, means.unique, None).once(room.view(-1, size))
        tiles[where] = exact_tiles(index, once, room).sign_()
        return
    few_terms = index.shape[1] <= _TERM_BY_TERM_LIMIT
    once = Means(index, q, means.unique, None).once(room.view(-1, size)) if few_terms else q
    if not few_terms:
        room.zero_().view(-1, size).scatter_(1, index, q)
    for t, p in zip(tile.split(_ELEMENTS_AT_ONCE), position.split(_ELEMENTS_AT_ONCE), strict=True):
        exact = _term_by_term(index, once, t, p, h, w) if few_terms else _row_by_row(room, t, p)
        signs[where[t], p] = exact.sign_().to(torch.float32)


def _term_by_term(index: Tensor, q: Tensor, tile: Tensor, position: Tensor, h: int, w: int) -> Tensor:
    """The exact elements at ``position`` of ``tile``, ``(u,) float64``; ``q`` stands once for each place."""
    row = torch.div(index, w, rounding_mode="floor")
    column, q = index - row * w, q.to(torch.float64)
    i = torch.div(position, w, rounding_mode="floor")
    j = position - i * w
    basis_h, basis_w = basis(h, torch.float64, q.device), basis(w, torch.float64, q.device)
    terms = q.index_select(0, tile)
    terms *= basis_h.index_select(0, i).gather(1, row.index_select(0, tile))
    terms *= basis_w.index_select(0, j).gather(1, column.index_select(0, tile))
    return terms.sum(1)


def _row_by_row(coefficients: Tensor, tile: Tensor, position: Tensor) -> Tensor:
    """The same from whole tiles of integer coefficients, ``(n, h, w) float32``.

    The first product is in float32, with the basis cut into two digits of six bits: sums of at most 64 terms of at
    most ``2**12 * 2**6`` are exact there.
    """
    _, h, w = coefficients.shape
    i = torch.div(position, w, rounding_mode="floor")
    j = position - i * w
    both = _digits(w, coefficients.device).index_select(0, j)
    columns = torch.empty(len(tile), h, 2)
    np.matmul(coefficients.index_select(0, tile).numpy(), both.numpy(), out=columns.numpy())
    exact = columns[:, :, 0].to(torch.float64).mul_(1 << _DIGIT).add_(columns[:, :, 1])
    return exact.mul_(basis(h, torch.float64, coefficients.device).index_select(0, i)).sum(1)


@lru_cache(maxsize=64)
def _digits(n: int, device: torch.device) -> Tensor:
    """``(n, n, 2) float32``: for each position, the basis of all frequencies as ``high * 2**6 + low``."""
    whole = basis(n, torch.int64, device)
    low = ((whole + (1 << (_DIGIT - 1))) & ((1 << _DIGIT) - 1)) - (1 << (_DIGIT - 1))
    return torch.stack([(whole - low) >> _DIGIT, low], dim=-1).to(torch.float32)
