"""The recipe in plain PyTorch, with what was tried beyond it: the changes that ``DisTrO`` does not have.

One tensor after the other, as :mod:`distro_optim.optim.reference` does it, in floating point. With a worker's gradient
``g`` at ``theta - own``, and ``lr`` of the step::

    m      becomes  momentum * m + (1 - momentum) * g
    o      is       lr * direction(momentum * m + (1 - momentum) * g)
    e      becomes  decay * e + o                        what has not been sent
    own    is       o, or e, or with local_steps the sum of all o since the last exchange
    q      is       the topk largest DCT coefficients of each tile of e, whose signs are sent
    e      becomes  e - q
    u      is       the decoded mean of what was sent
    theta  becomes  theta - gain * lr * u / rms(u)

What a :class:`~learners.base.Variation` changes is said there. With ``local_steps`` an exchange steps by so many rates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from distro_optim.optim.orthogonal import NEWTON_SCHULZ
from distro_optim.optim.reference import decode, encode, from_tiles, largest, to_tiles
from learners.base import Batch, Method, Task, Variation, Workers, gradients, with_weights

__all__ = ["VariedWorkers", "orthogonal"]

_ROWS_MOMENTUM = 0.95
_APPLIED_MOMENTUM = 0.8
_GAIN = 2.0
_EMBEDDINGS = 2
_ADAM = (0.9, 0.95)
_TINY = 1e-20


class VariedWorkers(Workers):
    """See the module."""

    def __init__(self, task: Task, method: Method, workers: int) -> None:
        self._task, self._method, self._steps, self._sent = task, method, 0, 0.0
        self._change = method.variation or Variation()
        self._model = task.model()
        self._theta = [p.detach().clone() for p in self._model.parameters()]

        def zeros() -> list[list[Tensor]]:
            return [[torch.zeros_like(weight) for weight in self._theta] for _ in range(workers)]

        self._momenta, self._unsent, self._own = zeros(), zeros(), zeros()
        self._rows = [[torch.zeros(len(w), 1) if w.ndim > 1 else w[:0] for w in self._theta] for _ in range(workers)]
        self._squares = zeros() if self._change.adam_rows else []
        self._applied = [torch.zeros_like(weight) for weight in self._theta]
        self._after = [torch.zeros_like(weight) for weight in self._theta]
        self._on_its_way: list[list[Tensor]] | None = None

    @override
    @torch.no_grad()
    def step(self, batches: Sequence[Batch], lr: float) -> None:
        method, change = self._method, self._change
        period = max(1, method.local_steps)
        self._steps += 1
        exchanges = self._steps % period == 0
        sent: list[list[Tensor]] = [[] for _ in self._theta]
        for worker, batch in enumerate(batches):
            where = [weight - own for weight, own in zip(self._theta, self._own[worker], strict=True)]
            with torch.enable_grad():
                found = gradients(self._task, self._model, where, batch)
            for number, gradient in enumerate(found):
                taken = lr * self._direction(worker, number, gradient)
                unsent = self._unsent[worker][number].mul_(method.decay).add_(taken)
                own = self._own[worker][number]
                if period > 1:
                    own.add_(taken)
                else:
                    ahead = unsent if method.ahead == "delta" else taken
                    own.copy_(change.times * ahead + change.applied_ahead * lr * self._applied[number])
                if exchanges:
                    sent[number].append(self._message(unsent, counts=worker == 0))
            if exchanges and period > 1:
                for own in self._own[worker]:
                    own.zero_()
        if exchanges:
            arrived, self._on_its_way = (self._on_its_way, sent) if method.overlap else (sent, None)
            if arrived is not None:
                self._apply(arrived, lr * period)

    def _direction(self, worker: int, number: int, gradient: Tensor) -> Tensor:
        share, change = 1 - self._method.momentum, self._change
        if gradient.ndim == 2 and len(gradient) == change.adam_rows:
            return self._adam_direction(worker, number, gradient)
        momentum = self._momenta[worker][number].lerp_(gradient, share)
        look = momentum.lerp(gradient, share)
        if look.ndim < 2:
            return look.sign()
        applied = self._applied[number]
        if change.shared and applied.any():
            look = look / look.norm() + change.shared * applied / applied.norm()
        direction = orthogonal(look, change.squarings)
        if change.equal_rows:
            rows = self._rows[worker][number].lerp_(direction.square().mean(1, keepdim=True), 1 - _ROWS_MOMENTUM)
            equal = direction / (rows / (1 - _ROWS_MOMENTUM**self._steps)).sqrt().clamp_min(_TINY)
            direction = equal * (direction.norm() / equal.norm())
        return direction

    def _adam_direction(self, worker: int, number: int, gradient: Tensor) -> Tensor:
        """Elements are of size 1, as those of an orthogonal one are."""
        first, second = _ADAM
        mean = self._momenta[worker][number].lerp_(gradient, 1 - first) / (1 - first**self._steps)
        square = self._squares[worker][number].lerp_(gradient.square(), 1 - second) / (1 - second**self._steps)
        return mean / square.sqrt().clamp_min(_TINY)

    def _message(self, unsent: Tensor, *, counts: bool) -> Tensor:
        """What is sent of a tensor, as coefficients in tiles; leaves ``unsent``."""
        method, change = self._method, self._change
        coefficients = encode(to_tiles(unsent, method.chunk, "padded"))
        if change.sends_all:
            unsent.zero_()
            self._sent += counts * 4 * coefficients.numel()
            return coefficients
        flat, topk = coefficients.flatten(1), self._topk()
        if change.by_energy:
            flat = flat.view(1, -1)
            topk *= len(coefficients)
        index, value = largest(flat, min(topk, flat.shape[1]))
        taken = torch.zeros_like(flat).scatter(1, index, value).view_as(coefficients)
        unsent.sub_(from_tiles(decode(taken), unsent, "padded"))
        self._sent += counts * self._bits_of(index, flat.shape[1]) / 8
        size = value.abs().mean(1, keepdim=True).bfloat16() if change.tile_scale else 1
        return torch.zeros_like(flat).scatter(1, index, value.sign() * size).view_as(coefficients)

    def _topk(self) -> int:
        over = self._change.growing_over
        grown = 0.5 + min(1.0, self._steps / over) if over else 1.0
        return round(self._method.topk * grown)

    def _bits_of(self, index: Tensor, size: int) -> float:
        """Of the positions ``(n, k)`` below ``size``, with signs, and with sizes where they are sent."""
        n, k = index.shape
        width = 8.0 * k * (1 if size <= 1 << 8 else 2 if size <= 1 << 16 else 4)
        if self._change.coded:
            width = (math.lgamma(size + 1) - math.lgamma(k + 1) - math.lgamma(size - k + 1)) / math.log(2)
        return n * (width + k + 16 * self._change.tile_scale)

    def _apply(self, sent: list[list[Tensor]], lr: float) -> None:
        change = self._change
        for number, (weight, messages) in enumerate(zip(self._theta, sent, strict=True)):
            together = torch.stack(messages)
            total = together.sum(0)
            if not change.adds_up:
                total = total / (together != 0).sum(0).clamp_min(1)
            update = from_tiles(_of_size_1(decode(total)), weight, "padded")
            if change.momentum_after:
                after = self._after[number].lerp_(update, 1 - change.momentum_after)
                update = _of_size_1(after)
            if change.orthogonal_after and weight.ndim > 1:
                update = _of_size_1(orthogonal(update))
            self._applied[number].lerp_(update, 1 - _APPLIED_MOMENTUM)
            gain = self._method.gain or _GAIN
            weight.sub_(update, alpha=lr * gain * (change.embedding_gain if number < _EMBEDDINGS else 1.0))

    @override
    def model(self) -> nn.Module:
        return with_weights(self._model, self._theta)

    @override
    def sent_per_step(self) -> float:
        return self._sent / self._steps


def _of_size_1(x: Tensor) -> Tensor:
    return x / x.square().mean().sqrt().clamp_min(_TINY)


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """Muon's direction ``(rows, columns)``, by so many steps of Newton and Schulz."""
    a, b, c = NEWTON_SCHULZ
    flat = matrix.flatten(1)
    x = flat / flat.norm().clamp_min(_TINY)
    if x.shape[0] > x.shape[1]:
        x = x.T.contiguous()
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    if flat.shape[0] > flat.shape[1]:
        x = x.T
    return x.reshape(matrix.shape) * max(flat.shape) ** 0.5
