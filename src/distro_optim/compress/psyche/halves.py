"""Signs of numbers in half precision, by their bits: a number of 16 bits is its sign and, as an integer, its magnitude.

PyTorch has no vector instructions for the sign of a bfloat16, and several passes over numbers in float32 cost more than
these over half as many bytes.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Halves"]

_MAGNITUDE: Final = np.int16(0x7FFF)
_SIGN: Final = np.int16(-0x8000)

Bits = npt.NDArray[np.int16]


class Halves:
    """Bits of one dtype of half precision, on the CPU.

    Args:
        dtype: ``torch.bfloat16`` or ``torch.float16``.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        one = torch.ones(1, dtype=dtype, device="cpu").view(torch.int16).numpy()
        self._one = one[0]
        self._signs = np.concatenate([np.zeros(1, dtype=np.int16), one, one | _SIGN])

    def up_to(self, limit: Tensor) -> Bits:
        """Magnitudes that any number no further from 0 than ``limit`` may have, once it is rounded to the dtype.

        Args:
            limit: ``(n,) float32``, at least 0 and finite.

        Returns:
            ``(n,)``; a number whose magnitude is above this is certainly above the limit.
        """
        largest: Bits = limit.to(self.dtype).view(torch.int16).numpy() + np.int16(1)
        return largest

    def magnitudes(self, numbers: Tensor, out: Tensor) -> Bits:
        """Of numbers of the dtype, ``(n, size)``, as integers in their order; ``out`` is memory for as many."""
        magnitudes = _bits_of(out)
        np.bitwise_and(_bits_of(numbers), _MAGNITUDE, out=magnitudes)
        return magnitudes

    def take_signs(self, numbers: Tensor) -> Bits:
        """Makes 1 and -1 of numbers in place, by their sign alone: of 0 and NaN, too. Returns a view of their bits."""
        bits = _bits_of(numbers)
        np.bitwise_and(bits, _SIGN, out=bits)
        np.bitwise_or(bits, self._one, out=bits)
        return bits

    def of_signs(self, signs: npt.NDArray[np.float32]) -> Bits:
        """The bits of 1, -1 and 0."""
        return self._signs[signs.astype(np.intp)]


def _bits_of(numbers: Tensor) -> Bits:
    bits: Bits = numbers.view(torch.int16).numpy()
    return bits
