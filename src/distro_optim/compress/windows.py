"""Between tensors and the tiles of a block: the passes of a step that touch a whole model's memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .plan import Block, Piece

__all__ = ["Contiguous", "clear_padding", "descend", "load", "store", "store_sum"]

# Gradients by number of their tensor; None: there is none.
Gradients = Sequence[Tensor | None]


def load(block: Block, grads: Gradients, deltas: Sequence[Tensor], tiles: Tensor, spare: Tensor, lr: float) -> None:
    """Fills ``tiles`` with ``delta + lr * grad``, or with ``delta`` where there is no gradient.

    Overwrites ``spare``, of the same size: the sums of whole rows are taken there first, so that main memory is read
    in its own order, and only what is in the cache already is read in the order of the tiles.
    """
    for piece in block.pieces:
        if piece.partial:
            tiles[piece.block_start : piece.block_stop].zero_()
        grad, delta = grads[piece.param], deltas[piece.param]
        for region in piece.regions:
            window = region.of_block(tiles)
            if grad is None:
                window.copy_(region.of_tensor(delta))
            elif region.is_shuffled_run and tiles.device.type == "cpu":
                run, reordered = region.run_in_block(spare)
                torch.add(region.run_of_tensor(delta), region.run_of_tensor(grad), alpha=lr, out=run)
                window.copy_(reordered)
            else:
                torch.add(region.of_tensor(delta), region.of_tensor(grad), alpha=lr, out=window)


def store(
    block: Block, tiles: Tensor, grads: Gradients, deltas: Sequence[Tensor], decay: float, *, inert: bool
) -> None:
    """``delta = decay * tiles``. Where there is no gradient: ``delta = tiles`` if ``inert``, or nothing."""
    for piece in block.pieces:
        present = grads[piece.param] is not None
        if not present and not inert:
            continue
        for region in piece.regions:
            window = region.of_tensor(deltas[piece.param])
            torch.mul(region.of_block(tiles), decay if present else 1.0, out=window)


def store_sum(
    block: Block, leaving: Tensor, tiles: Tensor, grads: Gradients, deltas: Sequence[Tensor], decay: float
) -> None:
    """``delta = leaving + decay * tiles`` where there is a gradient."""
    for piece in block.pieces:
        if grads[piece.param] is not None:
            for region in piece.regions:
                window = region.of_tensor(deltas[piece.param])
                torch.add(region.of_block(leaving), region.of_block(tiles), alpha=decay, out=window)


def descend(block: Block, tiles: Tensor, params: Sequence[Tensor], lr: float, spoken_of: Gradients) -> None:
    """``param -= lr * tiles``, except where ``spoken_of`` has None."""
    for piece in block.pieces:
        if spoken_of[piece.param] is not None:
            for region in piece.regions:
                region.of_tensor(params[piece.param]).add_(region.of_block(tiles), alpha=-lr)


def clear_padding(piece: Piece, tiles: Tensor, spare: Tensor) -> None:
    """Zeroes what lies beyond the tensor: the error of a round must not live on where there is no weight."""
    rows = slice(piece.block_start, piece.block_stop)
    spare[rows].zero_()
    for region in piece.regions:
        region.of_block(spare).copy_(region.of_block(tiles))
    tiles[rows].copy_(spare[rows])


class Contiguous:
    """Parameters as contiguous tensors: themselves, or copies that are written back in the end."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = params
        self.tensors = [p if p.is_contiguous() else p.contiguous() for p in params]

    def write_back(self) -> None:
        for param, tensor in zip(self._params, self.tensors, strict=True):
            if param is not tensor:
                param.copy_(tensor)
