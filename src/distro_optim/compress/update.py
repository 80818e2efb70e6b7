"""What one peer contributes in one round: for every tensor, the chosen coefficients of each of its tiles.

Inside a process the coefficients of all tensors lie in a few arrays, one pair for each batch of the plan, because a
handful of large operations is faster than one per tensor. :meth:`CompressedUpdate.tensors` shows them tensor by
tensor, as they travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from ..errors import ProtocolError
from .distinct import has_repeats
from .plan import TilePlan

__all__ = ["CompressedTensor", "CompressedUpdate"]

_INDEX_DTYPES: Final = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class CompressedTensor:
    """The chosen coefficients of one tensor.

    Attributes:
        index: ``(*shape[:-2], k)`` of an integer type, for a vector ``(tiles, k)``: positions in the flattened tile.
        value: same shape: bool (True is negative) or the tensor's float type.
        shape: of the encoded tensor, Psyche's ``xshape``: ``(..., rows, cols, h, w)`` or ``(tiles, w)``.
        totalk: elements in a tile; every index lies below it.

    A tensor about which the peer says nothing (no gradient, or one that was not finite) has ``k = 0``.
    """

    index: Tensor
    value: Tensor
    shape: tuple[int, ...]
    totalk: int


@dataclass(frozen=True)
class CompressedUpdate:
    """One peer's contribution to one step.

    In main memory, whatever the devices of the plan are; but for what an engine makes
    (:meth:`~distro_optim.compress.engine.Engine.extract`) and takes
    (:meth:`~distro_optim.compress.engine.Engine.merge`), which is on them.

    Attributes:
        plan: how the tensors are tiled.
        index: one ``(tiles, k) int32`` for each batch of the plan.
        value: one ``(tiles, k)`` for each batch: bool (True is negative), or the batch's ``value_dtype``.
        present: for each tensor, whether the peer says anything about it. Rows of an absent tensor mean nothing.
    """

    plan: TilePlan
    index: tuple[Tensor, ...]
    value: tuple[Tensor, ...]
    present: tuple[bool, ...]

    @property
    def quantized(self) -> bool:
        """Whether values are single bits."""
        return any(v.dtype == torch.bool for v in self.value)

    @classmethod
    def empty(cls, plan: TilePlan, *, quantized: bool, on_devices: bool = False) -> CompressedUpdate:
        """A contribution that says nothing: what a peer without gradients sends.

        Args:
            plan: how the tensors are tiled.
            quantized: values are single bits.
            on_devices: it lies on the devices of the plan, not in main memory.
        """
        index, value = [], []
        for batch in plan.batches:
            device = batch.device if on_devices else "cpu"
            kind = torch.bool if quantized else batch.value_dtype
            index.append(_zeros(batch.tiles, batch.k, torch.int32, device))
            value.append(_zeros(batch.tiles, batch.k, kind, device))
        return cls(plan, tuple(index), tuple(value), (False,) * len(plan))

    def tensors(self) -> list[CompressedTensor]:
        """Tensor by tensor, in the plan's order, of the shapes in :class:`CompressedTensor`; views where possible."""
        entries = []
        for number, (grid, home) in enumerate(zip(self.plan.grids, self.plan.home, strict=True)):
            shape = grid.coded_shape
            rows = grid.tile_counts
            if home is None or not self.present[number]:
                index = torch.zeros(*rows, 0, dtype=torch.int32, device="cpu")
                kind = torch.bool if self.quantized else self.plan.specs[number].dtype
                value = torch.zeros(*rows, 0, dtype=kind, device="cpu")
            else:
                start, stop = self.plan.batches[home].ranges[number]
                index = self.index[home][start:stop].view(*rows, -1)
                value = self.value[home][start:stop].view(*rows, -1)
            entries.append(CompressedTensor(index, value, shape, grid.tile_size))
        return entries

    @classmethod
    def from_tensors(
        cls, plan: TilePlan, tensors: Sequence[CompressedTensor], *, finite: bool = True
    ) -> CompressedUpdate:
        """The inverse of :meth:`tensors`. Nothing a peer says is taken on trust.

        Args:
            plan: of our own model.
            tensors: as they came.
            finite: whether NaN and infinities are refused. Psyche's clients send them and apply them.

        Raises:
            ProtocolError: number of tensors, a shape, the number of coefficients, a type or an index does not fit
                the plan, or a position is named twice in one tile, or a value is not finite and must be.
        """
        if len(tensors) != len(plan):
            raise ProtocolError(f"the update has {len(tensors)} tensors, the model has {len(plan)}")
        present = tuple(_check_entry(plan, n, t) for n, t in enumerate(tensors))
        kinds = {t.value.dtype == torch.bool for n, t in enumerate(tensors) if present[n]}
        if len(kinds) > 1:
            raise ProtocolError("the update mixes signs and values")
        # Where no tensor is present, the dtype of the empty values still tells signs from values.
        quantized = kinds == {True} if kinds else any(t.value.dtype == torch.bool for t in tensors)
        update = cls.empty(plan, quantized=quantized)
        for n, entry in enumerate(tensors):
            home = plan.home[n]
            if not present[n] or home is None:
                continue
            start, stop = plan.batches[home].ranges[n]
            k = plan.topk[n]
            update.index[home][start:stop].copy_(entry.index.reshape(-1, k))
            update.value[home][start:stop].copy_(entry.value.reshape(-1, k))
        update = cls(plan, update.index, update.value, present)
        update.check(finite=finite)
        return update

    def check(self, *, finite: bool = True) -> None:
        """Raises ProtocolError unless every index lies in its tile, none twice, and values are finite, if so wanted."""
        for batch, index, value in zip(self.plan.batches, self.index, self.value, strict=True):
            ranges = [r for n, r in batch.ranges.items() if self.present[n]]
            for start, stop in _joined_ranges(ranges):
                rows = index[start:stop]
                if not rows.numel():
                    continue
                if int(rows.min()) < 0 or int(rows.max()) >= batch.tile_size:
                    raise ProtocolError(f"an index lies outside its tile of {batch.tile_size} elements")
                if has_repeats(rows.cpu().numpy()):
                    raise ProtocolError("a position is named twice in one tile")
                if finite and value.dtype != torch.bool and not bool(value[start:stop].isfinite().all()):
                    raise ProtocolError("a value is not finite")


