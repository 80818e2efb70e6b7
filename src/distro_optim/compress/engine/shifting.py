"""The lookahead by torch: tensor by tensor on a CPU, all together on an accelerator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from ..profile import profile_of

__all__ = ["PART", "Shift", "shift_together", "shifted"]

PART: Final = 1 << 19
"""Elements shifted at a time: the temporary for the signs stays in the cache."""


_SIGNS: Final = 4
"""Blocks of a step that the signs of an accelerator's lookahead take as much memory as: 270 MB."""


def shifted(param: Tensor, direction: Tensor, lr: float, whole: bool) -> Tensor:
    """``param -= lr * sign(direction)``, in place, or by the direction itself if it is taken as a ``whole``."""
    if whole:
        return param.add_(direction, alpha=-lr)
    if not (param.is_contiguous() and direction.is_contiguous()):
        return param.add_(torch.sign(direction), alpha=-lr)
    flat, flat_direction = param.view(-1), direction.view(-1)
    for start in range(0, flat.numel(), PART):
        flat[start : start + PART].add_(torch.sign(flat_direction[start : start + PART]), alpha=-lr)
    return param


class Shift(NamedTuple):
    """A tensor that is to look ahead; as in :meth:`~.base.Engine.shift`."""

    param: Tensor
    direction: Tensor
    saved: Tensor
    lr: float
    whole: bool


def shift_together(shifts: Sequence[Shift]) -> None:
    """``saved = param``, then what :func:`shifted` does, for all tensors in a few operations."""
    if not shifts:
        return
    torch._foreach_copy_([one.saved for one in shifts], [one.param for one in shifts])
    kinds: dict[tuple[torch.device, torch.dtype, torch.dtype, float, bool], list[Shift]] = {}
    for one in shifts:
        key = one.param.device, one.param.dtype, one.direction.dtype, one.lr, one.whole
        kinds.setdefault(key, []).append(one)
    for (device, _, _, rate, whole), members in kinds.items():
        if whole:
            torch._foreach_add_([one.param for one in members], [one.direction for one in members], alpha=-rate)
            continue
        limit = _SIGNS * profile_of(device).block_elements
        params: list[Tensor] = []
        directions: list[Tensor] = []
        size = 0
        for param, direction in _in_parts(members, limit):
            if params and size + param.numel() > limit:
                torch._foreach_add_(params, torch._foreach_sign(directions), alpha=-rate)
                params, directions, size = [], [], 0
            params.append(param)
            directions.append(direction)
            size += param.numel()
        torch._foreach_add_(params, torch._foreach_sign(directions), alpha=-rate)


def _in_parts(members: Sequence[Shift], limit: int) -> list[tuple[Tensor, Tensor]]:
    """Parameters and their directions; of those that lie in one piece, parts of at most ``limit`` elements."""
    parts: list[tuple[Tensor, Tensor]] = []
    for one in members:
        if one.param.is_contiguous() and one.direction.is_contiguous():
            flat = (one.param.view(-1).split(limit), one.direction.view(-1).split(limit))
            parts += zip(*flat, strict=True)
        else:
            parts.append((one.param, one.direction))
    return parts
