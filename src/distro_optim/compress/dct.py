"""Transforms of tiles: the orthonormal DCT, and the identity.

A transform works on a block of tiles, ``(n, h, w)`` contiguous, with every output and temporary given by the caller,
so that a step reuses a few megabytes that stay in cache. Tiles that are only read may also lie in their tensors.

With ``F`` the orthonormal DCT-II of the unit vectors (row = input index), a tile ``X`` is encoded as
``F_h^T @ X @ F_w`` and decoded as ``F_h @ C @ F_w^T`` (PsycheFoundation/psyche ``shared/modeling/src/distro.rs``;
bloc97/DeMo ``demo.py``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, Literal, get_args

import numpy as np
import torch
import torch_dct
from torch import Tensor
from typing_extensions import override

from .profile import Profile, profile_of

__all__ = [
    "DCT",
    "LONGEST_SMALL_SIDE",
    "TRANSFORMS",
    "Identity",
    "Transform",
    "TransformName",
    "dct_basis",
    "make_transform",
    "multiply_small",
    "sparse_factors",
]

TransformName = Literal["dct", "identity"]
TRANSFORMS: Final[tuple[str, ...]] = get_args(TransformName)

LONGEST_SMALL_SIDE: Final = 64
"""Longest side of matrices whose products OpenBLAS, with which numpy comes, does not share out among threads."""


@lru_cache(maxsize=256)
def dct_basis(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``F``: orthonormal DCT-II of the unit vectors, ``(size, size)``, row = input index, column = frequency.

    Computed by torch_dct in float32 (float64 for a float64 basis), then cast, as the reference does.
    """
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        basis: Tensor = torch_dct.dct(torch.eye(size, dtype=exact, device="cpu"), norm="ortho")
    return basis.to(dtype=dtype, device=device).contiguous()