def _zeros(rows: int, columns: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    zeros = torch.empty(rows, columns, dtype=dtype, device=device)
    if zeros.device.type != "cpu":
        return zeros.zero_()
    # PyTorch would do it on all cores, and its threads keep them for milliseconds afterwards, waiting for more.
    zeros.view(torch.uint8).numpy().fill(0)
    return zeros


def _check_entry(plan: TilePlan, number: int, entry: CompressedTensor) -> bool:
    """Whether tensor ``number`` is present; ProtocolError if its entry cannot belong to it."""
    grid, k = plan.grids[number], plan.topk[number]
    where = f"tensors[{number}]"
    if tuple(entry.shape) != grid.coded_shape or entry.totalk != grid.tile_size:
        raise ProtocolError(
            f"encoded shape {tuple(entry.shape)} with {entry.totalk} a tile, expected {grid.coded_shape}", field=where
        )
    if entry.index.shape != entry.value.shape:
        raise ProtocolError(f"{tuple(entry.index.shape)} indices, {tuple(entry.value.shape)} values", field=where)
    if entry.index.numel() == 0:
        return False
    if tuple(entry.index.shape) != (*grid.tile_counts, k):
        raise ProtocolError(f"{tuple(entry.index.shape)} indices for {grid.tiles} tiles of {k}", field=where)
    if entry.index.dtype not in _INDEX_DTYPES:
        raise ProtocolError(f"indices are {entry.index.dtype}", field=where)
    # An int64 index that wraps in int32 could look legal.
    low, high = int(entry.index.min()), int(entry.index.max())
    if low < 0 or high >= grid.tile_size:
        raise ProtocolError(f"indices from {low} to {high}, a tile has {grid.tile_size} elements", field=where)
    # Another float type than ours is cast, as Psyche does: a peer may keep its parameters in another precision.
    if not (entry.value.dtype == torch.bool or entry.value.dtype.is_floating_point):
        raise ProtocolError(f"values are {entry.value.dtype}", field=where)
    return True


def _joined_ranges(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Joins neighbouring ``[start, stop)`` ranges."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged
