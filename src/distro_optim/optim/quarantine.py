"""Which gradients may touch the momentum: one NaN in it would stay for good, and reach every peer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compress import compute_dtype
from ..errors import DistroError

__all__ = ["Usable", "usable_gradients"]


@dataclass(frozen=True)
class Usable:
    """What a step may take of the gradients.

    Attributes:
        grads: those that may be used, with None for the others.
        bad: numbers of those that are not finite.
        scale: what they are multiplied with, and have to be divided by.
    """

    grads: list[Tensor | None]
    bad: list[int]
    scale: float


def usable_gradients(
    grads: Sequence[Tensor | None],
    found_inf: Tensor | None = None,
    scale: Tensor | float | None = None,
    look: Callable[[Sequence[Tensor | None]], Tensor | None] | None = None,
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
    for number, grad in enumerate(grads):
        if grad is not None and (grad.is_sparse or grad.layout != torch.strided):
            raise DistroError(f"parameter {number} has a sparse gradient: build its layer with sparse=False")
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
        looks.append(finite)
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
