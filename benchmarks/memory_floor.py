"""What memory alone takes: passes that touch what every such optimizer must, and compute next to nothing.

With DeMo's settings each gradient is read, and momentum and weights are read and written: 20 bytes a weight. With
Psyche's, where the weights look ahead, shifted ones are written as well, which a processor reads before it overwrites
them: 24 bytes, or 28. A real step cannot be one pass: whether a gradient is finite, and what everybody says, is known
too late for that. So no step can be faster than this on the same machine, with as many threads, and with tensors that
are in the same caches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numba
import numpy as np
import numpy.typing as npt
import torch

from distro_optim.compress.profile import CPU
from distro_optim.optim.workers import workers_of_a_step

__all__ = ["MemoryFloor", "copy_of"]

BLOCK: Final = CPU.block_elements
"""Elements that a thread takes at a time, as in a real step."""

Floats = npt.NDArray[np.float32]
Part = tuple[Floats, ...]


def _compiled(function: Callable[..., None]) -> Any:
    return numba.njit(nogil=True)(function)


@_compiled
def _demo(grad: Floats, momentum: Floats, weight: Floats) -> None:
    keep, rate = np.float32(0.999), np.float32(1e-3)
    for i in range(len(grad)):
        x = keep * momentum[i] + rate * grad[i]
        momentum[i] = x
        weight[i] -= np.copysign(rate, x)


@_compiled
def _psyche(grad: Floats, momentum: Floats, weight: Floats, shifted: Floats) -> None:
    keep, rate = np.float32(0.999), np.float32(1e-3)
    for i in range(len(grad)):
        x = keep * momentum[i] + rate * grad[i]
        momentum[i] = x
        y = weight[i] - rate
        weight[i] = y
        shifted[i] = y - np.copysign(rate, x)


@_compiled
def _copy(source: Floats, target: Floats) -> None:
    for i in range(len(source)):
        target[i] = source[i]


class MemoryFloor:
    """A pass over tensors of the given parameters' sizes, by the threads that a step of ours has.

    Args:
        params: with gradients, which are read; nothing of them is changed.
        psyche: with Psyche's settings.
    """

    def __init__(self, params: Sequence[torch.nn.Parameter], *, psyche: bool) -> None:
        self._pass = _psyche if psyche else _demo
        self._parts: list[Part] = []
        for param in params:
            assert param.grad is not None
            own = [np.zeros(param.numel(), np.float32) + np.float32(1e-3) for _ in range(3 if psyche else 2)]
            self._parts += _parts(param.grad.view(-1).numpy(), *own)

    def step(self) -> None:
        """One pass."""
        workers_of_a_step().run(lambda part, _: self._pass(*part), self._parts)


def copy_of(params: Sequence[torch.nn.Parameter]) -> Callable[[], None]:
    """What copies all parameters, once for each call, by as many threads: 8 bytes a weight."""
    sources = [param.detach().view(-1).numpy() for param in params]
    parts = [part for source in sources for part in _parts(source, np.zeros_like(source) + np.float32(1))]
    return lambda: workers_of_a_step().run(lambda part, _: _copy(*part), parts)


def _parts(*arrays: Floats) -> list[Part]:
    size = len(arrays[0])
    return [tuple(array[start : start + BLOCK] for array in arrays) for start in range(0, size, BLOCK)]
