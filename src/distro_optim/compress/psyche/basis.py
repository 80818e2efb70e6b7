"""The inverse DCT basis of Psyche, and the order in which products with it are summed.

The operations are those of PsycheFoundation/psyche ``shared/modeling/src/distro.rs``, and of PyTorch under it.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["RUNNING_SUMS", "SMALL_PRODUCT", "inverse_basis", "running_sums", "sum_in_order"]

RUNNING_SUMS: Final = 4
"""Of PyTorch's product of half-precision matrices (``sum`` in ``aten/src/ATen/native/cpu/BlasKernel.cpp``)."""

SMALL_PRODUCT: Final = 400
"""Rows times inner size times columns below which it sums in plain order (``bmm_out_or_baddbmm_`` in
``aten/src/ATen/native/LinearAlgebra.cpp``)."""


@lru_cache(maxsize=256)
def inverse_basis(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``B``: orthonormal inverse DCT of the unit vectors, ``(size, size)``, row = frequency, column = index.

    The operations and their order are those of ``TransformDCT::idct`` in Psyche's ``distro.rs``: in float32 on the
    device of the parameters, then cast.
    """
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        unit = torch.eye(size, dtype=torch.float32, device=device)
        real = unit / 2.0
        real[:, :1].mul_(math.sqrt(size) * 2.0)
        real[:, 1:].mul_(math.sqrt(size / 2.0) * 2.0)
        angle = (torch.arange(size, dtype=torch.float32, device=device) * (math.pi / (2.0 * size))).unsqueeze(0)
        cosine, sine = angle.cos(), angle.sin()
        imaginary = torch.cat([real[:, :1] * 0.0, -real.flip([1])[:, : size - 1]], 1)
        turned = torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], 2)
        wave = torch.fft.irfft(torch.view_as_complex(turned), n=size, dim=1)
        basis = torch.zeros_like(unit)
        basis[:, 0::2] += wave[:, : size - size // 2]
        basis[:, 1::2] += wave.flip([1])[:, : size // 2]
        return basis.to(dtype)


def sum_in_order(terms: npt.NDArray[np.float32], running: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
    """Sums ``(n,)`` of float32 ``terms``, ``(n, m)``, each of which belongs to one of the running sums.

    Args:
        terms: in the order in which they are added; a term of 0 is as good as none.
        running: ``(n, m)``: the number of its running sum, from 0.
    """
    kept = np.where(running[:, None, :] == np.arange(RUNNING_SUMS)[:, None], terms[:, None, :], np.float32(0))
    # Accumulating adds one after the other, where a sum of numpy's would add up pairs.
    with np.errstate(invalid="ignore", over="ignore"):
        sums = np.add.accumulate(kept, axis=2, dtype=np.float32)[:, :, -1]
        total: npt.NDArray[np.float32] = ((sums[:, 0] + sums[:, 1]) + sums[:, 2]) + sums[:, 3]
    return total


def running_sums(size: int) -> Tensor:
    """To which running sum each of ``size`` terms belongs, ``(size,) int64``."""
    number = torch.arange(size, device="cpu")
    return torch.where(number < size // RUNNING_SUMS * RUNNING_SUMS, number % RUNNING_SUMS, 0)
