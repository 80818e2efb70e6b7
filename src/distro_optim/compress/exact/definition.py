"""The constants of ``exact-1``, its basis, and the mean of signs.

Tile element ``(i, j)`` of integer coefficients ``q_t`` at the positions ``(a_t, b_t)`` is::

    X[i, j] = sum over t of q_t * B_h[i, a_t] * B_w[j, b_t]         (without B_h in a tile of one row)
    B_n[j, f] = round(2**12 * c_f * cos(pi (2 j + 1) f / 2 n)),     c_0 = sqrt(1/2), c_f = 1;  B_1 = [[2**12]]

which is the inverse DCT but for a positive factor, and the step is its sign.

Bounds. ``|q| <= 2**12`` and ``|B| <= 2**12``, so that every partial sum of ``X``, in any order, lies within
``terms * 2**36``, where ``terms`` is the smaller of ``contributors * k`` and the size of a tile. With at most
:data:`MAX_TERMS` it lies within ``2**53``: float64 and int64 hold it exactly.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...cosine import rounded_cosine

__all__ = [
    "BASIS_BITS",
    "MAX_CONTRIBUTORS",
    "MAX_TERMS",
    "SIGN_SCALE",
    "VALUE_BITS",
    "basis",
    "basis_rows",
    "integer_basis",
    "mean_of_signs",
]

BASIS_BITS: Final = 12
"""Bits of the basis: 4e-5 of all signs come out other than by a float64 DCT, a twentieth of what bfloat16 changes."""

VALUE_BITS: Final = 12
"""A value is rounded to this many bits below the largest one of its tile."""

SIGN_SCALE: Final = 2520
"""Means of signs are multiples of 1/2520, so that those of up to 10 senders are exact. Below ``2**12``."""

MAX_CONTRIBUTORS: Final = 256
"""Updates in one step; sums of their signs and values, and the numbers of senders, fit into 32 bits and float32."""

MAX_TERMS: Final = 1 << 17
"""Coefficients of one tile that are not zero: ``2**17 * 2**12 * 2**12 * 2**12 = 2**53``."""


@lru_cache(maxsize=64)
def integer_basis(n: int) -> npt.NDArray[np.int64]:
    """``B_n``, ``(n, n) int64``: row = position, column = frequency. Read-only."""
    if n == 1:
        values = np.array([[1 << BASIS_BITS]], dtype=np.int64)
    else:
        # cos(pi a / 2n) for a = 0 .. 4n - 1, one turn of the circle, by the symmetries of the first quarter.
        quarter = [rounded_cosine(a, 2 * n, BASIS_BITS) for a in range(n + 1)]
        half = quarter + [-v for v in reversed(quarter[:-1])]
        turn = np.array(half + half[-2:0:-1], dtype=np.int64)
        angles = (2 * np.arange(n, dtype=np.int64)[:, None] + 1) * np.arange(n, dtype=np.int64)
        values = turn[angles % (4 * n)]
        # round(2**b / sqrt(2)), by the integer square root of 2**(2b + 1), which is twice that.
        values[:, 0] = (math.isqrt(1 << (2 * BASIS_BITS + 1)) + 1) // 2
    values.flags.writeable = False
    return values


@lru_cache(maxsize=256)
def basis(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``B_n``, ``(n, n)``, contiguous: row = position, column = frequency."""
    return torch.tensor(integer_basis(n).tolist(), dtype=dtype, device=device)


@lru_cache(maxsize=256)
def basis_rows(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The transpose of ``B_n``, contiguous: row ``f`` is the basis function of frequency ``f``."""
    return torch.tensor(integer_basis(n).T.tolist(), dtype=dtype, device=device)


def mean_of_signs(total: int, count: int) -> int:
    """``SIGN_SCALE * total / count``, rounded to the nearest integer, halves away from zero; 0 of nobody."""
    if not count:
        return 0
    magnitude = (2 * SIGN_SCALE * abs(total) + count) // (2 * count)
    return magnitude if total >= 0 else -magnitude
