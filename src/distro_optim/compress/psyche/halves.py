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
        self._unit = torch.ones(1, dtype=dtype, device="cpu")
        one = _bits_of(self._unit)
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

    def bits(self, numbers: Tensor) -> Bits:
        """A view of the bits of numbers of the dtype."""
        return _bits_of(numbers)

    def magnitudes(self, bits: Bits) -> Bits:
        """Of numbers with these bits, as integers in their order."""
        magnitudes: Bits = bits & _MAGNITUDE
        return magnitudes

    def smallest(self, bits: Bits) -> Bits:
        """The smallest magnitude of each row, ``(n, size)``.

        Of non-negative numbers it is the smallest unsigned integer, of negative ones the smallest signed one: two
        passes that only read, where one that writes magnitudes would take as long as both and a third.
        """
        least: Bits = np.minimum(
            bits.view(np.uint16).min(axis=1).view(np.int16) & _MAGNITUDE, bits.min(axis=1) & _MAGNITUDE
        )
        return least

    def signs(self, numbers: Tensor, out: Tensor) -> None:
        """1 and -1 by the sign of numbers alone: of 0 and NaN, too. ``out`` is other memory of their shape."""
        torch.copysign(self._unit, numbers, out=out)

    def of_signs(self, signs: npt.NDArray[np.float32]) -> Bits:
        """The bits of 1, -1 and 0."""
        return self._signs[signs.astype(np.intp)]


def _bits_of(numbers: Tensor) -> Bits:
    bits: Bits = numbers.view(torch.int16).numpy()
    return bits
