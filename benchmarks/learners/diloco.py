"""A plain twin of DiLoCo: workers that train alone for many steps, and then move together.

Douillard et al., 2023, arXiv:2311.08105. Each worker takes ``local_steps`` steps of AdamW from the shared weights
``theta``. How far it came, ``theta - own``, is its outer gradient. Everybody makes a step of SGD with Nesterov's
momentum of the mean of all outer gradients, and starts anew from there, with the AdamW state that it has::

    m      becomes  outer_momentum * m + mean
    theta  becomes  theta - outer_lr * (mean + outer_momentum * m)

Outer gradients are sent in bfloat16, or with ``bits=4`` as in Streaming DiLoCo (Douillard et al., 2025,
arXiv:2501.18512): a sign and three bits of exponent, here below the largest of the tensor. Nothing else of that is in
here: all weights are sent together, and no step is late.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from learners.base import BF16_BYTES, Batch, Method, Task, Workers, with_weights

__all__ = ["DiLoCoWorkers", "LocalWorkers", "power_of_two"]

_BETAS = (0.9, 0.95)
_EXPONENTS = 8
_SCALE_BYTES = 4


class LocalWorkers(Workers):
    """AdamW on each worker; what they make of it together is :meth:`_exchange`'s."""

    def __init__(self, task: Task, method: Method, workers: int) -> None:
        self._task, self._method, self._steps, self._sent = task, method, 0, 0.0
        self._model = task.model()
        self._theta = [p.detach().clone() for p in self._model.parameters()]
        self._own = [task.model() for _ in range(workers)]
        self._inner = [
            torch.optim.AdamW(own.parameters(), lr=method.lr, betas=_BETAS, weight_decay=0.0) for own in self._own
        ]
        self._restart()

    @override
    def step(self, batches: Sequence[Batch], lr: float) -> None:
        for own, optimizer, batch in zip(self._own, self._inner, batches, strict=True):
            optimizer.zero_grad()
            self._task.loss(own, *batch).backward()
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        self._steps += 1
        if self._steps % self._method.local_steps == 0:
            with torch.no_grad():
                self._exchange([[t - p for t, p in zip(self._theta, o.parameters(), strict=True)] for o in self._own])
            self._restart()

    def _exchange(self, moved: list[list[Tensor]]) -> None:
        """Moves the shared weights.

        Args:
            moved: of each worker, how far below the shared weights it came, tensor by tensor.
        """
        raise NotImplementedError

    def _restart(self) -> None:
        for own in self._own:
            with_weights(own, self._theta)

    @override
    def model(self) -> nn.Module:
        return with_weights(self._model, self._theta)

    @override
    def sent_per_step(self) -> float:
        return self._sent / self._steps


class DiLoCoWorkers(LocalWorkers):
    """See the module."""

    def __init__(self, task: Task, method: Method, workers: int) -> None:
        super().__init__(task, method, workers)
        self._momentum = [torch.zeros_like(weight) for weight in self._theta]

    @override
    def _exchange(self, moved: list[list[Tensor]]) -> None:
        method = self._method
        for number, (weight, momentum) in enumerate(zip(self._theta, self._momentum, strict=True)):
            received = [self._received(own[number]) for own in moved]
            mean = torch.stack(received).mean(0)
            momentum.mul_(method.outer_momentum).add_(mean)
            weight.sub_(mean + method.outer_momentum * momentum, alpha=method.outer_lr)
            self._sent += weight.numel() * (0.5 if method.bits == 4 else BF16_BYTES)
            self._sent += _SCALE_BYTES if method.bits == 4 else 0

    def _received(self, outer_gradient: Tensor) -> Tensor:
        """What the others read."""
        return power_of_two(outer_gradient) if self._method.bits == 4 else outer_gradient.bfloat16().float()


def power_of_two(x: Tensor) -> Tensor:
    """Each element as its sign and the nearest of eight powers of two: 1 to 1/128 of the largest."""
    largest = x.abs().max().clamp_min(torch.finfo(x.dtype).tiny)
    # The border between 2^-e and its half lies at three quarters of the former.
    exponent = torch.floor(torch.log2(x.abs() / (0.75 * largest))).clamp(1 - _EXPONENTS, 0)
    return torch.where(x < 0, -1.0, 1.0) * largest * torch.exp2(exponent)
