"""The two halves of a step: gradients to coefficients, and everybody's coefficients to new weights.

Both walk the plan block by block and run every stage of a block before the next block, in three reused scratch
buffers of a few megabytes. A step therefore needs no temporary of the size of a tensor, and its many small tensors
cost little more than one large one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .dct import Transform, make_transform
from .engines import extraction_class, make_merge
from .extraction import Extraction, OwnPart
from .merging import Merge
from .plan import Batch, Block, TilePlan, compute_dtype
from .update import CompressedUpdate
from .windows import Contiguous

__all__ = ["Compressor"]

Work = Callable[[Block, int], None]
"""All stages of a step for one block, in the scratch memory of one worker, a number from 0."""
Job = tuple[Work, Block]
ShareOut = Callable[[Callable[[Job, int], None], Sequence[Job]], None]
"""Calls ``perform(job, worker)`` for every job; no two calls that run at the same time have the same worker."""


def _one_by_one(perform: Callable[[Job, int], None], jobs: Sequence[Job]) -> None:
    for job in jobs:
        perform(job, 0)


def _perform(job: Job, worker: int) -> None:
    work, block = job
    work(block, worker)


def _prepare(preparation: Callable[[], None], block: Block, worker: int) -> None:
    preparation()


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
        self._merges = [
            make_merge(plan.arithmetic, number, batch, t, workers)
            for number, (batch, t) in enumerate(zip(plan.batches, self._transforms, strict=True))
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

    @property
    def needs_whole_updates(self) -> bool:
        """Whether a step depends on all of an update, so that weights cannot take it tile by tile as it is made."""
        return any(merge.measures for merge in self._merges)

    def _buffers(self, batch: Batch, block: Block, worker: int) -> list[Tensor]:
        shape = (block.tiles, batch.h, batch.w)
        size = block.tiles * batch.tile_size
        return [s[:size].view(shape) for s in self._scratch[batch.device, batch.compute_dtype, worker]]

    def _for_each_block(self, works: Sequence[tuple[Batch, Work]]) -> None:
        """Calls each batch's ``work(block, worker)`` for all blocks of the batch, in any order."""
        on_cpu: list[tuple[int, Job]] = []
        for batch, work in works:
            if batch.device.type == "cpu":
                on_cpu += [(block.tiles * batch.tile_size, (work, block)) for block in batch.blocks]
            else:
                _one_by_one(_perform, [(work, block) for block in batch.blocks])
        # All batches together, so that no core waits at the end of each, and the smallest last, where one may wait.
        on_cpu.sort(key=lambda sized: -sized[0])
        self._share(_perform, [job for _, job in on_cpu])

    # -- gradients to coefficients -------------------------------------------------------------------------------------

    def extract(
        self,
        grads: Sequence[Tensor | None],
        momenta: Sequence[Tensor],
        *,
        in_coefficients: Sequence[bool],
        lr: Sequence[float],
        decay: Sequence[float],
        quantize: bool,
        own: Sequence[OwnPart] | None = None,
        step: tuple[Sequence[Tensor], Sequence[float]] | None = None,
    ) -> CompressedUpdate:
        """``momentum = decay * momentum + lr * grad``, and the largest coefficients of it.

        With ``own``, what was sent in the round before leaves the momentum first, and what is sent now replaces it in
        ``own``. Without, what is sent now leaves the momentum at once.

        Args:
            grads: one per tensor, or None: that tensor keeps its momentum and is absent from the update.
            momenta: one per tensor, contiguous, of the compute dtype; changed in place.
            in_coefficients: one per tensor: whether its momentum is ``(tiles, h, w)``, coefficients of whole tiles, or
                shaped as the tensor; alike for all tensors of a batch. Not together with ``own``.
            lr: one per parameter group, with any unscaling of the gradients folded in.
            decay: one per parameter group.
            quantize: send signs instead of values.
            own: one per tensor; changed in place.
            step: parameters and their groups' learning rates, for a peer that is alone and sends values: what leaves
                the momentum is the whole update then, so the parameters take it at once, in place.

        Raises:
            ValueError: ``step`` together with ``quantize`` or ``own``, or a step needs the whole update first.
        """
        if step is not None and self.needs_whole_updates:
            raise ValueError("a step of a fixed size needs the whole update first: merge it")
        if step is not None and (quantize or own is not None):
            raise ValueError("step needs values that leave the momentum at once: it goes with neither quantize nor own")
        # In the arithmetic of floats, what is taken out of the momentum is decoded once for both.
        fused = self.plan.arithmetic == "float"
        weights, rates = (None, ()) if step is None else (Contiguous(step[0]), step[1])
        update = CompressedUpdate.empty(self.plan, quantized=quantize)
        spoken: list[Tensor] = []
        works: list[tuple[Batch, Work]] = []
        grads = [g if g is None or g.is_contiguous() else g.contiguous() for g in grads]
        present = [grad is not None for grad in grads]
        alone = [CompressedUpdate(self.plan, update.index, update.value, tuple(present))]
        for number, (batch, transform) in enumerate(zip(self.plan.batches, self._transforms, strict=True)):
            spoken.append(torch.ones(batch.tiles, dtype=torch.bool, device=batch.device))
            as_coefficients = in_coefficients[min(batch.ranges)]
            make = extraction_class(
                self.plan.arithmetic,
                batch,
                transform,
                in_coefficients=as_coefficients,
                overlap=own is not None,
                quantize=quantize,
            )
            extraction = make(
                batch=batch,
                transform=transform,
                in_coefficients=as_coefficients,
                grads=grads,
                momenta=momenta,
                rate=lr[batch.group],
                keep=decay[batch.group],
                own=own,
                step=None if weights is None or not fused else (weights.tensors, rates[batch.group] * batch.gain),
                index_out=update.index[number],
                value_out=update.value[number],
                spoken_out=spoken[-1],
            )
            then = None
            if weights is not None and not fused:
                self._merges[number].check(alone)
                then = partial(self._merge_block, self._merges[number], alone, weights.tensors, rates)
            works.append((batch, partial(self._extract_block, extraction, then)))
        self._for_each_block(works)
        if weights is not None:
            weights.write_back()
        if quantize:
            self._silence(present, spoken)
        return CompressedUpdate(self.plan, update.index, update.value, tuple(present))

    def _extract_block(self, extraction: Extraction, then: Work | None, block: Block, worker: int) -> None:
        extraction.extract(block, *self._buffers(extraction.batch, block, worker))
        if then is not None:
            then(block, worker)

    def _silence(self, present: list[bool], spoken: Sequence[Tensor]) -> None:
        """Marks tensors absent that are zero all over: a sign cannot say 0, and their weights would start to move.

        So it is with gradients of zeros, and with a learning rate that warms up from 0.
        """
        for batch, tiles in zip(self.plan.batches, spoken, strict=True):
            before = [0, *tiles.cumsum(0).tolist()] if not bool(tiles.all()) else range(batch.tiles + 1)
            for number, (start, stop) in batch.ranges.items():
                present[number] = present[number] and before[stop] > before[start]

    # -- coefficients to weights ---------------------------------------------------------------------------------------

    def merge(self, updates: Sequence[CompressedUpdate], params: Sequence[Tensor], *, lr: Sequence[float]) -> None:
        """``param -= gain * lr * sign(decode(mean over contributors))``, in place; 0 where nobody contributed.

        Or, where the plan's rule is ``"rms"``, by the decoded update over its root mean square, in place of the sign.
        By the definition that the plan names. In the arithmetic of floats the result depends on the order of
        ``updates`` by rounding: all peers must pass the same order.

        Args:
            updates: of all contributors, on this plan; none leaves the parameters as they are.
            params: one per tensor, of the planned shape; changed in place.
            lr: one per parameter group.

        Raises:
            ConfigurationError: these updates cannot be merged by the plan's definition.
        """
        if not updates:
            return
        for merge in self._merges:
            merge.check(updates)
        for on_cpu in (True, False):
            jobs: list[Job] = [
                (partial(_prepare, preparation), merge.batch.blocks[0])
                for merge in self._merges
                if (merge.batch.device.type == "cpu") is on_cpu
                for preparation in merge.preparations(updates)
            ]
            (self._share if on_cpu else _one_by_one)(_perform, jobs)
        weights = Contiguous(params)
        measuring = [merge for merge in self._merges if merge.measures]
        self._for_each_block([(m.batch, partial(self._measure_block, m, updates)) for m in measuring])
        for merge in measuring:
            merge.end_measuring()
        self._for_each_block(
            [(m.batch, partial(self._merge_block, m, updates, weights.tensors, lr)) for m in self._merges]
        )
        weights.write_back()

    def _merge_block(
        self,
        merge: Merge,
        updates: Sequence[CompressedUpdate],
        params: Sequence[Tensor],
        lr: Sequence[float],
        block: Block,
        worker: int,
    ) -> None:
        batch = merge.batch
        rate = lr[batch.group] * batch.gain
        merge.merge_block(block, worker, self._buffers(batch, block, worker), updates, params, rate)

    def _measure_block(self, merge: Merge, updates: Sequence[CompressedUpdate], block: Block, worker: int) -> None:
        merge.measure_block(block, worker, self._buffers(merge.batch, block, worker), updates)

    def decode(self, updates: Sequence[CompressedUpdate]) -> list[Tensor]:
        """The merged update of every tensor before its sign, in its shape and compute dtype; for tests."""
        decoded = [
            torch.zeros(spec.shape, dtype=compute_dtype(spec.dtype), device=spec.device) for spec in self.plan.specs
        ]
        for merge in self._merges if updates else ():
            merge.check(updates)
            for block in merge.batch.blocks:
                tiles = merge.decode_block(block, 0, self._buffers(merge.batch, block, 0), updates)
                for piece in block.pieces:
                    for region in piece.regions:
                        region.of_tensor(decoded[piece.param]).copy_(region.of_block(tiles))
        return decoded
