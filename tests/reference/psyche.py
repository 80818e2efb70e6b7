"""DisTrO as Psyche runs it (PsycheFoundation/psyche ``shared/modeling/src/distro.rs``), one tensor at a time.

Other than DeMo: gradients are taken at ``p - prev_lr * sign(delta)``; what was sent stays in ``delta`` until the next
round; everybody's results are applied later, by whoever calls :meth:`apply`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .demo import PlainDeMo, Sent
from .tiles import decode, encode, from_tiles, placed, to_tiles


@dataclass
class PlainPsyche(PlainDeMo):
    """One peer's optimizer of one tensor."""

    own: Sent | None = None  # what was sent in the round before, unquantised

    def looking_ahead(self, previous_lr: float) -> Tensor:
        """The weights at which the gradient is taken."""
        return (self.param.to(self.delta.dtype) - previous_lr * self.delta.sign()).to(self.param.dtype)

    def generate(self, grad: Tensor | None, lr: float) -> Sent | None:
        tiles = to_tiles(self.delta, self.chunk, self.tiling)
        if self.own is not None:
            self.delta = self.delta - from_tiles(decode(placed(*self.own, tiles)), self.delta, self.tiling)
            self.own = None
        if grad is None:
            return None
        self.param.mul_(1 - lr * self.weight_decay)
        self.delta = self.decay * self.delta + lr * grad.to(self.delta.dtype)
        index, value = self.select(encode(to_tiles(self.delta, self.chunk, self.tiling)), self.topk)
        if not self.quantize:
            value = value.to(self.param.dtype).to(self.delta.dtype)
        self.own = index, value
        return index, torch.signbit(value) if self.quantize else value
