"""One bit a value: the sign, and eight of them to a byte.

Psyche's convention (PsycheFoundation/psyche ``shared/modeling/src/distro.rs``, ``shared/network/src/
serializable_tensor.rs``): True is negative, as in ``signbit``; +0 and +NaN are False, -0 is True; element ``8m+j``
is bit ``j`` of byte ``m``, the last byte filled up with False.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import ProtocolError

__all__ = ["pack_signs", "signs_to_values", "unpack_signs", "values_to_signs"]


def values_to_signs(value: Tensor) -> Tensor:
    """The sign bits of any float tensor, as a bool tensor of the same shape."""
    return torch.signbit(value)


def signs_to_values(sign: Tensor, dtype: torch.dtype) -> Tensor:
    """True to -1, False to +1: a bool tensor of any shape to one of ``dtype`` and the same shape."""
    return sign.to(dtype).mul_(-2).add_(1)


def pack_signs(sign: Tensor) -> bytes:
    """A bool tensor of any shape, flattened, as ``ceil(numel / 8)`` bytes."""
    return np.packbits(sign.detach().cpu().reshape(-1).numpy(), bitorder="little").tobytes()


def unpack_signs(data: bytes | memoryview, count: int) -> Tensor:
    """``(count,) bool`` from ``ceil(count / 8)`` bytes.

    Raises:
        ProtocolError: ``data`` has another length.
    """
    if len(data) != -(-count // 8):
        raise ProtocolError(f"{count} packed signs take {-(-count // 8)} bytes, got {len(data)}")
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=count, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_))
