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

from ..dct import LONGEST_SMALL_SIDE, multiply_small
from ..profile import CPU, Profile
from .definition import BASIS_BITS, basis, basis_rows, integer_basis
from .means import Means
from .products import exact_tiles, factors

__all__ = ["filtered_signs", "fits_filter"]

Places = npt.NDArray[np.intp]
"""Rows or columns of elements, ``(u,)``."""

_SPARSE_LIMIT: Final = 48
"""Up to this many coefficients per tile, summing basis functions one by one is faster than whole products."""

_EXTRA_ROUNDINGS: Final = 4
"""Of the coefficients that are scaled, of their products with the basis, and of the scale itself; one to spare."""

_ELEMENTS_AT_ONCE: Final = 256
"""Elements that are summed again at a time: each takes a copy of a tile in :func:`_row_by_row`."""

_DIGIT: Final = 6
"""Bits of the lower digit of the basis, in :func:`_row_by_row`."""

_MANY: Final = 16
"""Elements of a doubtful tile, on average, beyond which whole tiles are computed in float64, which costs less. So the
cost of what an attacker could send is bounded."""


def fits_filter(h: int, w: int, dtype: torch.dtype, profile: Profile) -> bool:
    """Whether :func:`filtered_signs` serves tiles of this kind."""
    return profile.by_numpy and dtype == torch.float32 and h > 1 and max(h, w) <= LONGEST_SMALL_SIDE


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
        multiply_small(left.transpose(1, 2), right, tiles)
    else:
        flat = coefficients.view(n, -1)
        flat.zero_().scatter_(1, means.index, scaled)
        multiply_small(coefficients, basis_rows(w, q.dtype, q.device), spare)
        multiply_small(basis(h, q.dtype, q.device), spare, tiles)
    tiles.clamp_(-1, 1).round_()
    flat_tiles = tiles.view(n, -1).numpy()
    proven = np.matmul(flat_tiles[:, None, :], flat_tiles[:, :, None]).ravel()  # how many elements are not 0
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
    row += torch.arange(len(index), device="cpu").mul_(h).unsqueeze(1)
    return min(int(torch.bincount(row.view(-1)).max()), w)


def _complete(doubtful: npt.NDArray[np.intp], means: Means, q: Tensor, tiles: Tensor, spare: Tensor) -> None:
    """Puts the signs of elements that are 0 in the tiles ``doubtful``, whose coefficients are ``q``.

    With few coefficients, ``q`` stands once for each position. In numpy, whose calls cost less where little is to do.
    """
    n, h, w = tiles.shape
    size = h * w
    signs = tiles.view(n, size).numpy()
    zeros = np.flatnonzero(signs[doubtful] == 0)
    number, position = zeros // size, zeros % size
    tile = doubtful[number]
    room = spare[: len(doubtful)]
    few_terms = means.q.shape[1] <= _SPARSE_LIMIT
    if len(zeros) > _MANY * len(doubtful):
        where = torch.from_numpy(doubtful)
        part = Means(means.index[where], q[where], few_terms, None)
        tiles[where] = exact_tiles(part, torch.empty_like(room), room, CPU).sign_()
        return
    if not few_terms:
        where = torch.from_numpy(doubtful)
        room.zero_().view(-1, size).scatter_(1, means.index[where], q[where])
    for start in range(0, len(zeros), _ELEMENTS_AT_ONCE):
        some = slice(start, start + _ELEMENTS_AT_ONCE)
        i, j = position[some] // w, position[some] % w
        if few_terms:
            exact = _term_by_term(means.index.numpy()[tile[some]], q.numpy()[tile[some]], i, j, h, w)
        else:
            exact = _row_by_row(room.numpy()[number[some]], i, j)
        # A sum of -0 becomes +0.
        signs[tile[some], position[some]] = np.sign(exact + 0.0)


def _term_by_term(
    index: npt.NDArray[np.int64], q: npt.NDArray[np.float32], i: Places, j: Places, h: int, w: int
) -> npt.NDArray[np.float64]:
    """The exact elements ``(i, j)``, ``(u,)``, of tiles with the coefficients ``q`` at ``index``, both ``(u, m)``."""
    row = index // w
    terms = q * _wide(h)[i[:, None], row]
    terms *= _wide(w)[j[:, None], index - row * w]
    exact: npt.NDArray[np.float64] = terms.sum(1)
    return exact


def _row_by_row(coefficients: npt.NDArray[np.float32], i: Places, j: Places) -> npt.NDArray[np.float64]:
    """The same from whole tiles of integer coefficients, ``(u, h, w)``.

    The first product is in float32, with the basis cut into two digits of six bits: sums of at most 64 terms of at
    most ``2**12 * 2**6`` are exact there.
    """
    _, h, w = coefficients.shape
    columns = np.matmul(coefficients, _digits(w)[j]).astype(np.float64)
    exact: npt.NDArray[np.float64] = ((columns[:, :, 0] * (1 << _DIGIT) + columns[:, :, 1]) * _wide(h)[i]).sum(1)
    return exact


@lru_cache(maxsize=64)
def _wide(n: int) -> npt.NDArray[np.float64]:
    """The basis in float64."""
    return integer_basis(n).astype(np.float64)


@lru_cache(maxsize=64)
def _digits(n: int) -> npt.NDArray[np.float32]:
    """``(n, n, 2)``: for each position, the basis of all frequencies as ``high * 2**6 + low``."""
    whole = integer_basis(n)
    low = ((whole + (1 << (_DIGIT - 1))) & ((1 << _DIGIT) - 1)) - (1 << (_DIGIT - 1))
    return np.stack([(whole - low) >> _DIGIT, low], axis=-1).astype(np.float32)
