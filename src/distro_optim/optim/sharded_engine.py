"""Steps of a sharded model: each rank those of its own tiles, by any engine, and the update of all together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import override

from ..compress import CompressedUpdate, TilePlan, compute_dtype
from ..compress.engine import Engine, Intake
from ..compress.exact import check_sums
from ..compress.merging import Sizes, values_of
from ..compress.shards import Box, Span
from ..errors import DistroError
from .sharding import Sharding

__all__ = ["ShardedEngine"]


class ShardedEngine(Engine):
    """Takes the gradients of DTensors, and their shards as parameters; gives and takes updates of the whole model.

    Updates are in main memory on both sides. :meth:`extract` and :meth:`finite` are collective: all ranks that hold
    the model must call them together, as :meth:`~distro_optim.optimizer.DisTrO.step` does. :meth:`merge` is
    so where steps have a fixed size; otherwise each rank decodes the tiles that its shards touch.

    Args:
        sharding: what is here.
        make: an engine of a plan. Of two, where tiles are cut: what a rank owns is not what it touches.
    """

    def __init__(self, sharding: Sharding, make: Callable[[TilePlan], Engine]) -> None:
        super().__init__(sharding.whole)
        for batch in sharding.whole.batches:
            check_sums(batch)
        self._sharding = sharding
        self._inner = make(sharding.plan)
        self._merging = self._inner if sharding.plan_around is sharding.plan else make(sharding.plan_around)
        self._senders: list[list[Tensor]] | None = None
        self._own: dict[int, Tensor] | None = None
        self._owned_parts = _Parts(sharding, sharding.boxes, sharding.plan)
        self._touched_parts = _Parts(sharding, sharding.around, sharding.plan_around)

    @property
    @override
    def needs_whole_updates(self) -> bool:
        # Of all ranks alike, also of those that have no such tensor.
        return any(batch.update == "rms" for batch in self.plan.batches)

    # -- gradients to coefficients -------------------------------------------------------------------------------------

    @override
    def finite(self, grads: Sequence[Tensor | None]) -> Tensor | None:
        """As :meth:`Engine.finite`, of the whole gradients: what one rank has to leave out, all leave out."""
        norms, limits = torch.zeros(2, len(grads), dtype=torch.float64, device="cpu")
        looks: dict[int, Tensor] = {}
        for number, grad in enumerate(self._sharding.local_gradients(grads)):
            if grad is not None:
                limits[number] = torch.finfo(compute_dtype(grad.dtype)).max
            if grad is not None and grad.numel():
                looks[number] = torch.linalg.vector_norm(grad, dtype=compute_dtype(grad.dtype))
        if looks:
            # One look at the device. In float32, unless there are gradients in float64, which have no such device.
            device = next(iter(looks.values())).device
            norms[list(looks)] = torch.stack([look.to(device) for look in looks.values()]).cpu().double()
        everybody = torch.stack(self._sharding.gather(torch.stack([norms, limits]).view(-1).view(torch.uint8)))
        everybody, given = everybody.view(torch.float64).view(-1, 2, len(grads)).unbind(1)
        self._check_given(given > 0)
        squares = torch.where(self._shard_counts, everybody.square(), 0).sum(0)
        fine: Tensor = everybody.isfinite().all(0) & (squares <= limits)
        return fine.to(torch.float32)

    def _check_given(self, given: Tensor) -> None:
        """Raises DistroError where some ranks have a gradient of which others need a part, and others have none."""
        needed = self._sharding.travels | self._sharding.orthogonal
        odd = [n for n in (given.any(0) & ~given.all(0)).nonzero().flatten().tolist() if n in needed]
        if odd:
            raise DistroError(
                f"parameter {odd[0]} is sharded over ranks of which only some have a gradient of it: let all ranks "
                "call backward() on the same layers, or set the missing gradients to zeros"
            )

    @cached_property
    def _shard_counts(self) -> Tensor:
        """``(ranks, tensors) bool``: whether a rank's shard counts, of those that have the same."""
        return _firsts([[box.shard for box in boxes] for boxes in self._sharding.everybody])

    @cached_property
    def _box_counts(self) -> Tensor:
        """The same of the boxes."""
        return _firsts([[box.spans for box in boxes] for boxes in self._sharding.everybody])

    @override
    def extract(self, intake: Intake) -> CompressedUpdate:
        grads = self._sharding.gradients(intake.grads)
        mine = self._inner.download(self._inner.extract(replace(intake, grads=grads, step=None)))
        update = self._together(mine, quantized=intake.quantize)
        if intake.step is not None:
            params, rates = intake.step
            self.merge([update], params, lr=rates)
        return update

    def _together(self, mine: CompressedUpdate, *, quantized: bool) -> CompressedUpdate:
        """The update of the whole model: of each tile what its first rank says."""
        senders = self._owned()
        parts = [torch.tensor(mine.present, dtype=torch.uint8, device="cpu")]
        if self._own is None:
            self._own = self._owned_parts.rows_of(self.plan, senders[self._sharding.rank])
        for number, rows in self._own.items():
            parts += [_bytes(mine.index[number][rows]), _bytes(mine.value[number][rows])]
        whole = CompressedUpdate.empty(self.plan, quantized=quantized)
        flags = len(mine.present)
        widths = [
            batch.k * (4 + value.element_size()) for batch, value in zip(self.plan.batches, whole.value, strict=True)
        ]
        length = flags + max(
            sum(len(rows) * width for rows, width in zip(tiles, widths, strict=True)) for tiles in senders
        )
        message = torch.cat(parts)
        message = torch.cat([message, message.new_zeros(length - len(message))])
        present = torch.zeros(len(self.plan), dtype=torch.bool, device="cpu")
        for tiles, boxes, said in zip(senders, self._sharding.everybody, self._sharding.gather(message), strict=True):
            # A rank without tiles of a tensor does not know whether there is anything to say about it.
            knows = torch.tensor(
                [box.grid.tiles > 0 or grid.tiles == 0 for box, grid in zip(boxes, self.plan.grids, strict=True)],
                device="cpu",
            )
            present |= said[:flags].bool() & knows
            start = flags
            for rows, index, value in zip(tiles, whole.index, whole.value, strict=True):
                for kind in (index, value):
                    size = len(rows) * kind.shape[1] * kind.element_size()
                    if size:
                        here = said[start : start + size].clone().view(kind.dtype).view(len(rows), -1)
                        kind[rows] = here
                    start += size
        return CompressedUpdate(self.plan, whole.index, whole.value, tuple(present.tolist()))

    def _owned(self) -> list[list[Tensor]]:
        """By rank and batch of the whole: the tiles that it speaks for.

        Raises:
            DistroError: nobody speaks for a tile.
        """
        if self._senders is None:
            free = [torch.ones(batch.tiles, dtype=torch.bool, device="cpu") for batch in self.plan.batches]
            senders = []
            for boxes in self._sharding.everybody:
                tiles = [box.tiles(grid) for box, grid in zip(boxes, self.plan.grids, strict=True)]
                taken: list[list[Tensor]] = [[torch.empty(0, dtype=torch.int64, device="cpu")] for _ in free]
                for number, home in enumerate(self.plan.home):
                    if home is not None:
                        rows = tiles[number] + self.plan.batches[home].ranges[number][0]
                        rows = rows[free[home][rows]]
                        free[home][rows] = False
                        taken[home].append(rows)
                senders.append([torch.cat(rows) for rows in taken])
            if any(bool(left.any()) for left in free):
                raise DistroError(
                    "the shards of the ranks leave out a part of a parameter: distribute it as torch does"
                )
            self._senders = senders
        return self._senders

    # -- coefficients to weights ---------------------------------------------------------------------------------------

    @override
    def upload(self, updates: Sequence[CompressedUpdate]) -> list[CompressedUpdate]:
        """As they are: :meth:`merge` takes the tiles that are here, and brings those to the device."""
        return list(updates)

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
        sizes = self._sizes(updates)
        parts = self._merging.upload([self._touched_parts.of(update) for update in updates])
        boxed: list[Tensor] = []
        for param, box in zip(params, self._sharding.around, strict=True):
            if box.is_shard:
                boxed.append(param)
            else:
                # The neighbours' weights are not here, nor are they needed: each weight steps by itself.
                room = torch.zeros(box.shape, dtype=param.dtype, device=param.device)
                box.shard_of(room).copy_(param)
                boxed.append(room)
        self._merging.merge(parts, boxed, lr=lr, sizes=sizes)
        for param, room, box in zip(params, boxed, self._sharding.around, strict=True):
            if room is not param:
                param.copy_(box.shard_of(room))

    @override
    def decode(self, updates: Sequence[CompressedUpdate], *, sizes: Sizes | None = None) -> list[Tensor]:
        """The merged update of every tensor before its sign, sharded as the parameter."""
        parts = self._merging.upload([self._touched_parts.of(update) for update in updates])
        decoded = self._merging.decode(parts, sizes=Sizes(self._largest(updates), {}, {}))
        return [self._sharding.as_parameter(number, tensor) for number, tensor in enumerate(decoded)]

    def _largest(self, updates: Sequence[CompressedUpdate]) -> dict[int, float]:
        """:attr:`Sizes.largest`, from whole updates: without a word to other ranks, of which not all may decode."""
        found: dict[int, float] = {}
        for home, batch in enumerate(self.plan.batches):
            for number, (start, stop) in batch.ranges.items() if batch.update == "rms" else ():
                said = [u.value[home][start:stop] for u in updates if u.present[number]]
                numbers = [values_of([value], batch.compute_dtype) for value in said]
                found[number] = max((float(some.abs().max()) for some in numbers), default=0.0)
        return found

    def _sizes(self, updates: Sequence[CompressedUpdate]) -> Sizes | None:
        """Of whole tensors, from what each rank has of the tiles that it owns: integers, so that sums are exact."""
        if not updates or not self.needs_whole_updates:
            return None
        parts = self._inner.upload([self._owned_parts.of(update) for update in updates])
        tensors = range(len(self.plan))
        mine = self._inner.largest(parts)
        largest = torch.tensor([mine.get(number, 0.0) for number in tensors], dtype=torch.float64, device="cpu")
        largest = self._gathered(largest).amax(0)
        squares = self._inner.squares(parts, dict(enumerate(largest.tolist())))
        sums = torch.tensor([squares.get(number, 0) for number in tensors], dtype=torch.int64, device="cpu")
        total = torch.where(self._box_counts, self._gathered(sums), 0).sum(0)
        tiles = dict(enumerate(grid.tiles for grid in self.plan.grids))
        return Sizes(dict(enumerate(largest.tolist())), dict(enumerate(total.tolist())), tiles)

    def _gathered(self, mine: Tensor) -> Tensor:
        """``(ranks, ...)``: what every rank has."""
        return torch.stack(self._sharding.gather(mine.view(torch.uint8))).view(mine.dtype)

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
        self._inner.shift(params, directions, saved, lr, whole)

    @override
    def put_back(self, params: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
        self._inner.put_back(params, saved)


def _firsts(everybody: Sequence[Sequence[tuple[Span, ...]]]) -> Tensor:
    """``(ranks, tensors) bool``: whether a rank is the first one that has such a part of a tensor."""
    counts = torch.zeros(len(everybody), len(everybody[0]), dtype=torch.bool, device="cpu")
    seen: set[tuple[int, tuple[Span, ...]]] = set()
    for place, parts in enumerate(everybody):
        for one in enumerate(parts):
            counts[place, one[0]] = one not in seen
            seen.add(one)
    return counts


class _Parts:
    """Updates of the whole model, and what they say about the tiles of boxes.

    Args:
        sharding: of the model.
        boxes: one for each tensor.
        plan: of them.
    """

    def __init__(self, sharding: Sharding, boxes: Sequence[Box], plan: TilePlan) -> None:
        self.plan = plan
        # Batches of the boxes are batches of the whole, with fewer tiles: which batch, and which of its tiles.
        self._batches: list[int] = []
        self._rows: list[Tensor] = []
        tiles = [box.tiles(grid) for box, grid in zip(boxes, sharding.whole.grids, strict=True)]
        for batch in plan.batches:
            home = sharding.whole.home[next(iter(batch.ranges))]
            assert home is not None
            ranges = sharding.whole.batches[home].ranges
            self._batches.append(home)
            self._rows.append(torch.cat([tiles[number] + ranges[number][0] for number in batch.ranges]))

    def of(self, update: CompressedUpdate) -> CompressedUpdate:
        """What ``update`` says about them."""
        index, value = (
            tuple(
                kind[home].index_select(0, rows.to(kind[home].device))
                for home, rows in zip(self._batches, self._rows, strict=True)
            )
            for kind in (update.index, update.value)
        )
        return CompressedUpdate(self.plan, index, value, update.present)

    def rows_of(self, whole: TilePlan, tiles: Sequence[Tensor]) -> dict[int, Tensor]:
        """By batch of the boxes, in the order of the batches of ``whole``: where its ``tiles`` lie in it."""
        found = {}
        for home, batch in enumerate(whole.batches):
            if home in self._batches:
                number = self._batches.index(home)
                place = torch.full((batch.tiles,), -1, device="cpu")
                place[self._rows[number]] = torch.arange(len(self._rows[number]), device="cpu")
                found[number] = place[tiles[home]]
        return found


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
