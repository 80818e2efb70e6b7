"""Updates to try an exchange or a codec with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..compress import CompressedUpdate, TilePlan

__all__ = ["random_update", "same_update"]


def random_update(
    plan: TilePlan, *, quantized: bool, present: Sequence[bool] | None = None, seed: int = 0
) -> CompressedUpdate:
    """An update on ``plan`` as a peer could have made it from gradients.

    Args:
        plan: of the tensors.
        quantized: signs, or values.
        present: one flag per tensor; by default all. Tensors without elements are never present.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed % (1 << 63))
    update = CompressedUpdate.empty(plan, quantized=quantized)
    for batch, index, value in zip(plan.batches, update.index, update.value, strict=True):
        index.copy_(torch.rand(batch.tiles, batch.tile_size, generator=generator).topk(batch.k).indices)
        noise = torch.randn(value.shape, generator=generator)
        value.copy_(noise < 0 if quantized else noise)
    flags = present if present is not None else [True] * len(plan)
    return CompressedUpdate(
        plan,
        update.index,
        update.value,
        tuple(bool(flags[n]) and home is not None for n, home in enumerate(plan.home)),
    )


def same_update(ours: CompressedUpdate, theirs: CompressedUpdate) -> bool:
    """Whether two updates say the same: equal layouts, present tensors, indices, values and types."""
    return (
        ours.plan.layout == theirs.plan.layout
        and ours.present == theirs.present
        and all(
            a.value.dtype == b.value.dtype
            and torch.equal(a.index.long(), b.index.long())
            and torch.equal(a.value, b.value)
            for a, b in zip(ours.tensors(), theirs.tensors(), strict=True)
        )
    )
