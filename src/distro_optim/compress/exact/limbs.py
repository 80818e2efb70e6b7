"""Integer coefficients to exact tiles without float64, for devices that have none: products of short integers.

A matrix of integers is taken apart into digits so short that the product of each digit with the basis stays below
``2**24``, where float32 is exact in any order of additions. The products are put together again in int64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ..profile import Profile
from .definition import SIGN_SCALE, VALUE_BITS, basis, basis_rows, integer_basis
from .precision import true_float32
from .products import multiply

__all__ = ["integer_tiles"]

_LARGEST = max(SIGN_SCALE, 1 << VALUE_BITS)


def integer_tiles(index: Tensor, q: Tensor, shape: torch.Size, profile: Profile) -> Tensor:
    """``X`` of :mod:`~.definition`, ``(n, h, w) int64``; arguments as for :func:`~.products.exact_tiles`."""
    with true_float32():
        return _integer_tiles(index, q, shape, profile)


def _integer_tiles(index: Tensor, q: Tensor, shape: torch.Size, profile: Profile) -> Tensor:
    n, h, w = shape
    device = index.device
    x = torch.zeros(n, h * w, dtype=torch.float32, device=device).scatter_add_(1, index, q.to(torch.float32))
    rows = basis_rows(w, torch.float32, device)
    flat = _exact_product(
        x.view(n * h, w), _LARGEST, _weight(w), lambda digit, out: multiply(digit, rows, out, profile)
    )
    tiles = flat.view(n, h, w)
    if h == 1:
        return tiles
    columns = basis(h, torch.float32, device).expand(n, h, h)
    largest = _LARGEST * _weight(w)
    return _exact_product(tiles, largest, _weight(h), lambda digit, out: multiply(columns, digit, out, profile))


@lru_cache(maxsize=64)
def _weight(n: int) -> int:
    """The largest sum of magnitudes in a row of the basis."""
    return int(abs(integer_basis(n)).sum(1).max())


def _exact_product(x: Tensor, largest: int, weight: int, product: Callable[[Tensor, Tensor], None]) -> Tensor:
    """The product of ``x``, integers of at most ``largest``, with a matrix of rows of ``weight`` at most: int64."""
    # Digits lie between -radix / 2 and radix / 2.
    bits = max(1, ((1 << 25) // weight).bit_length() - 1)
    half = 1 << (bits - 1)
    rest = x.to(torch.int64)
    total = torch.zeros_like(rest)
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    shift = 0
    while largest:
        last = largest * weight <= 1 << 24
        digit = rest if last else ((rest + half) & (2 * half - 1)) - half
        product(digit.to(torch.float32), out)
        total += out.to(torch.int64) << shift
        if last:
            break
        rest = (rest - digit) >> bits
        largest = (largest + half) >> bits
        shift += bits
    return total
