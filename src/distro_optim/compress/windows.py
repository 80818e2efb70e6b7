"""Between tensors and the tiles of a block: the passes of a step that touch a whole model's memory.

In all of them ``tiles``, ``spare``, ``minus`` and ``leaving`` are the tiles of one block, ``(n, h, w)`` contiguous, of
the compute dtype. Gradients, momenta (``deltas``) and parameters are sequences of a model's tensors by number,
contiguous, of the planned shapes; gradients and parameters may be of another float type.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .plan import Block

__all__ = ["Contiguous", "descend", "gather", "load", "store", "store_sum", "windows_of"]

Gradients = Sequence[Tensor | None]
"""One per tensor of the model, shaped as it; None where there is no gradient."""


def windows_of(block: Block, tensors: Gradients) -> Iterator[Tensor]:
    """Views ``(..., h, w)`` of the tiles of a block in their tensors. All of them lie inside their tensors."""
    for piece in block.pieces:
        tensor = tensors[piece.param]
        if tensor is not None:
            for region in piece.regions:
                yield region.of_tensor(tensor)


def gather(block: Block, grads: Gradients, tiles: Tensor) -> None:
    """Fills ``tiles``, ``(n, h, w)``, with the gradients, and with 0 where there is none.

    For blocks whose tiles all lie inside their tensors.
    """
    for piece in block.pieces:
        grad = grads[piece.param]
        if grad is None:
            tiles[piece.block_start : piece.block_stop].zero_()
        else:
            for region in piece.regions:
                region.of_block(tiles).copy_(region.of_tensor(grad))


def load(
    block: Block,
    grads: Gradients,
    deltas: Sequence[Tensor],
    tiles: Tensor,
    spare: Tensor,
    lr: float,
    *,
    minus: Tensor | None = None,
    runs_first: bool = True,
) -> None:
    """Fills ``tiles`` with ``delta + lr * grad - minus``: without ``lr * grad`` where there is no gradient, and with 0
    beyond the edges of tensors.

    Args:
        block: which tiles.
        grads: of the whole model, as are ``deltas``.
        deltas: momenta, shaped as their tensors.
        tiles: ``(n, h, w)``, overwritten.
        spare: ``(n, h, w)``, overwritten: the sums of whole rows are taken there first, so that main memory is read in
            its own order, and only what is in the cache already is read in the order of the tiles.
        lr: learning rate.
        minus: ``(n, h, w)``; None is 0.
        runs_first: so it is with ``spare``; otherwise that is left alone, and ``minus`` is taken away from all tiles
            at once, where it can be.
    """
    if not runs_first and _is_flat(block):
        _load_runs(block, grads, deltas, tiles, lr, minus)
        return
    # Where tiles reach beyond their tensors, so does what is taken away from them.
    at_once = not runs_first and not any(piece.partial for piece in block.pieces)
    for piece in block.pieces:
        if piece.partial:
            tiles[piece.block_start : piece.block_stop].zero_()
        grad, delta = grads[piece.param], deltas[piece.param]
        for region in piece.regions:
            window = region.of_block(tiles)
            if grad is None:
                loaded = region.of_tensor(delta)
            elif runs_first and region.is_shuffled_run:
                run, loaded = region.run_in_block(spare)
                torch.add(region.run_of_tensor(delta), region.run_of_tensor(grad), alpha=lr, out=run)
            else:
                loaded = torch.add(region.of_tensor(delta), region.of_tensor(grad), alpha=lr, out=window)
            if minus is not None and not at_once:
                torch.sub(loaded, region.of_block(minus), out=window)
            elif loaded is not window:
                window.copy_(loaded)
    if minus is not None and at_once:
        tiles.sub_(minus)


def _is_flat(block: Block) -> bool:
    """Whether it holds vectors, of which there may be many: they are done together then, on an accelerator."""
    return all(piece.flat for piece in block.pieces)


def _load_runs(
    block: Block, grads: Gradients, deltas: Sequence[Tensor], tiles: Tensor, lr: float, minus: Tensor | None
) -> None:
    """:func:`load` of a flat block."""
    if any(piece.partial for piece in block.pieces):
        tiles.zero_()
    runs = [(region.runs(deltas[p.param], tiles), p.param, region) for p in block.pieces for region in p.regions]
    torch._foreach_copy_([there for (_, there), _, _ in runs], [here for (here, _), _, _ in runs])
    taught = [(there, region.run_of_tensor(grad)) for (_, there), n, region in runs if (grad := grads[n]) is not None]
    if taught:
        torch._foreach_add_([there for there, _ in taught], [grad for _, grad in taught], alpha=lr)
    if minus is not None:
        leaving = [region.runs(deltas[n], minus)[1] for _, n, region in runs]
        torch._foreach_sub_([there for (_, there), _, _ in runs], leaving)


def store(
    block: Block,
    tiles: Tensor,
    grads: Gradients,
    deltas: Sequence[Tensor],
    decay: float,
    *,
    runs_first: bool = True,
) -> None:
    """``delta = decay * tiles``, or ``delta = tiles`` where there is no gradient; ``tiles`` is ``(n, h, w)``.

    ``runs_first`` as for :func:`load`.
    """
    if not runs_first and _is_flat(block):
        runs = [(region.runs(deltas[p.param], tiles), p.param) for p in block.pieces for region in p.regions]
        torch._foreach_copy_([here for (here, _), _ in runs], [there for (_, there), _ in runs])
        if taught := [here for (here, _), n in runs if grads[n] is not None]:
            torch._foreach_mul_(taught, decay)
        return
    for piece in block.pieces:
        keep = 1.0 if grads[piece.param] is None else decay
        for region in piece.regions:
            window = region.of_tensor(deltas[piece.param])
            torch.mul(region.of_block(tiles), keep, out=window)


def store_sum(
    block: Block, leaving: Tensor, tiles: Tensor, grads: Gradients, deltas: Sequence[Tensor], decay: float
) -> None:
    """``delta = leaving + decay * tiles`` where there is a gradient; ``leaving`` and ``tiles`` are ``(n, h, w)``."""
    for piece in block.pieces:
        if grads[piece.param] is not None:
            for region in piece.regions:
                window = region.of_tensor(deltas[piece.param])
                torch.add(region.of_block(leaving), region.of_block(tiles), alpha=decay, out=window)


def descend(
    block: Block,
    tiles: Tensor,
    params: Sequence[Tensor],
    lr: float,
    spoken_of: Gradients,
    *,
    runs_first: bool = True,
) -> None:
    """``param -= lr * tiles``, except where ``spoken_of`` has None; ``tiles`` is ``(n, h, w)``.

    ``runs_first`` as for :func:`load`.
    """
    if not runs_first and _is_flat(block):
        pieces = [piece for piece in block.pieces if spoken_of[piece.param] is not None]
        if runs := [region.runs(params[p.param], tiles) for p in pieces for region in p.regions]:
            torch._foreach_add_([here for here, _ in runs], [there for _, there in runs], alpha=-lr)
        return
    for piece in block.pieces:
        if spoken_of[piece.param] is not None:
            for region in piece.regions:
                region.of_tensor(params[piece.param]).add_(region.of_block(tiles), alpha=-lr)


class Contiguous:
    """Parameters as contiguous tensors: themselves, or copies that are written back in the end.

    Attributes:
        tensors: one per parameter, shaped as it.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = params
        self.tensors = [p if p.is_contiguous() else p.contiguous() for p in params]

    def write_back(self) -> None:
        """Copies to the parameters what became of their copies."""
        for param, tensor in zip(self._params, self.tensors, strict=True):
            if param is not tensor:
                param.copy_(tensor)
