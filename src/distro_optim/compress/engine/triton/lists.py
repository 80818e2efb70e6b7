"""Tables of tensors that are worked on element by element, many in one launch; kept while the tensors stay in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

import torch
from torch import Tensor

from . import launching
from .batches import on_device

__all__ = ["SHIFTED", "Lists"]

SHIFTED: Final = (torch.float32, torch.bfloat16, torch.float16)
"""Types of weights that the kernels shift."""

_KEPT: Final = 16
"""Tables on the device: the lookahead and its undoing have one each for every type of weights."""

Kinds = dict[tuple[torch.device, torch.dtype], list[int]]


class Lists:
    """The tables of an engine."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], Tensor] = {}

    def kinds(
        self,
        params: Sequence[Tensor],
        saved: Sequence[Tensor],
        chosen: Iterable[int],
        others: Sequence[Tensor] | None = None,
    ) -> tuple[Kinds, list[int]]:
        """By device and type the numbers of the tensors that kernels may work on, and the numbers of the rest.

        Args:
            params: of any kinds.
            saved: one for each.
            chosen: numbers of those that may be chosen.
            others: one for each, which must lie beside it too.
        """
        kinds: Kinds = {}
        for n in chosen:
            param = params[n]
            beside = (param, saved[n]) if others is None else (param, saved[n], others[n])
            if (
                param.device.type == launching.device_type()
                and param.dtype in SHIFTED
                and saved[n].dtype == param.dtype
                and param.numel()
                and all(t.is_contiguous() and t.device == param.device and t.shape == param.shape for t in beside)
            ):
                kinds.setdefault((param.device, param.dtype), []).append(n)
        taken = {n for numbers in kinds.values() for n in numbers}
        return kinds, [n for n in range(len(params)) if n not in taken]

    def tables(self, tensors: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """``(n, 4)`` and ``(programs, 2)`` int64: see :func:`~.shifting.shift_kernel`."""
        device = tensors[0][0].device
        rows = [number for three in tensors for number in (*(t.data_ptr() for t in three), three[0].numel())]
        sizes = tuple(three[0].numel() for three in tensors)
        table = self._table(("rows", device, *rows), lambda: on_device(rows, torch.int64, device).view(-1, 4))
        return table, self._table(("runs", device, sizes), lambda: _runs(sizes).to(device))

    def rates(self, lr: Sequence[float], device: torch.device) -> Tensor:
        """``(n,)`` float32."""
        return self._table(("rates", device, *lr), lambda: on_device(lr, torch.float32, device))

    def _table(self, key: tuple[object, ...], make: Callable[[], Tensor]) -> Tensor:
        table = self._known.pop(key, None)
        if table is None:
            table = make()
            if len(self._known) >= _KEPT:
                self._known.pop(next(iter(self._known)))
        self._known[key] = table  # as the one that was used last
        return table


def _runs(sizes: Sequence[int]) -> Tensor:
    runs = []
    for position, size in enumerate(sizes):
        starts = torch.arange(0, size, launching.RUN, dtype=torch.int64, device="cpu")
        runs.append(torch.stack([torch.full_like(starts, position), starts], dim=1))
    return torch.cat(runs)
