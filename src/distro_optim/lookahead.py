"""Psyche's error correction: gradients are taken where the weights will be, not where they are.

With overlapped steps a gradient is computed before the update of the step before has arrived. What a peer has in its
momentum is its best guess of what is coming, so for the forward and backward pass it shifts its weights by
``-lr * sign(delta)`` and takes the shift back before the step (PsycheFoundation/psyche
``shared/modeling/src/distro.rs``, ``error_correction``).

Floating-point addition does not give back what subtraction took: adding the shift again changes a few per cent of the
weights by a rounding error, differently on every peer, and replicas drift apart. So the weights are kept aside and
copied back.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

__all__ = ["Edits", "Lookahead"]

# Elements shifted at a time: the temporary for the signs stays in the cache.
_CHUNK: Final = 1 << 19

# Tensors up to this size are compared at every undo, since versions do not see a write through ``.data``: small ones
# are often clipped that way (CLIP's logit scale), and here the comparison costs next to nothing.
_ALWAYS_COMPARED: Final = 1024


class Edits(enum.Enum):
    """What becomes of a tensor that somebody else wrote to while it looked ahead.

    Where the shifted weights were only written again (a checkpoint of them), nothing counts as written.
    """

    MERGE = "if most elements are as they were (it was clipped, say), those are put back; otherwise all stay"
    KEEP = "it keeps what was written"
    DISCARD = "it gets its true weights back"


class Lookahead:
    """Shifts parameters in place and puts them back, bit for bit."""

    def __init__(self, *, on: bool = False) -> None:
        self._on = on
        # Tells a write by somebody else from none; None where nothing is known, as in a copied optimizer.
        self._versions: list[int] | None = None

    @property
    def on(self) -> bool:
        return self._on

    def put_on(
        self, params: Sequence[Tensor], deltas: Sequence[Tensor], saved: Sequence[Tensor], lr: Sequence[float]
    ) -> None:
        """Copies ``params`` to ``saved``, then ``param -= lr * sign(delta)``; ``lr`` is one per tensor."""
        for param, delta, keep, rate in zip(params, deltas, saved, lr, strict=True):
            keep.copy_(param)
            _shift(param, delta, rate)
        self._versions = [p._version for p in params]
        self._on = True

    def take_off(
        self,
        params: Sequence[Tensor],
        deltas: Sequence[Tensor],
        saved: Sequence[Tensor],
        lr: Sequence[float],
        *,
        edits: Edits = Edits.MERGE,
    ) -> None:
        """Copies ``saved`` back to ``params``, where nobody else has written meanwhile."""
        versions = self._versions if self._versions is not None else [-1] * len(params)
        for param, delta, keep, rate, version in zip(params, deltas, saved, lr, versions, strict=True):
            if edits is Edits.DISCARD or (param._version == version and param.numel() > _ALWAYS_COMPARED):
                param.copy_(keep)
                continue
            shifted = keep.clone()
            _shift(shifted, delta, rate)
            # The parameter may be on another device and of another type by now: module.to(...) writes through .data.
            unwritten = param == shifted.to(param)
            count = int(unwritten.sum())
            if count == param.numel():
                param.copy_(keep)
            elif count > param.numel() // 2 and edits is Edits.MERGE:
                param.copy_(torch.where(unwritten, keep.to(param), param))
        self._versions, self._on = None, False


def _shift(param: Tensor, delta: Tensor, lr: float) -> None:
    if not param.is_contiguous():
        param.add_(torch.sign(delta), alpha=-lr)
        return
    flat, flat_delta = param.view(-1), delta.view(-1)
    for start in range(0, flat.numel(), _CHUNK):
        flat[start : start + _CHUNK].add_(torch.sign(flat_delta[start : start + _CHUNK]), alpha=-lr)
