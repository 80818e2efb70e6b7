"""Which gradients may touch the momentum: one NaN in it would stay for good, and reach every peer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compress import compute_dtype
from ..errors import DistroError

__all__ = ["Quarantine", "Usable", "unseen_gradients", "usable_gradients"]


@dataclass(frozen=True)
class Usable:
    """What a step may take of the gradients.

    Attributes:
        grads: those that may be used, with None for the others.
        bad: numbers of those that are not finite.
        scale: what they are multiplied with, and have to be divided by.
        finite: None where ``bad`` says all; else nobody has waited for that: ``(tensors,)`` int32 on the device, 0 for
            gradients that are not finite and such that are None.
        flags: with ``finite``, 0 for all that may not be used.
        divisor: with ``finite``, what has to be divided by beside: 0-D float32 on the device. None: nothing.
    """

    grads: list[Tensor | None]
    bad: list[int]
    scale: float
    finite: Tensor | None = None
    flags: Tensor | None = None
    divisor: Tensor | None = None


Look = Callable[[Sequence[Tensor | None]], Tensor | None]
""":meth:`~distro_optim.compress.engine.Engine.finite`."""


class Quarantine:
    """Counts gradients that are not finite, on the device, until somebody asks for the numbers."""

    def __init__(self) -> None:
        self._given: list[int] = []
        self._fine: Tensor | None = None

    def add(self, grads: Sequence[Tensor | None], finite: Tensor, counters: Sequence[Tensor | None]) -> None:
        """One more step.

        Args:
            grads: one per parameter.
            finite: of them, ``(tensors,)`` int32 on the device.
            counters: as for :meth:`settle`, for steps with other parameters.
        """
        if self._fine is not None and (self._fine.shape != finite.shape or self._fine.device != finite.device):
            self.settle(counters)
        if self._fine is None:
            self._given = [0] * len(grads)
        # Never in place: a step may be taken in an inference mode, and the next one outside of it.
        self._fine = finite if self._fine is None else self._fine + finite
        self._given = [count + (grad is not None) for count, grad in zip(self._given, grads, strict=True)]

    def settle(self, counters: Sequence[Tensor | None]) -> None:
        """Adds what was counted to ``counters``, 0-D int64 in main memory, one per parameter. Waits for the device."""
        if self._fine is None:
            return
        fine: list[int] = self._fine.tolist()
        for counter, count, good in zip(counters, self._given, fine, strict=False):
            if counter is not None and count > good:
                counter.add_(count - good)
        self._given, self._fine = [], None


def _refuse_sparse(grads: Sequence[Tensor | None]) -> None:
    for number, grad in enumerate(grads):
        if grad is not None and (grad.is_sparse or grad.layout != torch.strided):
            raise DistroError(f"parameter {number} has a sparse gradient: build its layer with sparse=False")


def unseen_gradients(
    grads: Sequence[Tensor | None],
    found_inf: Tensor | float | None,
    scale: Tensor | float | None,
    look: Look,
) -> Usable | None:
    """:func:`usable_gradients`, but nothing waits for a device: what is found out stays there.

    Returns:
        None where it cannot.

    Raises:
        DistroError: a gradient is sparse.
    """
    _refuse_sparse(grads)
    finite = look(grads) if any(grad is not None and grad.numel() for grad in grads) else None
    given = [value for value in (found_inf, scale) if isinstance(value, Tensor)]
    if finite is None or any(value.device != finite.device for value in given):
        return None
    flags, divisor = finite, None
    if isinstance(found_inf, Tensor):
        flags = finite * (found_inf.detach().reshape(1) <= 0)
    elif found_inf is not None:
        return None
    if isinstance(scale, Tensor):
        divisor = scale.detach().reshape(()).to(torch.float32)
    factor = 1.0 if scale is None or divisor is not None else float(scale)
    return Usable(list(grads), [], factor, finite, flags, divisor)


def usable_gradients(
    grads: Sequence[Tensor | None],
    found_inf: Tensor | None = None,
    scale: Tensor | float | None = None,
    look: Look | None = None,
) -> Usable:
    """The gradients that may be used. Waits for a device once, however many tensors there are.

    Args:
        grads: one per parameter, shaped as it and of any float type, or None.
        found_inf: 0-D, from a GradScaler that leaves the unscaling to the optimizer; above 0 no gradient may be used.
        scale: of it.
        look: :meth:`~distro_optim.compress.engine.Engine.finite`, for an engine that may do it.

    Raises:
        DistroError: a gradient is sparse.
    """
    _refuse_sparse(grads)
    # One number per tensor, then one look at all of them. The norm also catches finite gradients so large that
    # their squares overflow: their transform would.
    kinds: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
    for number, grad in enumerate(grads):
        if grad is not None and grad.numel():
            kinds.setdefault((grad.device, grad.dtype), []).append((number, grad))
    numbers: list[int] = []
    looks: list[Tensor] = []
    finite = look(grads) if look is not None and kinds else None
    if finite is not None:
        looks.append(finite.to(torch.float32))
        numbers += range(len(grads))
    for (_, dtype), members in kinds.items() if finite is None else ():
        norms = torch._foreach_norm([grad for _, grad in members], 2, dtype=compute_dtype(dtype))
        # As float32, which every device has, and in which the scale is.
        looks.append(torch.stack(norms).isfinite().to(torch.float32))
        numbers += [number for number, _ in members]
    given = [value for value in (found_inf, scale) if isinstance(value, Tensor)]
    looks += [value.detach().reshape(1).to(torch.float32) for value in given]
    if not looks:
        return Usable(list(grads), [], 1.0 if scale is None else float(scale))
    seen: list[float] = torch.cat([look.to(looks[0].device) for look in looks]).tolist()
    if isinstance(scale, Tensor):
        scale = seen.pop()
    overflow = found_inf is not None and (seen.pop() if isinstance(found_inf, Tensor) else float(found_inf)) > 0
    factor = 1.0 if scale is None else float(scale)
    if overflow:
        bad = [n for n, g in enumerate(grads) if g is not None and not bool(g.isfinite().all())]
        return Usable([None] * len(grads), bad, factor)
    wrong = {number for number, fine in zip(numbers, seen, strict=True) if not fine}
    bad = [number for members in kinds.values() for number, _ in members if number in wrong]
    bad.sort()
    usable = list(grads)
    for number in bad:
        usable[number] = None
    return Usable(usable, bad, factor)
