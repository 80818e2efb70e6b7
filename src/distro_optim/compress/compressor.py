"""The two halves of a step: gradients to coefficients, and everybody's coefficients to new weights.

Both walk the plan block by block and run every stage of a block before the next block, in three reused scratch
buffers of a few megabytes. A step therefore needs no temporary of the size of a tensor, and its many small tensors
cost little more than one large one.

The momentum (``delta``) is kept in weight space, one tensor per parameter: a checkpoint can be read without knowing
the tiling, and Psyche's lookahead needs its sign there. What is sent leaves it again as ``k`` rank-one updates per
tile (:meth:`~distro_optim.compress.dct.Transform.decode_sparse`) rather than by a dense inverse transform.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor

from .dct import Transform, make_transform
from .plan import Batch, Block, TilePlan, compute_dtype
from .sign import signs_to_values, values_to_signs
from .topk import contributor_mean, contributor_weights, select_topk
from .update import CompressedUpdate
from .windows import Contiguous, descend, load, store, store_sum

__all__ = ["Compressor", "OwnPart"]

# Up to this many coefficients per tile, summing basis functions one by one is faster than a dense inverse transform:
# measured crossover on 64 x 64 tiles between 32 and 64.
SPARSE_DECODE_LIMIT: Final = 48


@dataclass(frozen=True)
class OwnPart:
    """What a peer itself sent of one tensor in the round before, unquantised.

    Attributes:
        index: ``(tiles, k) int32``.
        value: ``(tiles, k)`` of the compute dtype; all 0 where nothing was sent.
    """

    index: Tensor
    value: Tensor


# All stages of a step for one block, in the scratch memory of one worker, a number from 0.
Work = Callable[[Block, int], None]
Job = tuple[Work, Block]
# Calls perform(job, worker) for every job; no two calls at a time have the same worker.
ShareOut = Callable[[Callable[[Job, int], None], Sequence[Job]], None]


def _one_by_one(perform: Callable[[Job, int], None], jobs: Sequence[Job]) -> None:
    for job in jobs:
        perform(job, 0)


def _perform(job: Job, worker: int) -> None:
    work, block = job
    work(block, worker)


class Compressor:
    """Scratch memory and transforms for one plan.

    Args:
        plan: of the tensors.
        transform: its name.
        share: shares out blocks among threads, on a CPU; by default they are done one after the other.
        workers: how many blocks ``share`` may have in work at a time; each needs scratch memory of its own.
    """

    def __init__(self, plan: TilePlan, transform: str, share: ShareOut | None = None, workers: int = 1) -> None:
        self.plan = plan
        self._share = share if share is not None else _one_by_one
        self._transforms: list[Transform] = [
            make_transform(transform, b.h, b.w, b.compute_dtype, b.device) for b in plan.batches
        ]
        needed: dict[tuple[torch.device, torch.dtype], int] = {}
        for b in plan.batches:
            key = (b.device, b.compute_dtype)
            size = max(block.tiles for block in b.blocks) * b.tile_size
            needed[key] = max(needed.get(key, 0), size)
        self._scratch = {
            (device, dtype, worker): [torch.empty(size, device=device, dtype=dtype) for _ in range(3)]
            for (device, dtype), size in needed.items()
            for worker in range(workers if device.type == "cpu" else 1)
        }

    def _buffers(self, batch: Batch, block: Block, worker: int) -> list[Tensor]:
        shape = (block.tiles, batch.h, batch.w)
        size = block.tiles * batch.tile_size
        return [s[:size].view(shape) for s in self._scratch[batch.device, batch.compute_dtype, worker]]

    def _for_each_block(self, works: Sequence[Work]) -> None:
        """Calls each batch's ``work(block, worker)`` for all blocks of the batch, in any order."""
        on_cpu: list[tuple[int, Job]] = []
        for batch, work in zip(self.plan.batches, works, strict=True):
            if batch.device.type == "cpu":
                on_cpu += [(block.tiles * batch.tile_size, (work, block)) for block in batch.blocks]
            else:
                _one_by_one(_perform, [(work, block) for block in batch.blocks])
        # All batches together, so that no core waits at the end of each, and the smallest last, where one may wait.
        on_cpu.sort(key=lambda sized: -sized[0])
        self._share(_perform, [job for _, job in on_cpu])

    # ---------------------------------------------------------------- gradients to coefficients

    def extract(
        self,
        grads: Sequence[Tensor | None],
        deltas: Sequence[Tensor],
        *,
        lr: Sequence[float],
        decay: Sequence[float],
        quantize: bool,
        own: Sequence[OwnPart] | None = None,
        step: tuple[Sequence[Tensor], Sequence[float]] | None = None,
    ) -> CompressedUpdate:
        """``delta = decay * delta + lr * grad``, and the largest coefficients of it.

        Inside, tiles hold ``delta / decay``: then one pass reads both ``delta`` and gradient, and the pass that
        writes ``delta`` back multiplies.

        With ``own``, what was sent in the round before leaves ``delta`` first, and what is sent now replaces it in
        ``own``. Without, what is sent now leaves ``delta`` at once.

        Args:
            grads: one per tensor, or None: that tensor keeps its ``delta`` and is absent from the update.
            deltas: one per tensor, contiguous, of the compute dtype; changed in place.
            lr: one per parameter group, with any unscaling of the gradients folded in.
            decay: one per parameter group.
            quantize: send signs instead of values.
            own: one per tensor; changed in place.
            step: parameters and their groups' learning rates, for a peer that is alone and sends values: what leaves
                ``delta`` is the whole update then, so the parameters take it at once, in place.
        """
        if step is not None and (quantize or own is not None):
            raise ValueError("what leaves delta is not the update where signs are sent, or later")
        weights, rates = (None, ()) if step is None else (Contiguous(step[0]), step[1])
        update = CompressedUpdate.empty(self.plan, quantized=quantize)
        spoken: list[Tensor] = []
        works: list[Work] = []
        grads = [g if g is None or g.is_contiguous() else g.contiguous() for g in grads]
        for number, (batch, transform) in enumerate(zip(self.plan.batches, self._transforms, strict=True)):
            spoken.append(torch.ones(batch.tiles, dtype=torch.bool, device=batch.device))
            extract = partial(
                self._extract_block,
                batch=batch,
                transform=transform,
                grads=grads,
                deltas=deltas,
                rate=lr[batch.group],
                keep=decay[batch.group],
                own=own,
                step=None if weights is None else (weights.tensors, rates[batch.group]),
                index_out=update.index[number],
                value_out=update.value[number],
                spoken_out=spoken[-1],
            )
            works.append(extract)
        self._for_each_block(works)
        if weights is not None:
            weights.write_back()
        present = [grad is not None for grad in grads]
        if quantize:
            self._silence(present, spoken)
        return CompressedUpdate(self.plan, update.index, update.value, tuple(present))

    def _extract_block(
        self,
        block: Block,
        worker: int,
        *,
        batch: Batch,
        transform: Transform,
        grads: Sequence[Tensor | None],
        deltas: Sequence[Tensor],
        rate: float,
        keep: float,
        own: Sequence[OwnPart] | None,
        step: tuple[Sequence[Tensor], float] | None,
        index_out: Tensor,
        value_out: Tensor,
        spoken_out: Tensor,
    ) -> None:
        """All stages of :meth:`extract` for one block, whose rows of the outputs it fills."""
        tiles, coefficients, spare = self._buffers(batch, block, worker)
        rows = slice(block.start, block.stop)
        quantize = value_out.dtype == torch.bool
        sent_before = None if own is None else self._decode_own(transform, block, own, coefficients, spare)
        load(block, grads, deltas, tiles, spare, rate / keep, minus=sent_before)
        if own is not None:
            store(block, tiles, grads, deltas, keep)
        index, value = self._select(transform, batch, tiles, coefficients, spare)
        sent = value * keep
        if not quantize and batch.value_dtype != batch.compute_dtype:
            limit = torch.finfo(batch.value_dtype).max  # float16 ends at 65504: no coefficient becomes inf
            sent = sent.clamp_(-limit, limit).to(batch.value_dtype).to(batch.compute_dtype)
        if own is not None:
            self._keep_own(block, grads, index, sent, own)
        else:
            leaving = self._rebuild(transform, index, -sent, coefficients, spare)
            store_sum(block, leaving, tiles, grads, deltas, keep)
            if step is not None:
                params, step_size = step
                descend(block, leaving.sign_(), params, -step_size, grads)
        if quantize:
            torch.any(sent, dim=1, out=spoken_out[rows])
        index_out[rows].copy_(index)
        value_out[rows].copy_(values_to_signs(sent) if quantize else sent)

    def _silence(self, present: list[bool], spoken: Sequence[Tensor]) -> None:
        """Marks tensors absent that are zero all over: a sign cannot say 0, and their weights would start to move.

        So it is with gradients of zeros, and with a learning rate that warms up from 0.
        """
        for batch, tiles in zip(self.plan.batches, spoken, strict=True):
            before = [0, *tiles.cumsum(0).tolist()] if not bool(tiles.all()) else range(batch.tiles + 1)
            for number, (start, stop) in batch.ranges.items():
                present[number] = present[number] and before[stop] > before[start]

    def _decode_own(
        self, transform: Transform, block: Block, own: Sequence[OwnPart], coefficients: Tensor, spare: Tensor
    ) -> Tensor:
        """What was sent in the round before, as tiles, in ``coefficients``."""
        index = _joined([own[p.param].index[p.start : p.stop] for p in block.pieces], dim=0)
        value = _joined([own[p.param].value[p.start : p.stop] for p in block.pieces], dim=0)
        return self._rebuild(transform, index.long(), value, coefficients, spare)

    def _rebuild(
        self, transform: Transform, index: Tensor, value: Tensor, coefficients: Tensor, spare: Tensor
    ) -> Tensor:
        """Decodes one contributor into ``coefficients``; overwrites ``spare`` too."""
        if index.shape[1] <= SPARSE_DECODE_LIMIT or transform.h == 1:
            return transform.decode_sparse(index, value, out=coefficients)
        coefficients.zero_().view(len(index), -1).scatter_(1, index, value)
        # The first of the two products has read all coefficients when the second one overwrites them.
        return transform.decode(coefficients, out=coefficients, scratch=spare)

    def _select(
        self, transform: Transform, batch: Batch, tiles: Tensor, coefficients: Tensor, spare: Tensor
    ) -> tuple[Tensor, Tensor]:
        transform.encode(tiles, out=coefficients, scratch=spare)
        n = tiles.shape[0]
        return select_topk(coefficients.view(n, -1), batch.k, scratch=spare.view(n, -1))

    def _keep_own(
        self,
        block: Block,
        grads: Sequence[Tensor | None],
        index: Tensor,
        value: Tensor,
        own: Sequence[OwnPart],
    ) -> None:
        for p in block.pieces:
            part = own[p.param]
            if grads[p.param] is None:
                part.value[p.start : p.stop].zero_()
            else:
                part.index[p.start : p.stop].copy_(index[p.block_start : p.block_stop])
                part.value[p.start : p.stop].copy_(value[p.block_start : p.block_stop])

    # ---------------------------------------------------------------- coefficients to weights

    def merge(self, updates: Sequence[CompressedUpdate], params: Sequence[Tensor], *, lr: Sequence[float]) -> None:
        """``param -= lr * sign(decode(mean over contributors))``, in place; 0 where nobody contributed.

        The result depends on the order of ``updates`` by rounding: all peers must pass the same order.

        Args:
            updates: of all contributors, on this plan; none leaves the parameters as they are.
            params: one per tensor.
            lr: one per parameter group.
        """
        if not updates:
            return
        weights = Contiguous(params)
        works: list[Work] = []
        for number, (batch, transform) in enumerate(zip(self.plan.batches, self._transforms, strict=True)):
            merge = partial(
                self._merge_block,
                number=number,
                batch=batch,
                transform=transform,
                updates=updates,
                params=weights.tensors,
                lr=lr[batch.group],
            )
            works.append(merge)
        self._for_each_block(works)
        weights.write_back()

    def _merge_block(
        self,
        block: Block,
        worker: int,
        *,
        number: int,
        batch: Batch,
        transform: Transform,
        updates: Sequence[CompressedUpdate],
        params: Sequence[Tensor],
        lr: float,
    ) -> None:
        tiles = self._decode_mean(number, batch, block, worker, transform, updates)
        descend(block, tiles.sign_(), params, lr, params)

    def decode(self, updates: Sequence[CompressedUpdate]) -> list[Tensor]:
        """The merged update of every tensor before its sign, in the compute dtype; for inspection and tests."""
        decoded = [
            torch.zeros(spec.shape, dtype=compute_dtype(spec.dtype), device=spec.device) for spec in self.plan.specs
        ]
        for number, (batch, transform) in enumerate(zip(self.plan.batches, self._transforms, strict=True)):
            for block in batch.blocks if updates else ():
                tiles = self._decode_mean(number, batch, block, 0, transform, updates)
                for piece in block.pieces:
                    for region in piece.regions:
                        region.of_tensor(decoded[piece.param]).copy_(region.of_block(tiles))
        return decoded

    def _decode_mean(
        self,
        number: int,
        batch: Batch,
        block: Block,
        worker: int,
        transform: Transform,
        updates: Sequence[CompressedUpdate],
    ) -> Tensor:
        tiles, coefficients, spare = self._buffers(batch, block, worker)
        n, parts = block.tiles, len(updates)
        rows = slice(block.start, block.stop)
        index = _joined([u.index[number][rows] for u in updates], dim=1).long()
        value = _values([u.value[number][rows] for u in updates], batch.compute_dtype)
        weight = _presence(block, batch, updates)
        flat, flat_spare = coefficients.view(n, -1), spare.view(n, -1)
        if parts * batch.k <= SPARSE_DECODE_LIMIT:
            share = contributor_weights(index, value, weight, scratch=flat, scratch2=flat_spare, parts=parts)
            transform.decode_sparse(index, share, out=tiles)
        else:
            contributor_mean(index, value, weight, out=flat, scratch=flat_spare, parts=parts)
            transform.decode(coefficients, out=tiles, scratch=spare)
        return tiles


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _values(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Signs and values of all contributors as numbers, side by side."""
    if any(p.dtype != parts[0].dtype for p in parts):
        parts = [signs_to_values(p, dtype) if p.dtype == torch.bool else p.to(dtype) for p in parts]
    joined = _joined(parts, dim=1)
    return signs_to_values(joined, dtype) if joined.dtype == torch.bool else joined.to(dtype)


def _presence(block: Block, batch: Batch, updates: Sequence[CompressedUpdate]) -> Tensor | None:
    """``(tiles, parts * k)`` of 1 and 0, or None if everybody speaks about every tensor of the block."""
    if all(u.present[p.param] for u in updates for p in block.pieces):
        return None
    weight = torch.ones(block.tiles, len(updates), batch.k, dtype=batch.compute_dtype, device=batch.device)
    for part, update in enumerate(updates):
        for p in block.pieces:
            if not update.present[p.param]:
                weight[p.block_start : p.block_stop, part] = 0
    return weight.view(block.tiles, -1)
