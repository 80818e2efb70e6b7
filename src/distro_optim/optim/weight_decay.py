"""Weight decay with the same bits on every device.

A weight is multiplied with ``float32(factor)`` and rounded once to its own type. For 16-bit weights that is written
out: whether ``param.mul_(factor)`` keeps the factor in float32 there is up to each backend, and in bfloat16 a factor of
0.9999 is 1. The product is an operation of its own, never in one kernel with the step, which compilers may fuse.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

__all__ = ["shrink"]

_CHUNK: Final = 1 << 19
"""Elements at a time: their copy in float32 stays in the cache."""


def shrink(param: Tensor, factor: float) -> None:
    """``param *= factor``, in place; ``param`` is of any shape, float32, float64, bfloat16 or float16."""
    if param.dtype in (torch.float32, torch.float64):
        param.mul_(factor)
    elif param.is_contiguous():
        for part in param.view(-1).split(_CHUNK):
            part.copy_(part.to(torch.float32).mul_(factor))
    else:
        param.copy_(param.to(torch.float32).mul_(factor))
