"""``DisTrO``: each worker has an optimizer and weights of its own, and they exchange in memory what they would send."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from typing_extensions import override

from distro_optim import DisTrO
from distro_optim.comm.memory import MemoryExchange
from distro_optim.compress import Arithmetic
from learners.base import Batch, Method, Task, Workers, gradients, with_weights

__all__ = ["DistroWorkers"]


class DistroWorkers(Workers):
    """Weights are of ``dtype``."""

    def __init__(
        self,
        task: Task,
        method: Method,
        workers: int,
        dtype: torch.dtype = torch.float32,
        arithmetic: Arithmetic = "exact",
    ) -> None:
        self._task, self._overlap = task, method.overlap
        self._steps = 0
        self._model = task.model()
        self.weights = [
            [nn.Parameter(p.detach().to(dtype, copy=True)) for p in self._model.parameters()] for _ in range(workers)
        ]
        self._exchanges = MemoryExchange.group(workers)
        self.optimizers = [
            DisTrO(
                weights,
                lr=method.lr,
                compression_decay=method.decay,
                compression_topk=method.topk,
                compression_chunk=method.chunk,
                quantize_1bit=method.quantize,
                overlap=method.overlap,
                direction=method.direction,
                update=method.update,
                gain=method.gain,
                momentum=method.momentum,
                ahead=method.ahead,
                exchange=exchange,
                arithmetic=arithmetic,
            )
            for weights, exchange in zip(self.weights, self._exchanges, strict=True)
        ]

    @override
    def step(self, batches: Sequence[Batch], lr: float) -> None:
        for weights, optimizer, batch in zip(self.weights, self.optimizers, batches, strict=True):
            optimizer.train()
            for weight, gradient in zip(weights, gradients(self._task, self._model, weights, batch), strict=True):
                weight.grad = gradient
            optimizer.param_groups[0]["lr"] = lr
            optimizer.begin_step()
        for optimizer in self.optimizers:
            optimizer.finish_step()
            if self._overlap:
                optimizer.lookahead()
        self._steps += 1

    @override
    @torch.no_grad()
    def model(self) -> nn.Module:
        for optimizer in self.optimizers:
            optimizer.eval()
        first, *others = self.weights
        if not all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True)):
            raise AssertionError("the workers' weights differ")
        return with_weights(self._model, first)

    @override
    def sent_per_step(self) -> float:
        return self._exchanges[0].bytes_sent / self._steps
