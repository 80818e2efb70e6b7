"""Weight decay with the same bits on every device.

A weight is multiplied with ``float32(factor)`` and rounded once to its own type. For 16-bit weights that is written
out: whether ``param.mul_(factor)`` keeps the factor in float32 there is up to each backend, and in bfloat16 a factor of
0.9999 is 1. The product is an operation of its own, never in one kernel with the step, which compilers may fuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from ..compress.profile import profile_of

__all__ = ["shrink", "shrink_all"]

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


def shrink_all(params: Sequence[Tensor], factors: Sequence[float]) -> None:
    """:func:`shrink` for every parameter with its factor; on an accelerator for many in one operation."""
    kinds: dict[tuple[torch.device, torch.dtype, float], list[Tensor]] = {}
    for param, factor in zip(params, factors, strict=True):
        if profile_of(param.device).by_threads:
            shrink(param, factor)
        elif param.numel():
            kinds.setdefault((param.device, param.dtype, factor), []).append(param)
    for (device, dtype, factor), members in kinds.items():
        if dtype in (torch.float32, torch.float64):
            torch._foreach_mul_(members, factor)
            continue
        wide = torch.tensor([factor], dtype=torch.float32, device=device)
        for param in members:
            if param.dim():
                # In float32, since the factor is not a mere number, and rounded once.
                torch.mul(param, wide, out=param)
            else:
                shrink(param, factor)
