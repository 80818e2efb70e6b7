"""DeMo as published (Peng et al., 2024, arXiv:2411.19870; bloc97/DeMo ``demo.py``), one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .tiles import decode, encode, from_tiles, largest, placed, to_tiles

Sent = tuple[Tensor, Tensor]  # index and value, (tiles, k)


@dataclass
class PlainDeMo:
    """One peer's optimizer of one tensor.

    ``delta`` is kept in the dtype of the arithmetic; values are sent in the dtype of ``param``.
    """

    param: Tensor
    delta: Tensor
    decay: float
    topk: int
    chunk: int
    tiling: str
    quantize: bool
    weight_decay: float = 0.0
    select: Callable[[Tensor, int], Sent] = largest  # a test may settle ties

    def generate(self, grad: Tensor | None, lr: float) -> Sent | None:
        """What is sent of this step, or None without a gradient."""
        if grad is None:
            return None
        self.param.mul_(1 - lr * self.weight_decay)
        self.delta = self.decay * self.delta + lr * grad.to(self.delta.dtype)
        tiles = to_tiles(self.delta, self.chunk, self.tiling)
        index, value = self.select(encode(tiles), self.topk)
        if not self.quantize:
            value = value.to(self.param.dtype).to(self.delta.dtype)
        self.delta = self.delta - from_tiles(decode(placed(index, value, tiles)), self.delta, self.tiling)
        return index, torch.signbit(value) if self.quantize else value

    def decoded(self, sent: Sequence[Sent]) -> Tensor:
        """What everybody sent, together: the mean over those who sent a coefficient, back in weight space."""
        tiles = to_tiles(torch.zeros_like(self.delta), self.chunk, self.tiling)
        if not sent:
            return torch.zeros_like(self.delta)
        index = torch.cat([i for i, _ in sent], dim=1)
        value = torch.cat([1.0 - 2.0 * v.to(tiles.dtype) if v.dtype == torch.bool else v for _, v in sent], dim=1)
        return from_tiles(decode(placed(index, value.to(tiles.dtype), tiles)), self.delta, self.tiling)

    def apply(self, sent: Sequence[Sent], lr: float) -> None:
        moved = self.param.to(self.delta.dtype) - lr * self.decoded(sent).sign()
        self.param.copy_(moved.to(self.param.dtype))
