"""The signs of tiles by products in float32: taken where they are proven, computed again where they are not.

A product of float32 matrices of integers is off by at most a bound that is known beforehand: with ``r`` roundings on
the way to an element, by ``r / (1 - r u) * u * sum |q| * 2**24``, ``u = 2**-24``, in whatever order it adds, with fused
operations or without. An element that is larger has the right sign. The few others, one in ten thousand, are summed
again in float64, exactly. This is an exact predicate behind a filter, as in computational geometry (Shewchuk, 1997).

Only for products in true float32: ``torch.set_float32_matmul_precision`` does not reach numpy, which is used here.
"""

from __future__ import annotations

import math
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
"""Tiles of elements, or their rows or columns in them."""

_EXPONENT: Final = 0xFF << 23
"""The bits of a float32 that are its exponent: what they leave of a positive number is a power of two."""

_SPARSE_LIMIT: Final = 48
"""Up to this many coefficients per tile, summing basis functions one by one is faster than whole products."""

_EXTRA_ROUNDINGS: Final = 1
"""To spare. Coefficients times a power of two, and their products with one basis, are exact: of a term, what is rounded
is the product with the other basis, and the additions that follow."""

_TERMS_AT_ONCE: Final = 256
"""Elements that are summed again at a time in :func:`_term_by_term`."""

_SLOTS: Final = 4
"""Elements of a tile that are summed again at a time in :func:`_row_by_row`."""

_COPIED: Final = 2
"""Where more than one in so many tiles has doubtful elements, all are multiplied, so that none has to be copied."""

_DIGIT: Final = 6
"""Bits of the lower digit of the basis, in :func:`_row_by_row`."""

