"""Gradients of micro-batches, added in float32.

Psyche's trainer divides the mean loss of each micro-batch by their number and adds up the gradients, in float32 if
the operator asks for it and there is more than one; the sum is rounded to the type of the parameters once
(PsycheFoundation/psyche ``shared/modeling/src/trainer.rs`` ``model_thread``, ``fp32_gradient_accumulator.rs``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .batches import TokenBatch

if TYPE_CHECKING:
    from .causal_lm import CausalLM

__all__ = ["Fp32GradientAccumulator", "train_batch"]


class Fp32GradientAccumulator:
    """Sums of gradients, in float32 (float64 for parameters of float64), allocated when first needed."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._sums: list[Tensor | None] = [None] * len(self._parameters)
        self._used = [False] * len(self._parameters)

    @torch.no_grad()
    def add(self) -> None:
        """Takes the gradients of the parameters into the sums; the parameters have none afterwards."""
        for number, param in enumerate(self._parameters):
            if param.grad is None:
                continue
            total = self._sums[number]
            if total is None:
                dtype = torch.promote_types(param.dtype, torch.float32)
                total = self._sums[number] = torch.zeros_like(param, dtype=dtype)
            if self._used[number]:
                total.add_(param.grad)
            else:
                total.copy_(param.grad)
                self._used[number] = True
            param.grad = None

    @torch.no_grad()
    def apply(self, scale: Tensor | float = 1.0) -> None:
        """Adds the sums, times ``scale``, to the gradients of the parameters, and begins again at zero."""
        for number, param in enumerate(self._parameters):
            total = self._sums[number]
            if total is None or not self._used[number]:
                continue
            total.mul_(scale)
            if param.grad is not None:
                total.add_(param.grad)
            param.grad = total.to(param.dtype)
            if param.grad is total:
                self._sums[number] = None
        self.clear()

    def clear(self) -> None:
        """Forgets what was added."""
        self._used = [False] * len(self._parameters)


def train_batch(
    model: CausalLM,
    batch: object,
    *,
    micro_batch_size: int | None = None,
    accumulator: Fp32GradientAccumulator | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Tensor | None:
    """Forward and backward pass over a batch; the gradients are in the parameters afterwards.

    Args:
        batch: see :meth:`TokenBatch.of`, on the model's device.
        micro_batch_size: sequences at a time.
        accumulator: adds up the micro-batches; kept by the caller so that its memory is allocated once. A new one
            where None.
        cancelled: asked before each micro-batch; the rest of the batch is left out once it says yes.

    Returns:
        the loss, 0-D float32: the sum of the micro-batches' means over their number, without those that are not
        finite. None if cancelled; the gradients are of no use then.
    """
    parts = TokenBatch.of(batch).micro_batches(micro_batch_size)
    if accumulator is None:
        accumulator = Fp32GradientAccumulator(model.parameters())
    accumulator.clear()
    for param in model.parameters():
        param.grad = None
    total = torch.zeros((), device=parts[0].input_ids.device)
    for part in parts:
        if cancelled is not None and cancelled():
            accumulator.clear()
            return None
        loss = model(part, loss_scale=len(parts)).loss
        loss.backward()
        value = loss.detach().float()
        total += torch.where(value.isfinite(), value, torch.zeros_like(value))
        if len(parts) > 1:
            accumulator.add()
    if len(parts) > 1:
        accumulator.apply()
    return total
