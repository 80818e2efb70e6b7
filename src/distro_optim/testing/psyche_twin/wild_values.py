"""Results as clients of Psyche's can send them. No I/O."""

from __future__ import annotations

import torch

from ...compress import CompressedUpdate

__all__ = ["with_wild_values"]


def with_wild_values(update: CompressedUpdate, *, tensor: int = 0) -> CompressedUpdate:
    """``update`` as a client of Psyche's sends it whose momentum began with uninitialised memory.

    Args:
        update: of values, not of signs.
        tensor: the one that consists of NaN, after an infinity of each sign.
    """
    value = [values.clone() for values in update.value]
    home = update.plan.home[tensor]
    if home is not None:
        start, stop = update.plan.batches[home].ranges[tensor]
        rows = value[home][start:stop].view(-1)
        rows.fill_(torch.nan)
        rows[:2] = torch.tensor([torch.inf, -torch.inf], dtype=rows.dtype)[: len(rows)]
    return CompressedUpdate(update.plan, update.index, tuple(value), update.present)
