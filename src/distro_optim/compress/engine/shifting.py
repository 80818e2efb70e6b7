"""The lookahead by torch, tensor by tensor."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

__all__ = ["PART", "shifted"]

PART: Final = 1 << 19
"""Elements shifted at a time: the temporary for the signs stays in the cache."""


def shifted(param: Tensor, direction: Tensor, lr: float, whole: bool) -> Tensor:
    """``param -= lr * sign(direction)``, in place, or by the direction itself if it is taken as a ``whole``."""
    if whole:
        return param.add_(direction, alpha=-lr)
    if not param.is_contiguous():
        return param.add_(torch.sign(direction), alpha=-lr)
    flat, flat_direction = param.view(-1), direction.view(-1)
    for start in range(0, flat.numel(), PART):
        flat[start : start + PART].add_(torch.sign(flat_direction[start : start + PART]), alpha=-lr)
    return param