@lru_cache(maxsize=256)
def _dct_rows(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``F^T``: row k is the k-th basis function, ``(size, size)`` contiguous."""
    return dct_basis(size, dtype, device).t().contiguous()


class Transform(ABC):
    """An orthonormal linear map of tiles of one shape, dtype and device.

    Args:
        profile: how to work on the device; by default as suits it.

    Attributes:
        takes_views: whether tiles that are only read may have any strides.
    """

    takes_views = False

    def __init__(
        self, h: int, w: int, dtype: torch.dtype, device: torch.device, profile: Profile | None = None
    ) -> None:
        self.h = h
        self.w = w
        self.dtype = dtype
        self.device = device
        self.profile = profile or profile_of(device)

    @abstractmethod
    def encode(self, tiles: Sequence[Tensor], *, out: Tensor, scratch: Tensor, scale: float = 1.0) -> Tensor:
        """Tiles to coefficients, times ``scale``.

        Args:
            tiles: ``(..., h, w)``, together ``n`` tiles, of any strides; unless :attr:`takes_views`, a contiguous one.
            out, scratch: ``(n, h, w)`` contiguous, overwritten.

        Returns:
            ``out``, the coefficients.
        """

    @abstractmethod
    def decode(self, coefficients: Tensor, *, out: Tensor, scratch: Tensor) -> Tensor:
        """Coefficients to tiles, all ``(n, h, w)``. Overwrites ``out`` and ``scratch``, returns the tiles."""

    @abstractmethod
    def decode_sparse(self, index: Tensor, value: Tensor, *, out: Tensor) -> Tensor:
        """:meth:`decode` of coefficients that are nearly all zero.

        Args:
            index: ``(n, m)`` positions in the flattened tile, int64 or int32; one that occurs twice counts twice.
            value: ``(n, m)`` coefficients at these positions.
            out: ``(n, h, w)``, overwritten.

        Returns:
            ``out``, the tiles.
        """


class DCT(Transform):
    """The two-dimensional orthonormal DCT-II of each tile; of one dimension where the other is 1."""

    def __init__(
        self, h: int, w: int, dtype: torch.dtype, device: torch.device, profile: Profile | None = None
    ) -> None:
        super().__init__(h, w, dtype, device, profile)
        self._fh, self._fw = dct_basis(h, dtype, device), dct_basis(w, dtype, device)
        self._fh_rows, self._fw_rows = _dct_rows(h, dtype, device), _dct_rows(w, dtype, device)
        self._by_numpy = self.profile.by_numpy and max(h, w) <= LONGEST_SMALL_SIDE
        self.takes_views = h > 1 and self._by_numpy

    @override
    def encode(self, tiles: Sequence[Tensor], *, out: Tensor, scratch: Tensor, scale: float = 1.0) -> Tensor:
        right = self._fw if scale == 1 else self._fw * scale
        return self._two_products(tiles, self._fh_rows, right, out, scratch)

    @override
    def decode(self, coefficients: Tensor, *, out: Tensor, scratch: Tensor) -> Tensor:
        return self._two_products([coefficients], self._fh, self._fw_rows, out, scratch)

    def _two_products(
        self, parts: Sequence[Tensor], left: Tensor, right: Tensor, out: Tensor, scratch: Tensor
    ) -> Tensor:
        if self.takes_views:
            start = 0
            for part in parts:
                stop = start + part.shape[:-2].numel()
                multiply_small(part, right, scratch[start:stop].view(part.shape))
                start = stop
            multiply_small(left, scratch, out)
            return out
        [x] = parts
        n = x.shape[0]
        if self.h == 1:
            torch.mm(x.view(n, self.w), right, out=out.view(n, self.w))
        else:
            # One tall product for the columns, one batched product for the rows: both run near the GEMM peak, where
            # an einsum over (rows, h, cols, w) would permute and copy its operands.
            torch.mm(x.view(n * self.h, self.w), right, out=scratch.view(n * self.h, self.w))
            torch.bmm(left.expand(n, self.h, self.h), scratch, out=out)
        return out

    @override
    def decode_sparse(self, index: Tensor, value: Tensor, *, out: Tensor) -> Tensor:
        left, right = sparse_factors(index, value, self._fh_rows, self._fw_rows)
        if self._by_numpy:
            multiply_small(left.transpose(1, 2), right, out)
        else:
            torch.bmm(left.transpose(1, 2), right, out=out)
        return out


def multiply_small(left: Tensor, right: Tensor, out: Tensor) -> None:
    """``out = left @ right`` for batches of small matrices on the CPU.

    By numpy, since OpenBLAS has kernels for small matrices: with two threads at work, 64 x 64 takes it two thirds of
    the time that MKL's batched product takes, and half of it in float64. Both give the same bits there.
    """
    np.matmul(left.numpy(), right.numpy(), out=out.numpy())


def sparse_factors(index: Tensor, value: Tensor, rows_h: Tensor, rows_w: Tensor) -> tuple[Tensor, Tensor]:
    """``(n, m, h)`` and ``(n, m, w)``, of which the first transposed times the second are tiles, term by term.

    Args:
        index: ``(n, m)`` positions in the flattened tile, int64 or int32.
        value: ``(n, m)`` coefficients at these positions.
        rows_h, rows_w: ``(h, h)`` and ``(w, w)`` of the type of ``value``: row k is the k-th basis function. Tiles of
            one row have no first factor.
    """
    (n, m), h, w = index.shape, len(rows_h), len(rows_w)
    if h > 1:
        row = torch.div(index, w, rounding_mode="floor")
        column = torch.remainder(index, w)
        left = rows_h.index_select(0, row.reshape(-1)).view(n, m, h)
        left.mul_(value.unsqueeze(-1))
    else:
        column = index
        left = value.reshape(n, m, 1)
    return left, rows_w.index_select(0, column.reshape(-1)).view(n, m, w)


class Identity(Transform):
    """Coefficients are the elements themselves: plain chunked top-k with error feedback."""

    @override
    def encode(self, tiles: Sequence[Tensor], *, out: Tensor, scratch: Tensor, scale: float = 1.0) -> Tensor:
        [x] = tiles
        return torch.mul(x, scale, out=out)

    @override
    def decode(self, coefficients: Tensor, *, out: Tensor, scratch: Tensor) -> Tensor:
        return out.copy_(coefficients)

    @override
    def decode_sparse(self, index: Tensor, value: Tensor, *, out: Tensor) -> Tensor:
        out.zero_().view(out.shape[0], -1).scatter_add_(1, index.long(), value)
        return out


_CLASSES: Final[dict[str, type[Transform]]] = {"dct": DCT, "identity": Identity}


def make_transform(
    name: str, h: int, w: int, dtype: torch.dtype, device: torch.device, profile: Profile | None = None
) -> Transform:
    """The transform called ``name`` for tiles of ``h`` x ``w``; arguments as for :class:`Transform`."""
    return _CLASSES[name](h, w, dtype, device, profile)
