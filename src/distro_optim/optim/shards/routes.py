"""Which elements of tensors travel from whom to whom, so that everybody has those that it needs.

Each rank has a rectangle of each tensor and needs another one. Two ranks have the same, or nothing in common; what
several have comes from the nearest of them in the mesh. A rank finds out its own routes from what everybody has and
needs, so that nothing has to be agreed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...compress.shards import Span, common_part, part_of
from .ranks import Ranks

__all__ = ["Rectangle", "Route", "Routes", "routes"]

Rectangle = tuple[Span, ...]
"""Elements of a tensor, dimension by dimension."""


@dataclass(frozen=True)
class Route:
    """Elements of a tensor that travel between this rank and another one."""

    number: int
    part: Rectangle

    @property
    def elements(self) -> int:
        """How many."""
        return math.prod(stop - start for start, stop in self.part)


@dataclass(frozen=True)
class Routes:
    """All of a rank's.

    Attributes:
        have: its rectangles, by tensor.
        travel: tensors of which anything travels between any two ranks: the same on all of them.
        to: for each rank, what is sent to it; tensors in order.
        come: from each rank, likewise.
    """

    have: Sequence[Rectangle]
    travel: frozenset[int]
    to: Sequence[Sequence[Route]]
    come: Sequence[Sequence[Route]]

    def send(self, ranks: Ranks, tensors: Mapping[int, Tensor]) -> dict[int, list[tuple[Rectangle, Tensor]]]:
        """Sends what others need of ``tensors``. All ranks must call with the same numbers, unless none travels.

        Args:
            ranks: whom.
            tensors: of the shapes of :attr:`have`, by number, of the same type on all ranks, also without elements.

        Returns:
            of each of these tensors what has come, with its place in the whole tensor.
        """
        came: dict[int, list[tuple[Rectangle, Tensor]]] = {number: [] for number in tensors}
        if self.travel.isdisjoint(tensors):
            return came
        empty = torch.empty(0, dtype=torch.uint8, device=ranks.device)
        outgoing = []
        for there in self.to:
            parts = [
                part_of(tensors[route.number], self.have[route.number], route.part)
                for route in there
                if route.number in tensors
            ]
            outgoing.append(torch.cat([empty, *(_bytes(part).to(ranks.device) for part in parts)]))
        coming = [[route for route in there if route.number in tensors] for there in self.come]
        sizes = [[route.elements * tensors[route.number].element_size() for route in there] for there in coming]
        for there, size, message in zip(coming, sizes, ranks.swap(outgoing, [sum(s) for s in sizes]), strict=True):
            for route, part in zip(there, message.split(size), strict=True):
                like = tensors[route.number]
                shape = [stop - start for start, stop in route.part]
                # A copy begins where numbers of any type may begin.
                values = part.clone().view(like.dtype).view(shape).to(like.device)
                came[route.number].append((route.part, values))
        return came


def routes(
    coordinates: Sequence[tuple[int, ...]],
    here: int,
    have: Sequence[Sequence[Rectangle]],
    need: Sequence[Sequence[Rectangle]],
) -> Routes:
    """The routes of a rank.

    Args:
        coordinates: of all ranks in their mesh.
        here: the rank's number among them.
        have: by rank, by tensor.
        need: likewise; what a rank has itself does not come from others.
    """

    def nearest(place: int, those: Sequence[int]) -> int:
        def distance(other: int) -> tuple[int, int]:
            pairs = zip(coordinates[place], coordinates[other], strict=True)
            return sum(a != b for a, b in pairs), other

        return min(those, key=distance)

    places = range(len(coordinates))
    to: list[list[Route]] = [[] for _ in places]
    come: list[list[Route]] = [[] for _ in places]
    travel = set()
    for number, mine in enumerate(have[here]):
        owners: dict[Rectangle, list[int]] = {}
        for place in places:
            owners.setdefault(have[place][number], []).append(place)
        for place in places:
            if not _is_within(need[place][number], have[place][number]):
                travel.add(number)
            # What has no elements has nothing in common with anything.
            part = None if have[place][number] == mine else common_part(need[place][number], mine)
            if part is not None and nearest(place, owners[mine]) == here:
                to[place].append(Route(number, part))
        for rectangle, those in owners.items():
            part = None if here in those else common_part(need[here][number], rectangle)
            if part is not None:
                come[nearest(here, those)].append(Route(number, part))
    return Routes(have[here], frozenset(travel), to, come)


def _is_within(part: Rectangle, whole: Rectangle) -> bool:
    if any(start >= stop for start, stop in part):
        return True
    return common_part(part, whole) == part


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
