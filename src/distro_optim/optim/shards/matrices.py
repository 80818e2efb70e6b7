"""Muon's direction of sharded matrices: each rank makes those of some matrices, and everybody gets its part of them.

Products of a whole matrix need all of it. As Muon is usually done under FSDP, matrices are dealt out to the ranks one
after the other, so that each rank has one batch of them at a time and the work is shared. Batches are those of the
model that is not sharded, since how many matrices a library multiplies at once may decide on the last bit.

A step moves 8 bytes for each element of such a matrix in float32 (it comes, and its direction goes), of which a rank
sends and receives its share. It has one batch in memory beside, or one matrix, if that is larger, five times.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...compress import TileGrid
from ...compress.shards import Box, common_part, part_of
from ..orthogonal import Matrices, batches, directions_of
from .ranks import Ranks
from .routes import Rectangle, Routes, routes

__all__ = ["ShardedMatrices"]

_NOTHING: Rectangle = ((0, 0), (0, 0), (0, 0))


@dataclass(frozen=True)
class _Round:
    """One batch for each rank.

    Attributes:
        jobs: the matrices of all of these batches.
        places: by job, the rank that makes their directions.
        parts: by job, where they lie in their tensor, as :func:`_rectangle`.
        to_makers, from_makers: routes of the jobs.
    """

    jobs: Sequence[Matrices]
    places: Sequence[int]
    parts: Sequence[Rectangle]
    to_makers: Routes
    from_makers: Routes


class ShardedMatrices:
    """Orthogonalises tensors of which each rank has a box.

    Args:
        ranks: that hold the model together.
        grids: of all tensors.
        boxes: by rank, by tensor.
    """

    def __init__(self, ranks: Ranks, grids: Sequence[TileGrid], boxes: Sequence[Sequence[Box]]) -> None:
        self._ranks = ranks
        self._grids = grids
        self._boxes = [[_rectangle(box, grid) for box, grid in zip(of_rank, grids, strict=True)] for of_rank in boxes]
        self._planned: tuple[tuple[tuple[int, torch.dtype], ...], list[_Round]] = ((), [])

    def orthogonalize(self, tensors: Mapping[int, Tensor]) -> None:
        """Replaces matrices by their directions, in place. All ranks must call with the same numbers.

        Args:
            tensors: by number, shaped as the boxes that are here, contiguous.
        """
        kinds = tuple((number, tensor.dtype) for number, tensor in tensors.items())
        if kinds != self._planned[0]:
            self._planned = kinds, self._rounds(tensors)
        boxes = self._boxes[self._ranks.here]
        here = {number: tensor.view(_shape(boxes[number])) for number, tensor in tensors.items()}
        for each in self._planned[1]:
            self._take(each, here, boxes)

    def _rounds(self, tensors: Mapping[int, Tensor]) -> list[_Round]:
        numbers = list(tensors)
        of_all = batches(
            [
                ((grid.batch, grid.height, grid.width), tensor.dtype, tensor.device)
                for grid, tensor in ((self._grids[number], tensor) for number, tensor in tensors.items())
            ]
        )
        made = []
        size = len(self._ranks)
        for first in range(0, len(of_all), size):
            jobs, places = [], []
            for place, batch in enumerate(of_all[first : first + size]):
                for job in batch:
                    jobs.append(Matrices(numbers[job.tensor], job.start, job.stop))
                    places.append(place)
            parts: list[Rectangle] = [
                ((job.start, job.stop), (0, self._grids[job.tensor].height), (0, self._grids[job.tensor].width))
                for job in jobs
            ]
            have = [[boxes[job.tensor] for job in jobs] for boxes in self._boxes]
            make = [
                [part if place == maker else _NOTHING for part, maker in zip(parts, places, strict=True)]
                for place in range(size)
            ]
            # Of its box a rank gets back what is made in this round.
            back = [
                [common_part(box, part) or _NOTHING for box, part in zip(boxes, parts, strict=True)] for boxes in have
            ]
            ways = [
                routes(self._ranks.coordinates, self._ranks.here, here, there)
                for here, there in ((have, make), (make, back))
            ]
            made.append(_Round(jobs, places, parts, *ways))
        return made

    def _take(self, each: _Round, here: Mapping[int, Tensor], boxes: Sequence[Rectangle]) -> None:
        mine = [n for n, place in enumerate(each.places) if place == self._ranks.here]
        came = each.to_makers.send(self._ranks, {n: here[job.tensor] for n, job in enumerate(each.jobs)})
        whole = {n: here[job.tensor].new_empty(0, 0, 0) for n, job in enumerate(each.jobs)}
        for n in mine:
            number, part = each.jobs[n].tensor, each.parts[n]
            whole[n] = here[number].new_empty(_shape(part))
            for place, values in ((boxes[number], here[number]), *came[n]):
                _copy(whole[n], part, values, place)
        if mine:
            for n, direction in zip(mine, directions_of([whole[n] for n in mine]), strict=True):
                whole[n] = direction.contiguous()
        back = each.from_makers.send(self._ranks, whole)
        for n, job in enumerate(each.jobs):
            own = ((each.parts[n], whole[n]),) if n in mine else ()
            for place, values in (*own, *back[n]):
                _copy(here[job.tensor], boxes[job.tensor], values, place)


def _copy(into: Tensor, into_place: Rectangle, values: Tensor, place: Rectangle) -> None:
    """What both have, of two parts of one tensor."""
    both = common_part(into_place, place)
    if both is not None:
        part_of(into, into_place, both).copy_(part_of(values, place, both))


def _rectangle(box: Box, grid: TileGrid) -> Rectangle:
    """A box in the tensor seen as ``(matrices, height, width)``."""
    if grid.lead:
        each = math.prod(grid.lead[1:])
        start, stop = box.spans[0]
        return (start * each, stop * each), (0, grid.height), (0, grid.width)
    if len(grid.shape) < 2:
        return (0, grid.batch), (0, grid.height), (0, grid.width)
    return (0, 1), box.spans[0], box.spans[1] if len(grid.shape) == 2 else (0, grid.width)


def _shape(part: Rectangle) -> list[int]:
    return [stop - start for start, stop in part]
