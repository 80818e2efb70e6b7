"""A plain twin of SparseLoCo: as DiLoCo, but of what a worker has come only the largest are sent, in two bits each.

Sarfi et al., 2025, arXiv:2508.15706. Each worker takes ``local_steps`` steps of AdamW from the shared weights
``theta``. With ``moved``, which is ``theta - own``, and a memory ``e`` of what has not been sent::

    e      becomes  decay * e + moved
    q      is       the topk largest of each chunk of 4,096 values of e, in two bits each
    e      becomes  e - q
    theta  becomes  theta - outer_lr * mean of all q

The two bits here are a sign, and which of two sizes: the mean of the larger ones of the chunk, or of the smaller ones;
both means travel in bfloat16. A position takes 12 bits. Where everything is sent, as of a vector, positions are not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from learners.base import Method, Task
from learners.diloco import LocalWorkers

__all__ = ["SparseLoCoWorkers", "bits_sent", "largest_in_two_bits"]

_CHUNK = 4096
_POSITION_BITS, _VALUE_BITS, _MEANS_BITS = 12, 2, 32


class SparseLoCoWorkers(LocalWorkers):
    """See the module."""

    def __init__(self, task: Task, method: Method, workers: int) -> None:
        super().__init__(task, method, workers)
        self._unsent = [[torch.zeros_like(weight) for weight in self._theta] for _ in range(workers)]

    @override
    def _exchange(self, moved: list[list[Tensor]]) -> None:
        method = self._method
        for number, weight in enumerate(self._theta):
            total = torch.zeros_like(weight)
            for unsent, own in zip(self._unsent, moved, strict=True):
                unsent[number].mul_(method.decay).add_(own[number])
                sent = largest_in_two_bits(unsent[number], method.topk)
                unsent[number].sub_(sent)
                total += sent
            weight.sub_(total / len(moved), alpha=method.outer_lr)
            self._sent += bits_sent(weight.numel(), method.topk) / 8


def largest_in_two_bits(x: Tensor, topk: int) -> Tensor:
    """What is sent of ``x``, and zeros; of its shape."""
    length = min(_CHUNK, x.numel())
    chunks = F.pad(x.flatten(), (0, -x.numel() % length)).view(-1, length)
    index = chunks.abs().topk(min(topk, length), sorted=False).indices
    values = chunks.gather(1, index)
    size = values.abs()
    is_large = size > size.mean(1, keepdim=True)
    means = [
        ((size * kind).sum(1, keepdim=True) / kind.sum(1, keepdim=True).clamp_min(1)).bfloat16().float()
        for kind in (is_large, ~is_large)
    ]
    sent = torch.where(values < 0, -1.0, 1.0) * torch.where(is_large, *means)
    return torch.zeros_like(chunks).scatter_(1, index, sent).flatten()[: x.numel()].view_as(x)


def bits_sent(elements: int, topk: int) -> int:
    """Of a tensor, in one exchange."""
    length = min(_CHUNK, elements)
    chunks, k = math.ceil(elements / length), min(topk, length)
    return chunks * (k * (_VALUE_BITS + (_POSITION_BITS if k < length else 0)) + _MEANS_BITS)
