"""Which gradients may touch the momentum: one NaN in it would stay for good, and reach every peer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..compress import compute_dtype
from ..errors import DistroError

__all__ = ["usable_gradients"]


def usable_gradients(grads: Sequence[Tensor | None], found_inf: Tensor | None) -> tuple[list[Tensor | None], list[int]]:
    """The gradients that may be used, with None for the others, and the numbers of those that are not finite.

    Args:
        grads: one per parameter, shaped as it and of any float type, or None.
        found_inf: 0-D, from a GradScaler that leaves the unscaling to the optimizer; above 0 no gradient may be used.

    Raises:
        DistroError: a gradient is sparse.
    """
    for number, grad in enumerate(grads):
        if grad is not None and (grad.is_sparse or grad.layout != torch.strided):
            raise DistroError(f"parameter {number} has a sparse gradient: build its layer with sparse=False")
    if found_inf is not None and float(found_inf) > 0:
        bad = [n for n, g in enumerate(grads) if g is not None and not bool(g.isfinite().all())]
        return [None] * len(grads), bad
    # One number per tensor, then one look at all of them. The norm also catches finite gradients so large that
    # their squares overflow: their transform would.
    norms = [torch.linalg.vector_norm(g, dtype=compute_dtype(g.dtype)) for g in grads if g is not None and g.numel()]
    if not norms:
        return list(grads), []
    device = norms[0].device
    finite = torch.stack([n.to(device=device, dtype=torch.float64) for n in norms]).isfinite().tolist()
    verdicts = iter(finite)
    bad = [n for n, g in enumerate(grads) if g is not None and g.numel() and not next(verdicts)]
    usable = list(grads)
    for number in bad:
        usable[number] = None
    return usable, bad
