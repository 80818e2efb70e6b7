"""Everybody's coefficients to the step on the weights: the seam between a step and the arithmetic it is done in.

Peers must end with equal weights, so they must do this half of a step by the same definition, the plan's
``arithmetic``. Each definition is a class of :class:`Merge`; :mod:`~distro_optim.compress.engine.parts` chooses it. A
faster way to the same definition is another class with the same bits.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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

__all__ = ["Ahead", "FloatMerge", "Merge", "Sizes", "presence_of", "values_of"]


@dataclass(frozen=True)
class Sizes:
    """What steps of a fixed size have to know of whole tensors, where the plan is of a part of them. By tensor.

    Attributes:
        largest: the largest magnitude that anybody says of it; nothing where signs are sent.
        squares: the sum of squares of its merged coefficients.
        tiles: how many it has.
    """

    largest: Mapping[int, float]
    squares: Mapping[int, float | int]
    tiles: Mapping[int, int]


@dataclass(frozen=True)
class Ahead:
    """The lookahead of the next step, which a merge can do on the way.

    Attributes:
        shifted: per tensor of the model, what gets the shifted weights; None for one that does not look ahead.
        lr: per parameter group.
        momenta: per tensor, those by whose signs it is shifted, contiguous and in its shape; for kernels that have not
            kept the signs themselves.
    """

    shifted: Sequence[Tensor | None]
    lr: Sequence[float]
    momenta: Sequence[Tensor] = ()


class Merge(ABC):
    """The second half of a step for one batch of a plan.

    One object serves all steps. Its methods may be called from several threads at the same time, for different blocks
    and with different ``worker``.

    Args:
        number: of the batch in the plan: ``update.index[number]`` are its positions.
        batch: itself.
        transform: of its tiles.
        workers: how many blocks may be in work at a time: ``worker`` is below it.

    Attributes:
        measures: its steps have a fixed size.
        sizes: of the whole tensors, to be set before :meth:`check` where the batch has parts of them; otherwise None.
        goes_ahead: it may do a lookahead on the way.
    """

    goes_ahead = False

    def __init__(self, number: int, batch: Batch, transform: Transform, workers: int) -> None:
        self.number = number
        self.batch = batch
        self.transform = transform
        self.workers = workers
        self.measures = batch.update == "rms"
        self._squares = torch.zeros(
            batch.tiles if self.measures else 0, dtype=self.type_of_squares(), device=batch.device
        )
        self._measured: dict[int, float | int] = {}
        self.sizes: Sizes | None = None

    def type_of_squares(self) -> torch.dtype:
        """Of the sums of squares of a tile."""
        return self.batch.compute_dtype

    def check(self, updates: Sequence[CompressedUpdate]) -> None:  # noqa: B027
        """Called once a step, before any block; ``updates`` are of this plan, at least one.

        Raises:
            ConfigurationError: they cannot be merged by this definition, too many of them, say.
        """

    def preparations(self, updates: Sequence[CompressedUpdate]) -> Sequence[Callable[[], None]]:
        """What is better done for many blocks together, after :meth:`check` and before any block: in any order, by
        several threads. Blocks that nobody prepared for are merged all the same.
        """
        return ()

    def takes_long_blocks(self, updates: Sequence[CompressedUpdate], params: Sequence[Tensor]) -> bool:
        """Whether :meth:`merge_block` takes blocks longer than those of the batch, and no scratch memory.

        After :meth:`check`. Where :meth:`takes_ahead`, :meth:`merge_block_ahead` does, in any case.
        """
        return False

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

        Where the merge :attr:`measures`, ``param -= lr * decoded / rms(decoded)``.

        Args:
            block, worker, scratch, updates: as for :meth:`decode_block`.
            params: all tensors of the model by number, contiguous, of the planned shapes and dtypes.
            lr: of the batch's parameter group, its gain included.
        """
        tiles = self.decode_block(block, worker, scratch, updates)
        if self.measures:
            self.descend_measured(block, tiles, params, lr)
        else:
            descend(block, tiles.sign_(), params, lr, params, runs_first=self.batch.profile.runs_first)

    def takes_ahead(self, updates: Sequence[CompressedUpdate], params: Sequence[Tensor], ahead: Ahead) -> bool:
        """Whether :meth:`merge_block_ahead` is for these, arguments as there. After :meth:`check`."""
        return False

    def merge_block_ahead(
        self,
        block: Block,
        worker: int,
        updates: Sequence[CompressedUpdate],
        params: Sequence[Tensor],
        lr: float,
        ahead: Ahead,
    ) -> None:
        """:meth:`merge_block`, and ``shifted = param - ahead.lr * sign(momentum)`` in the same pass."""
        raise NotImplementedError

    # -- steps of a fixed size -----------------------------------------------------------------------------------------

    def squares_of_block(
        self, block: Block, worker: int, scratch: Sequence[Tensor], updates: Sequence[CompressedUpdate]
    ) -> Tensor:
        """The sum of squares of each tile's merged coefficients, ``(n,)``; arguments as for :meth:`decode_block`.

        The transform is orthonormal, so these are those of the tiles themselves.
        """
        raise NotImplementedError

    def measure_block(
        self, block: Block, worker: int, scratch: Sequence[Tensor], updates: Sequence[CompressedUpdate]
    ) -> None:
        """Takes the squares of a block; before any is merged, for all blocks. Arguments as for :meth:`decode_block`."""
        self._squares[block.start : block.stop].copy_(self.squares_of_block(block, worker, scratch, updates))

    def end_measuring(self) -> dict[int, float | int]:
        """All blocks are measured: adds up the squares of each tensor, and returns them."""
        ranges = self.batch.ranges
        sums = torch.stack([self._squares[start:stop].sum() for start, stop in ranges.values()]).tolist()
        self._measured = dict(zip(ranges, sums, strict=True))
        return self._measured

    def largest(self, updates: Sequence[CompressedUpdate]) -> dict[int, float]:
        """:attr:`Sizes.largest` of the parts of tensors that are here, for definitions that ask for it."""
        return {}

    def squares_and_tiles(self, number: int) -> tuple[float | int, int]:
        """Of tensor ``number``, all of it: the sum of its squares, and how many tiles it has."""
        if self.sizes is not None:
            return self.sizes.squares[number], self.sizes.tiles[number]
        start, stop = self.batch.ranges[number]
        return self._measured[number], stop - start

    def factor(self, number: int, lr: float) -> float:
        """What tensor ``number``, as :meth:`decode_block` gives it, is multiplied with to be a step; 0 of nothing.

        The root mean square is over all elements of its tiles, those beyond its edge too: a tile that is partly
        outside, and of which as much is sent, steps as the others do.
        """
        squares, tiles = self.squares_and_tiles(number)
        return lr / math.sqrt(squares / (tiles * self.batch.tile_size)) if squares > 0 else 0.0

    def descend_measured(self, block: Block, tiles: Tensor, params: Sequence[Tensor], lr: float) -> None:
        """``param -= factor * tiles``: a product that is rounded once, and a difference that is rounded once.

        The product is an operation of its own, and the difference has no other: a fused one would round differently.
        """
        for piece in block.pieces:
            # What is added to it makes +0 of -0, whose subtraction would change the sign of a weight that is -0.
            tiles[piece.block_start : piece.block_stop].mul_(self.factor(piece.param, lr)).add_(0.0)
        descend(block, tiles, params, 1.0, params, runs_first=self.batch.profile.runs_first)


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
        weight = presence_of(batch, [block], updates)
        flat, flat_spare = coefficients.view(n, -1), spare.view(n, -1)
        if parts * batch.k <= SPARSE_DECODE_LIMIT:
            share = contributor_weights(
                index, value, weight, scratch=flat, scratch2=flat_spare, parts=parts, profile=batch.profile
            )
            transform.decode_sparse(index, share, out=tiles)
        else:
            contributor_mean(index, value, weight, out=flat, scratch=flat_spare, parts=parts, profile=batch.profile)
            transform.decode(coefficients, out=tiles, scratch=spare)
        return tiles

    @override
    def squares_of_block(
        self, block: Block, worker: int, scratch: Sequence[Tensor], updates: Sequence[CompressedUpdate]
    ) -> Tensor:
        _, coefficients, spare = (part.view(block.tiles, -1) for part in scratch)
        batch, rows = self.batch, slice(block.start, block.stop)
        index = joined([u.index[self.number][rows] for u in updates], dim=1).long()
        value = values_of([u.value[self.number][rows] for u in updates], batch.compute_dtype)
        weight = presence_of(batch, [block], updates)
        contributor_mean(
            index, value, weight, out=coefficients, scratch=spare, parts=len(updates), profile=batch.profile
        )
        return coefficients.square_().sum(1)


def values_of(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Signs and values of all contributors as numbers, side by side."""
    if any(p.dtype != parts[0].dtype for p in parts):
        parts = [signs_to_values(p, dtype) if p.dtype == torch.bool else p.to(dtype) for p in parts]
    together = joined(parts, dim=1)
    return signs_to_values(together, dtype) if together.dtype == torch.bool else together.to(dtype)


def presence_of(batch: Batch, blocks: Sequence[Block], updates: Sequence[CompressedUpdate]) -> Tensor | None:
    """``(tiles, parts * k)`` of 1 and 0, or None if everybody speaks about every tensor of the blocks.

    ``blocks`` of the batch follow each other.
    """
    if all(u.present[p.param] for u in updates for block in blocks for p in block.pieces):
        return None
    first, tiles = blocks[0].start, blocks[-1].stop - blocks[0].start
    weight = torch.ones(tiles, len(updates), batch.k, dtype=batch.compute_dtype, device=batch.device)
    for part, update in enumerate(updates):
        for block in blocks:
            of_block = weight[block.start - first : block.stop - first, part]
            for p in block.pieces:
                if not update.present[p.param]:
                    of_block[p.block_start : p.block_stop].zero_()
    return weight.view(tiles, -1)
