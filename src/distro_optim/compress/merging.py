"""Everybody's coefficients to the step on the weights: the seam between a step and the arithmetic it is done in.

Peers must end with equal weights, so they must do this half of a step by the same definition, the plan's
``arithmetic``. Each definition is a class of :class:`Merge`; :mod:`~distro_optim.compress.engines` chooses it. A faster
engine of the same definition is another class with the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from .dct import Transform
from .extraction import SPARSE_DECODE_LIMIT, joined
from .plan import Batch, Block
from .sign import signs_to_values
from .topk import contributor_mean, contributor_weights
from .update import CompressedUpdate
from .windows import descend

__all__ = ["FloatMerge", "Merge", "presence_of", "values_of"]


class Merge(ABC):
    """The second half of a step for one batch of a plan.

    One object serves all steps. Its methods may be called from several threads at the same time, for different blocks
    and with different ``worker``.

    Args:
        number: of the batch in the plan: ``update.index[number]`` are its positions.
        batch: itself.
        transform: of its tiles.
        workers: how many blocks may be in work at a time: ``worker`` is below it.
    """

    def __init__(self, number: int, batch: Batch, transform: Transform, workers: int) -> None:
        self.number = number
        self.batch = batch
        self.transform = transform
        self.workers = workers

    def check(self, updates: Sequence[CompressedUpdate]) -> None:  # noqa: B027
        """Called once a step, before any block; ``updates`` are of this plan, at least one.

        Raises:
            ConfigurationError: they cannot be merged by this definition, too many of them, say.
        """

    @abstractmethod
    def decode_block(
        self, block: Block, worker: int, scratch: Sequence[Tensor], updates: Sequence[CompressedUpdate]
    ) -> Tensor:
        """The merged update of a block before its sign, up to a positive factor for each tile.

        Args:
            block: of the batch.
            worker: who asks, a number from 0.
            scratch: three buffers ``(n, h, w)`` of the batch's compute dtype on its device, overwritten.
            updates: of all contributors, in the same order on all peers.

        Returns:
            ``(n, h, w)`` of the compute dtype; 0 where nobody contributed. May be one of ``scratch``.
        """

    def merge_block(
        self,
        block: Block,
        worker: int,
        scratch: Sequence[Tensor],
        updates: Sequence[CompressedUpdate],
        params: Sequence[Tensor],
        lr: float,
    ) -> None:
        """``param -= lr * sign(decoded)`` for the elements of a block, in place.

        Args:
            block, worker, scratch, updates: as for :meth:`decode_block`.
            params: all tensors of the model by number, contiguous, of the planned shapes and dtypes.
            lr: of the batch's parameter group.
        """
        descend(block, self.decode_block(block, worker, scratch, updates).sign_(), params, lr, params)


class FloatMerge(Merge):
    """In the compute dtype, by the transform. Equal bits only on the same PyTorch on the same kind of machine."""

    @override
    def decode_block(
        self, block: Block, worker: int, scratch: Sequence[Tensor], updates: Sequence[CompressedUpdate]
    ) -> Tensor:
        batch, number, transform = self.batch, self.number, self.transform
        tiles, coefficients, spare = scratch
        n, parts = block.tiles, len(updates)
        rows = slice(block.start, block.stop)
        index = joined([u.index[number][rows] for u in updates], dim=1).long()
        value = values_of([u.value[number][rows] for u in updates], batch.compute_dtype)
        weight = presence_of(block, batch, updates)
        flat, flat_spare = coefficients.view(n, -1), spare.view(n, -1)
        if parts * batch.k <= SPARSE_DECODE_LIMIT:
            share = contributor_weights(index, value, weight, scratch=flat, scratch2=flat_spare, parts=parts)
            transform.decode_sparse(index, share, out=tiles)
        else:
            contributor_mean(index, value, weight, out=flat, scratch=flat_spare, parts=parts)
            transform.decode(coefficients, out=tiles, scratch=spare)
        return tiles


def values_of(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Signs and values of all contributors as numbers, side by side."""
    if any(p.dtype != parts[0].dtype for p in parts):
        parts = [signs_to_values(p, dtype) if p.dtype == torch.bool else p.to(dtype) for p in parts]
    together = joined(parts, dim=1)
    return signs_to_values(together, dtype) if together.dtype == torch.bool else together.to(dtype)


def presence_of(block: Block, batch: Batch, updates: Sequence[CompressedUpdate]) -> Tensor | None:
    """``(tiles, parts * k)`` of 1 and 0, or None if everybody speaks about every tensor of the block."""
    if all(u.present[p.param] for u in updates for p in block.pieces):
        return None
    weight = torch.ones(block.tiles, len(updates), batch.k, dtype=batch.compute_dtype, device=batch.device)
    for part, update in enumerate(updates):
        for p in block.pieces:
            if not update.present[p.param]:
                weight[p.block_start : p.block_stop, part] = 0
    return weight.view(block.tiles, -1)
