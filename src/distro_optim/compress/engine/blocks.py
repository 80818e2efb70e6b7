"""Steps by torch, on any device: the two halves, block by block, and the lookahead.

Both halves walk the plan block by block and run every stage of a block before the next block, in three reused scratch
buffers of a few megabytes. A step therefore needs no temporary of the size of a tensor, and its many small tensors
cost little more than one large one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from ..dct import Transform, make_transform
from ..extraction import Extraction, WholeBatch
from ..fast import can_shift, shift_part
from ..merging import Ahead, Merge, Sizes
from ..plan import Batch, Block, TilePlan, compute_dtype
from ..profile import profile_of
from ..update import CompressedUpdate
from ..windows import Contiguous
from .base import Engine, Intake
from .long_blocks import long_blocks
from .looking import ShareOut, finite_in_parts
from .parts import extraction_class, make_merge
from .shifting import PART, Shift, shift_together
from .shifting import shifted as shift_by

__all__ = ["BlockEngine"]

Work = Callable[[Block, int], None]
"""All stages of a step for one block, in the scratch memory of one worker, a number from 0."""
Job = tuple[Work, Block]
Works = Sequence[tuple[Batch, Work, bool]]
"""For all blocks of a batch, and whether they may be long ones."""


def _one_by_one(perform: Callable[[Any, int], None], jobs: Sequence[Any]) -> None:
    for job in jobs:
        perform(job, 0)


def _perform(job: Job, worker: int) -> None:
    work, block = job
    work(block, worker)


def _prepare(preparation: Callable[[], None], block: Block, worker: int) -> None:
    preparation()


def _shift_part(part: tuple[Tensor, Tensor, Tensor, int, int, float], worker: int) -> None:
    shift_part(*part)


class BlockEngine(Engine):
    """Scratch memory and transforms for one plan.

    Args:
        plan: of the tensors.
        transform: its name.
        share: shares out blocks among threads, on a CPU; by default they are done one after the other.
        workers: how many blocks ``share`` may have in work at a time; each needs scratch memory of its own.
        batches: numbers of those of the plan that it works on, for an engine that does the others itself; by default
            all.
    """

    def __init__(
        self,
        plan: TilePlan,
        transform: str,
        share: ShareOut | None = None,
        workers: int = 1,
        *,
        batches: Collection[int] | None = None,
    ) -> None:
        super().__init__(plan)
        self._share, self._workers = share, workers
        numbers = range(len(plan.batches)) if batches is None else sorted(batches)
        self._batches = {number: plan.batches[number] for number in numbers}
        self._transforms: dict[int, Transform] = {
            n: make_transform(transform, b.h, b.w, b.compute_dtype, b.device, b.profile)
            for n, b in self._batches.items()
        }
        self._merges = [
            make_merge(plan.arithmetic, n, b, self._transforms[n], workers) for n, b in self._batches.items()
        ]
        needed: dict[tuple[torch.device, torch.dtype, int], int] = {}
        for b in self._batches.values():
            size = max(block.tiles for block in b.blocks) * b.tile_size
            for worker in range(workers if b.profile.by_threads else 1):
                key = (b.device, b.compute_dtype, worker)
                needed[key] = max(needed.get(key, 0), size)
        self._lasts: dict[int, Tensor] = {}
        self._momenta: Sequence[Tensor] = ()
        self._scratch = {key: torch.empty(3 * size, device=key[0], dtype=key[1]) for key, size in needed.items()}
        self._views: dict[tuple[Any, ...], list[Tensor]] = {}

    @property
    @override
    def needs_whole_updates(self) -> bool:
        return any(merge.measures for merge in self._merges)

    def _buffers(self, batch: Batch, block: Block, worker: int) -> list[Tensor]:
        # Made once: to make views anew for each block takes as long as some of its tiles do.
        key = batch.device, batch.compute_dtype, worker, block.tiles, batch.h, batch.w
        if key not in self._views:
            room = self._scratch[batch.device, batch.compute_dtype, worker]
            # A long block, which needs none, gets what there is.
            tiles = min(block.tiles, len(room) // (3 * batch.tile_size))
            # Side by side, and the last two at its beginning, where they may serve as one of wider numbers.
            second, third, first = room[: 3 * tiles * batch.tile_size].view(3, tiles, batch.h, batch.w)
            self._views[key] = [first, second, third]
        return self._views[key]

    def _for_each_block(self, works: Works) -> None:
        """Calls each batch's ``work(block, worker)`` for all blocks of the batch, in any order."""
        shared: list[tuple[int, Job]] = []
        for batch, work, long in works:
            if batch.profile.by_threads:
                blocks = long_blocks(batch.blocks, self._workers) if long else batch.blocks
                shared += [(block.tiles * batch.tile_size, (work, block)) for block in blocks]
            else:
                _one_by_one(_perform, [(work, block) for block in batch.blocks])
        # All batches together, so that no core waits at the end of each, and the smallest last, where one may wait.
        shared.sort(key=lambda sized: -sized[0])
        (self._share or _one_by_one)(_perform, [job for _, job in shared])

    # -- gradients to coefficients -------------------------------------------------------------------------------------

    @override
    def extract(self, intake: Intake) -> CompressedUpdate:
        update = CompressedUpdate.empty(self.plan, quantized=intake.quantize, on_devices=True)
        present = [grad is not None for grad in intake.grads]
        spoken = self.extract_into(update, intake)
        if intake.quantize:
            self.silence(present, spoken)
        return CompressedUpdate(self.plan, update.index, update.value, tuple(present))

    def extract_into(self, update: CompressedUpdate, intake: Intake) -> dict[int, Tensor]:
        """The coefficients of this engine's batches into ``update``; the rest is as for :meth:`extract`.

        Returns:
            by batch, of each of its tiles whether anything is said, ``(tiles,) bool``; it only means something for
            signs.
        """
        own, step, quantize = intake.own, intake.step, intake.quantize
        self._momenta = intake.momenta if own is not None else ()
        if step is not None and self.needs_whole_updates:
            raise ValueError("a step of a fixed size needs the whole update first: merge it")
        if step is not None and (quantize or own is not None):
            raise ValueError("step needs values that leave the momentum at once: it goes with neither quantize nor own")
        # In the arithmetic of floats, what is taken out of the momentum is decoded once for both.
        fused = self.plan.arithmetic == "float"
        weights, rates = (None, ()) if step is None else (Contiguous(step[0]), step[1])
        spoken: dict[int, Tensor] = {}
        extractions: list[Extraction] = []
        works: list[tuple[Batch, Work, bool]] = []
        grads = [g if g is None or g.is_contiguous() else g.contiguous() for g in intake.grads]
        present = tuple(grad is not None for grad in grads)
        alone = [CompressedUpdate(self.plan, update.index, update.value, present)]
        for (number, batch), merge in zip(self._batches.items(), self._merges, strict=True):
            spoken[number] = torch.ones(batch.tiles, dtype=torch.bool, device=batch.device)
            as_coefficients = intake.in_coefficients[min(batch.ranges)]
            make = extraction_class(
                self.plan.arithmetic,
                batch,
                self._transforms[number],
                in_coefficients=as_coefficients,
                overlap=own is not None,
                quantize=quantize,
            )
            extraction = make(
                batch=batch,
                transform=self._transforms[number],
                in_coefficients=as_coefficients,
                grads=grads,
                momenta=intake.momenta,
                rate=intake.lr[batch.group],
                keep=intake.decay[batch.group],
                own=own,
                step=None if weights is None or not fused else (weights.tensors, rates[batch.group] * batch.gain),
                index_out=update.index[number],
                value_out=update.value[number],
                spoken_out=spoken[number],
                whole=None if batch.profile.by_threads or own is None else WholeBatch.of(batch, own),
            )
            extractions.append(extraction)
            then, long = None, extraction.takes_long_blocks
            if weights is not None and not fused:
                merge.check(alone)
                then = partial(self._merge_block, merge, alone, weights.tensors, rates)
                long = long and merge.takes_long_blocks(alone, weights.tensors)
            works.append((batch, partial(self._extract_block, extraction, then), long))
        self._for_each_block(works)
        for extraction in extractions:
            extraction.end()
        if weights is not None:
            weights.write_back()
        return spoken

    @override
    def finite(self, grads: Sequence[Tensor | None]) -> Tensor | None:
        return None if self._share is None else finite_in_parts(grads, self._share)

    def _extract_block(self, extraction: Extraction, then: Work | None, block: Block, worker: int) -> None:
        extraction.extract(block, *self._buffers(extraction.batch, block, worker))
        if then is not None:
            then(block, worker)

    def silence(self, present: list[bool], spoken: dict[int, Tensor]) -> None:
        """Takes out of ``present`` the tensors about which nothing is said, tile by tile, as :meth:`extract` says."""
        if not spoken:
            return
        said = []
        for number, tiles in spoken.items():
            # How many tiles say something up to the end of each tensor.
            before = tiles.cumsum(0, dtype=torch.int32).index_select(0, self._last_tiles(number))
            said.append(before.diff(prepend=before.new_zeros(1)) > 0)
        # One look at all batches, wherever they are.
        answers: list[bool] = torch.cat([some.to(said[0].device) for some in said]).tolist()
        tensors = [tensor for number in spoken for tensor in self.plan.batches[number].ranges]
        for tensor, answer in zip(tensors, answers, strict=True):
            present[tensor] = present[tensor] and answer

    def _last_tiles(self, number: int) -> Tensor:
        """The last tile of each tensor of a batch, ``(tensors,) int32``."""
        if number not in self._lasts:
            batch = self.plan.batches[number]
            last = [stop - 1 for _, stop in batch.ranges.values()]
            self._lasts[number] = torch.tensor(last, dtype=torch.int32, device=batch.device)
        return self._lasts[number]

    # -- coefficients to weights ---------------------------------------------------------------------------------------

    @override
    def merge(
        self,
        updates: Sequence[CompressedUpdate],
        params: Sequence[Tensor],
        *,
        lr: Sequence[float],
        sizes: Sizes | None = None,
    ) -> None:
        if not updates:
            return
        self._check(updates, sizes)
        self._prepare(updates, self._merges)
        weights = Contiguous(params)
        if sizes is None:
            self._measure(updates)
        self._for_each_block(
            [
                (
                    m.batch,
                    partial(self._merge_block, m, updates, weights.tensors, lr),
                    m.takes_long_blocks(updates, weights.tensors),
                )
                for m in self._merges
            ]
        )
        weights.write_back()

    @property
    @override
    def merges_ahead(self) -> bool:
        return self._share is not None and any(merge.goes_ahead for merge in self._merges)

    @override
    def merge_ahead(
        self,
        updates: Sequence[CompressedUpdate],
        weights: Sequence[Tensor],
        shifted: Sequence[Tensor | None],
        *,
        lr: Sequence[float],
        ahead_lr: Sequence[float],
    ) -> bool:
        written = [*weights, *(tensor for tensor in shifted if tensor is not None)]
        if not (updates and self.merges_ahead and self._momenta and all(tensor.is_contiguous() for tensor in written)):
            return False
        if any(merge.measures or not merge.batch.profile.by_threads for merge in self._merges):
            return False
        self._check(updates, None)
        ahead = Ahead(shifted, ahead_lr, self._momenta)
        together = [merge for merge in self._merges if merge.takes_ahead(updates, weights, ahead)]
        apart = [merge for merge in self._merges if merge not in together]
        self._prepare(updates, apart)
        self._for_each_block(
            [
                *((m.batch, partial(self._merge_block, m, updates, weights, lr), False) for m in apart),
                *((m.batch, partial(self._merge_block_ahead, m, updates, weights, lr, ahead), True) for m in together),
            ]
        )
        for merge in apart:
            for number in merge.batch.ranges:
                param = shifted[number]
                if param is not None:
                    shift_by(param.copy_(weights[number]), self._momenta[number], ahead_lr[merge.batch.group], False)
        return True

    def _prepare(self, updates: Sequence[CompressedUpdate], merges: Sequence[Merge]) -> None:
        for by_threads in (True, False):
            jobs: list[Job] = [
                (partial(_prepare, preparation), merge.batch.blocks[0])
                for merge in merges
                if merge.batch.profile.by_threads is by_threads
                for preparation in merge.preparations(updates)
            ]
            ((self._share if by_threads else None) or _one_by_one)(_perform, jobs)

    def _check(self, updates: Sequence[CompressedUpdate], sizes: Sizes | None) -> None:
        for merge in self._merges:
            merge.sizes = sizes
            merge.check(updates)

    def _measure(self, updates: Sequence[CompressedUpdate]) -> dict[int, float | int]:
        measuring = [merge for merge in self._merges if merge.measures]
        self._for_each_block([(m.batch, partial(self._measure_block, m, updates), False) for m in measuring])
        found: dict[int, float | int] = {}
        for merge in measuring:
            found |= merge.end_measuring()
        return found

    @override
    def largest(self, updates: Sequence[CompressedUpdate]) -> dict[int, float]:
        found: dict[int, float] = {}
        for merge in self._merges:
            if merge.measures:
                merge.sizes = None
                found |= merge.largest(updates)
        return found

    @override
    def squares(self, updates: Sequence[CompressedUpdate], largest: Mapping[int, float]) -> dict[int, float | int]:
        self._check(updates, Sizes(largest, {}, {}))
        return self._measure(updates)

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

    def _merge_block_ahead(
        self,
        merge: Merge,
        updates: Sequence[CompressedUpdate],
        weights: Sequence[Tensor],
        lr: Sequence[float],
        ahead: Ahead,
        block: Block,
        worker: int,
    ) -> None:
        batch = merge.batch
        merge.merge_block_ahead(block, worker, updates, weights, lr[batch.group] * batch.gain, ahead)

    def _measure_block(self, merge: Merge, updates: Sequence[CompressedUpdate], block: Block, worker: int) -> None:
        merge.measure_block(block, worker, self._buffers(merge.batch, block, worker), updates)

    @override
    def decode(self, updates: Sequence[CompressedUpdate], *, sizes: Sizes | None = None) -> list[Tensor]:
        decoded = [
            torch.zeros(spec.shape, dtype=compute_dtype(spec.dtype), device=spec.device) for spec in self.plan.specs
        ]
        if updates:
            self._check(updates, sizes)
        for merge in self._merges if updates else ():
            for block in merge.batch.blocks:
                tiles = merge.decode_block(block, 0, self._buffers(merge.batch, block, 0), updates)
                for piece in block.pieces:
                    for region in piece.regions:
                        region.of_tensor(decoded[piece.param]).copy_(region.of_block(tiles))
        return decoded

    # -- the lookahead -------------------------------------------------------------------------------------------------

    @override
    def shift(
        self,
        params: Sequence[Tensor],
        directions: Sequence[Tensor],
        saved: Sequence[Tensor],
        lr: Sequence[float],
        whole: Sequence[bool],
    ) -> None:
        parts: list[tuple[Tensor, Tensor, Tensor, int, int, float]] = []
        together: list[Shift] = []
        for param, direction, keep, rate, as_it_is in zip(params, directions, saved, lr, whole, strict=True):
            if self._share is not None and not as_it_is and can_shift(param, direction, keep):
                size = param.numel()
                parts += [
                    (param, direction, keep, start, min(start + PART, size), rate) for start in range(0, size, PART)
                ]
                continue
            if profile_of(param.device).by_threads:
                keep.copy_(param)
                shift_by(param, direction, rate, as_it_is)
            else:
                together.append(Shift(param, direction, keep, rate, as_it_is))
        shift_together(together)
        if self._share is not None and parts:
            self._share(_shift_part, parts)
