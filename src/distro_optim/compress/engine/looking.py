"""Which gradients are finite, by a kernel and several threads: torch alone does it at a part of the memory's speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..fast import can_look, squares_of_part
from .shifting import PART

__all__ = ["ShareOut", "finite_in_parts"]

ShareOut = Callable[[Callable[[Any, int], None], Sequence[Any]], None]
"""Calls ``perform(job, worker)`` for every job; no two calls that run at the same time have the same worker."""


def finite_in_parts(grads: Sequence[Tensor | None], share: ShareOut) -> Tensor | None:
    """As :meth:`~.base.Engine.finite`; None where no gradient is one that the kernel is for, or not all are float32."""
    given = {number: grad for number, grad in enumerate(grads) if grad is not None}
    large = {number: grad for number, grad in given.items() if can_look(grad)}
    if not large or any(grad.device.type != "cpu" or grad.dtype != torch.float32 for grad in given.values()):
        return None
    finite = torch.ones(len(grads), dtype=torch.int32)
    small = [number for number in given if number not in large]
    if small:
        finite[small] = torch.stack(torch._foreach_norm([given[n] for n in small], 2)).isfinite().to(torch.int32)
    sums: dict[int, list[float]] = {number: [] for number in large}
    parts = [
        (grad, start, min(start + PART, grad.numel()), sums[number])
        for number, grad in large.items()
        for start in range(0, grad.numel(), PART)
    ]
    share(_take_squares, parts)
    for number, taken in sums.items():
        finite[number] = sum(taken) <= torch.finfo(torch.float32).max  # which is not so of NaN
    return finite


def _take_squares(part: tuple[Tensor, int, int, list[float]], worker: int) -> None:
    grad, start, stop, sums = part
    sums.append(squares_of_part(grad, start, stop))