_MANY: Final = 16
"""Elements of a tile that are summed again one by one; where more are doubtful, the whole tile is computed in float64,
which costs less. So the cost of what an attacker could send is bounded."""


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
    roundings = (m if sparse else min(m, h) + min(m, w)) + _EXTRA_ROUNDINGS
    # |computed - exact| <= bound. Scaled by a power of two so that an element of at most a half is not proven.
    bound = weight.clamp(min=1) * (roundings * 2.0 ** (2 * BASIS_BITS - 24) * 1.01)
    scaled = q * (0.5 / bound).view(torch.int32).bitwise_and_(_EXPONENT).view(torch.float32)
    if sparse:
        left, right = factors(means.index, scaled, h, w)
        multiply_small(left.transpose(1, 2), right, tiles)
    else:
        flat = coefficients.view(n, -1)
        if means.named is None or means.named.data_ptr() != flat.data_ptr():
            flat.zero_()
        flat.scatter_(1, means.index, scaled)
        multiply_small(coefficients, basis_rows(w, q.dtype, q.device), spare)
        multiply_small(basis(h, q.dtype, q.device), spare, tiles)
    tiles.clamp_(-1, 1).round_()
    # What is not proven is looked for in runs: whole tiles, or some rows where it may be in most tiles.
    runs = tiles.view(-1, h * w if sparse else w * math.gcd(h, LONGEST_SMALL_SIDE // w)).numpy()
    proven = np.matmul(runs[:, None, :], runs[:, :, None]).ravel()  # how many elements are not 0
    doubtful = np.flatnonzero(proven < runs.shape[1])
    if doubtful.size:
        nothing = weight.view(n).numpy()[doubtful * runs.shape[1] // (h * w)] == 0
        if nothing.any():
            runs[doubtful[nothing]] = 0  # not -0
            doubtful = doubtful[~nothing]
    if doubtful.size:
        _complete(doubtful, runs, means, q if sparse else None, tiles, coefficients)
    return tiles


def _complete(
    doubtful: npt.NDArray[np.intp],
    runs: npt.NDArray[np.float32],
    means: Means,
    q: Tensor | None,
    tiles: Tensor,
    coefficients: Tensor,
) -> None:
    """Puts the signs of elements that are 0 in ``runs[doubtful]``.

    In numpy, whose calls cost less where little is to do.

    Args:
        doubtful: rising.
        runs: all elements of ``tiles``, a tile being one or more of them.
        means: of all tiles.
        q: the coefficients, once for each position, where they are few; otherwise None.
        tiles: ``(n, h, w)``, the signs, with 0 where nothing is proven.
        coefficients: ``(n, h, w)``, where ``q`` is None: those of whole tiles, of each tile times a power of two.
    """
    n, h, w = tiles.shape
    size = h * w
    zeros = np.flatnonzero(runs[doubtful] == 0)
    length = runs.shape[1]
    place = doubtful[zeros // length] * length + zeros % length
    tile = place // size
    counts = np.bincount(tile, minlength=n)
    if counts.max() > _MANY:
        whole = counts > _MANY
        _whole_tiles(np.flatnonzero(whole), means, tiles)
        place = place[~whole[tile]]
        tile = place // size
        counts[whole] = 0
    position = place - tile * size
    i, j = position // w, position % w
    if q is not None:
        exact = np.empty(len(tile))
        for start in range(0, len(tile), _TERMS_AT_ONCE):
            some = slice(start, start + _TERMS_AT_ONCE)
            exact[some] = _term_by_term(means.index.numpy()[tile[some]], q.numpy()[tile[some]], i[some], j[some], h, w)
    else:
        exact = _slot_by_slot(coefficients.numpy(), counts, tile, i, j)
    # A sum of -0 becomes +0.
    runs.reshape(-1)[place] = np.sign(exact + 0.0)


def _slot_by_slot(
    coefficients: npt.NDArray[np.float32], counts: npt.NDArray[np.intp], tile: Places, i: Places, j: Places
) -> npt.NDArray[np.float64]:
    """The exact elements ``(i, j)`` of tiles, in order; ``counts[t]`` of them are of tile ``t``."""
    exact = np.empty(len(i))
    rank = np.arange(len(i)) - (counts.cumsum() - counts)[tile]  # in their tiles
    for first in range(0, int(counts.max()), _SLOTS):
        some = np.flatnonzero((rank >= first) & (rank < first + _SLOTS))
        rows = np.flatnonzero(counts > first)
        chosen, row = coefficients, tile[some]
        if _COPIED * len(rows) <= len(coefficients):
            chosen, row = coefficients[rows], np.searchsorted(rows, row)
        slot = rank[some] - first
        places = np.zeros((2, len(chosen), int(slot.max()) + 1), np.intp)
        places[0, row, slot], places[1, row, slot] = i[some], j[some]
        exact[some] = _row_by_row(chosen, *places)[row, slot]
    return exact


def _whole_tiles(chosen: npt.NDArray[np.intp], means: Means, tiles: Tensor) -> None:
    """Puts all signs of some tiles, by float64."""
    where = torch.from_numpy(chosen)
    out, scratch = tiles.new_empty(2, len(chosen), *tiles.shape[1:])
    tiles[where] = exact_tiles(Means(means.index[where], means.q[where], means.unique, None), out, scratch, CPU).sign_()


def _term_by_term(
    index: npt.NDArray[np.int64], q: npt.NDArray[np.float32], i: Places, j: Places, h: int, w: int
) -> npt.NDArray[np.float64]:
    """The exact elements ``(i, j)``, both ``(u,)``, of tiles with coefficients ``q`` at ``index``, both ``(u, m)``."""
    row = index // w
    terms = q * _wide(h)[i[:, None], row]
    terms *= _wide(w)[j[:, None], index - row * w]
    exact: npt.NDArray[np.float64] = terms.sum(1)
    return exact


def _row_by_row(coefficients: npt.NDArray[np.float32], i: Places, j: Places) -> npt.NDArray[np.float64]:
    """The same from whole tiles of integer coefficients, ``(t, h, w)``: of each the elements ``(i, j)``, ``(t, u)``.

    The first product is in float32, with the basis cut into two digits of six bits: sums of at most 64 terms of at
    most ``2**12 * 2**6`` are exact there, also times a power of two.
    """
    t, h, w = coefficients.shape
    u = i.shape[1]
    columns = np.matmul(_digits(h)[i].reshape(t, 2 * u, h), coefficients).reshape(t, u, 2, w)
    terms = columns[:, :, 0].astype(np.float64)
    terms *= 1 << _DIGIT
    terms += columns[:, :, 1]
    terms *= _wide(w)[j]
    exact: npt.NDArray[np.float64] = terms.sum(2)
    return exact


@lru_cache(maxsize=64)
def _wide(n: int) -> npt.NDArray[np.float64]:
    """The basis in float64."""
    return integer_basis(n).astype(np.float64)


@lru_cache(maxsize=64)
def _digits(n: int) -> npt.NDArray[np.float32]:
    """``(n, 2, n)``: for each position, the basis of all frequencies as ``high * 2**6 + low``."""
    whole = integer_basis(n)
    low = ((whole + (1 << (_DIGIT - 1))) & ((1 << _DIGIT) - 1)) - (1 << (_DIGIT - 1))
    return np.stack([(whole - low) >> _DIGIT, low], axis=1).astype(np.float32)
