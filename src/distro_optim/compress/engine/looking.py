"""Which gradients are finite, by the threads of a step, with a kernel or without.

Torch's own threads do it as fast. But they wait for more work for some milliseconds afterwards, on the cores that the
step needs next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ..fast import can_look, squares_of_part
from ..profile import CPU

__all__ = ["ShareOut", "finite_in_parts"]

ShareOut = Callable[[Callable[[Any, int], None], Sequence[Any]], None]
"""Calls ``perform(job, worker)`` for every job; no two calls that run at the same time have the same worker."""


_PART: Final = 1 << 20
"""Elements that a thread looks at in a turn."""

_SMALL: Final = 4096
"""Elements: below, a look by torch at all such tensors together costs less than a turn of a thread for each."""


def finite_in_parts(grads: Sequence[Tensor | None], share: ShareOut) -> Tensor | None:
    """As :meth:`~.base.Engine.finite`; None where a gradient is not float32 on a CPU, or all together are small."""
    given = {number: grad for number, grad in enumerate(grads) if grad is not None}
    if any(grad.device.type != "cpu" or grad.dtype != torch.float32 for grad in given.values()):
        return None
    large = {number: grad for number, grad in given.items() if grad.numel() >= _SMALL and grad.is_contiguous()}
    together = sum(grad.numel() for grad in large.values())
    by_kernel = bool(large) and can_look(together)
    if not (by_kernel or together >= CPU.block_elements):
        return None
    finite = [True] * len(grads)
    small = [number for number in given if number not in large]
    if small:
        fine: list[bool] = torch.stack(torch._foreach_norm([given[n] for n in small], 2)).isfinite().tolist()
        for number, is_fine in zip(small, fine, strict=True):
            finite[number] = is_fine
    sums: dict[int, list[float]] = {number: [] for number in large}
    parts = [
        (grad, start, min(start + _PART, grad.numel()), sums[number])
        for number, grad in large.items()
        for start in range(0, grad.numel(), _PART)
    ]
    share(_take_squares if by_kernel else _take_squares_by_torch, parts)
    for number, taken in sums.items():
        finite[number] = sum(taken) <= torch.finfo(torch.float32).max  # which is not so of NaN
    return torch.tensor(finite, dtype=torch.int32)


def _take_squares(part: tuple[Tensor, int, int, list[float]], worker: int) -> None:
    grad, start, stop, sums = part
    sums.append(squares_of_part(grad, start, stop))


def _take_squares_by_torch(part: tuple[Tensor, int, int, list[float]], worker: int) -> None:
    grad, start, stop, sums = part
    sums.append(float(torch.linalg.vector_norm(grad.view(-1)[start:stop])) ** 2)
