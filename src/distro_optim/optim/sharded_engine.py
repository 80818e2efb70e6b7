"""Steps of a sharded model: each rank those of its own tiles, by any engine, and the update of all together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import override

from ..compress import CompressedUpdate, compute_dtype
from ..compress.engine import Engine, Intake
from ..compress.shards import Span
from ..errors import DistroError
from .sharding import Sharding

__all__ = ["ShardedEngine"]


class ShardedEngine(Engine):
    """Takes the gradients of DTensors, and their shards as parameters; gives and takes updates of the whole model.

    Updates are in main memory on both sides. :meth:`extract` and :meth:`finite` are collective: all ranks that hold
    the model must call them together, as :meth:`~distro_optim.optimizer.DisTrO.step` does.

    Args:
        sharding: what is here.
        inner: of the plan of the boxes.
    """

    def __init__(self, sharding: Sharding, inner: Engine) -> None:
        super().__init__(sharding.whole)
        self._sharding = sharding
        self._inner = inner
        self._senders: list[list[Tensor]] | None = None
        self._counting: Tensor | None = None
        self._own: dict[int, Tensor] | None = None
        # Batches of the boxes are batches of the whole, with fewer tiles: which batch, and which of its tiles.
        self._batches, self._rows = _rows(sharding)

    @property
    @override
    def needs_whole_updates(self) -> bool:
        return self._inner.needs_whole_updates

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
        everybody = torch.stack(self._sharding.gather(norms.view(torch.uint8))).view(torch.float64)
        squares = torch.where(self._counts_once(), everybody.square(), 0).sum(0)
        fine: Tensor = everybody.isfinite().all(0) & (squares <= limits)
        return fine.to(torch.float32)

    def _counts_once(self) -> Tensor:
        """``(ranks, tensors) bool``: whether a rank's shard counts, of those that have the same."""
        if self._counting is None:
            everybody = self._sharding.everybody
            self._counting = torch.zeros(len(everybody), len(self.plan), dtype=torch.bool, device="cpu")
            seen: set[tuple[int, tuple[Span, ...]]] = set()
            for place, boxes in enumerate(everybody):
                for number, box in enumerate(boxes):
                    self._counting[place, number] = (number, box.shard) not in seen
                    seen.add((number, box.shard))
        return self._counting

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
            self._own = self._own_rows(senders[self._sharding.rank])
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

    def _own_rows(self, owned: Sequence[Tensor]) -> dict[int, Tensor]:
        """By batch of the boxes, in the order of the whole's batches: where the tiles that we speak for lie in it."""
        found = {}
        for home in range(len(self.plan.batches)):
            if home in self._batches:
                number = self._batches.index(home)
                place = torch.full((self.plan.batches[home].tiles,), -1, device="cpu")
                place[self._rows[number]] = torch.arange(len(self._rows[number]), device="cpu")
                found[number] = place[owned[home]]
        return found

    # -- coefficients to weights ---------------------------------------------------------------------------------------

    @override
    def upload(self, updates: Sequence[CompressedUpdate]) -> list[CompressedUpdate]:
        """As they are: :meth:`merge` takes the tiles that are here, and brings those to the device."""
        return list(updates)

    @override
    def merge(self, updates: Sequence[CompressedUpdate], params: Sequence[Tensor], *, lr: Sequence[float]) -> None:
        parts = self._inner.upload([self._part(update) for update in updates])
        boxed: list[Tensor] = []
        for param, box in zip(params, self._sharding.boxes, strict=True):
            if box.is_shard:
                boxed.append(param)
            else:
                # The neighbours' weights are not here, nor are they needed: each weight steps by itself.
                room = torch.zeros(box.shape, dtype=param.dtype, device=param.device)
                box.shard_of(room).copy_(param)
                boxed.append(room)
        self._inner.merge(parts, boxed, lr=lr)
        for param, room, box in zip(params, boxed, self._sharding.boxes, strict=True):
            if room is not param:
                param.copy_(box.shard_of(room))

    def _part(self, update: CompressedUpdate) -> CompressedUpdate:
        """What an update says about the tiles that are here."""
        index, value = (
            tuple(
                kind[home].index_select(0, rows.to(kind[home].device))
                for home, rows in zip(self._batches, self._rows, strict=True)
            )
            for kind in (update.index, update.value)
        )
        return CompressedUpdate(self._inner.plan, index, value, update.present)

    @override
    def decode(self, updates: Sequence[CompressedUpdate]) -> list[Tensor]:
        """The merged update of every tensor before its sign, sharded as the parameter."""
        parts = self._inner.upload([self._part(update) for update in updates])
        decoded = self._inner.decode(parts)
        return [self._sharding.as_parameter(number, tensor) for number, tensor in enumerate(decoded)]

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


def _rows(sharding: Sharding) -> tuple[list[int], list[Tensor]]:
    """Of each batch of the boxes: the batch of the whole that it is of, and which of its tiles it has."""
    tiles = [box.tiles(grid) for box, grid in zip(sharding.boxes, sharding.whole.grids, strict=True)]
    batches, rows = [], []
    for batch in sharding.plan.batches:
        home = sharding.whole.home[next(iter(batch.ranges))]
        assert home is not None
        ranges = sharding.whole.batches[home].ranges
        batches.append(home)
        rows.append(torch.cat([tiles[number] + ranges[number][0] for number in batch.ranges]))
    return batches, rows


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
