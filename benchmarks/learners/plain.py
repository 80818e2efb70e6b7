"""The plain twin of ``DisTrO``: one tensor at a time, every formula written out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from distro_optim.optim.reference import ReferenceTensor, Sent
from learners.base import Batch, Method, Task, Workers, gradients, with_weights

__all__ = ["PlainWorkers"]


class PlainWorkers(Workers):
    """One set of weights, since all workers' are equal, and of every tensor as many plain optimizers as workers."""

    def __init__(self, task: Task, method: Method, workers: int, dtype: torch.dtype = torch.float32) -> None:
        self._task, self._overlap = task, method.overlap
        self._model = task.model()
        self._weights = [p.detach().to(dtype, copy=True) for p in self._model.parameters()]
        self._peers = [[self._twin(weight, method) for weight in self._weights] for _ in range(workers)]
        self._previous_lr = 0.0
        self._on_its_way: list[list[Sent]] = []

    @override
    def step(self, batches: Sequence[Batch], lr: float) -> None:
        sent: list[list[Sent]] = [[] for _ in self._weights]
        for peer, batch in zip(self._peers, batches, strict=True):
            own = gradients(self._task, self._model, [self._where(plain) for plain in peer], batch)
            for number, (plain, gradient) in enumerate(zip(peer, own, strict=True)):
                message = plain.generate(gradient, lr)
                if message is not None:
                    sent[number].append(message)
        arrived = self._on_its_way if self._overlap else sent
        for plain, messages in zip(self._peers[0], arrived, strict=bool(arrived)):
            plain.apply(messages, lr)  # to the weights they all share
        self._on_its_way, self._previous_lr = sent, lr

    @staticmethod
    def _twin(weight: Tensor, method: Method) -> ReferenceTensor:
        return ReferenceTensor(
            weight,
            torch.zeros_like(weight),
            method.decay,
            method.topk,
            method.chunk,
            "padded",
            method.quantize,
            method.overlap,
            direction=method.direction,
            update=method.update,
            momentum=method.momentum,
            ahead="delta" if method.ahead == "delta" else "direction",
            gain=(2.0 if method.update == "rms" else 1.0) if method.gain is None else method.gain,
        )

    def _where(self, plain: ReferenceTensor) -> Tensor:
        """Where the gradient is taken."""
        return plain.looking_ahead(self._previous_lr) if self._overlap else plain.param

    @override
    def model(self) -> nn.Module:
        return with_weights(self._model, self._weights)

    @override
    def sent_per_step(self) -> float:
        return math.nan  # twins send nothing
