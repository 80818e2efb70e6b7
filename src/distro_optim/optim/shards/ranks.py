"""The ranks of a mesh, which hold a model together, and how bytes get from one to another."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Ranks"]


class Ranks:
    """A rank's place among all of its mesh, and messages to them. All ranks must send at the same time.

    Args:
        mesh: a DeviceMesh, of any number of dimensions.

    Attributes:
        mesh: itself.
        device: that messages are on while they travel.
        coordinates: of the ranks in the mesh, in their order.
        here: this rank's place in that order.
    """

    def __init__(self, mesh: Any) -> None:
        self.mesh = mesh
        self.device = torch.device(mesh.device_type)
        self.coordinates = list(itertools.product(*(range(size) for size in mesh.shape)))
        self.here = self.coordinates.index(tuple(mesh.get_coordinate()))

    def __len__(self) -> int:
        return len(self.coordinates)

    def gather(self, mine: Tensor) -> list[Tensor]:
        """What every rank has, in their order, in main memory.

        Args:
            mine: of one dimension, of the same type and length on all ranks, in main memory.
        """
        everybody = mine.to(self.device).reshape(1, -1)
        for dim in reversed(range(self.mesh.ndim)):
            rows = [torch.empty_like(everybody) for _ in range(self.mesh.size(dim))]
            dist.all_gather(rows, everybody, group=self.mesh.get_group(dim))
            everybody = torch.cat(rows)
        return list(everybody.cpu())

    def swap(self, outgoing: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """To each rank something else.

        Args:
            outgoing: for every rank, in their order: ``(bytes,) uint8``, on :attr:`device`.
            lengths: bytes that come from each of them.

        Returns:
            what they have sent, in their order.
        """
        arrived = outgoing[0].new_empty(sum(lengths))
        sizes = [len(message) for message in outgoing]
        dist.all_to_all_single(arrived, torch.cat(list(outgoing)), list(lengths), sizes, group=self._group)
        return list(arrived.split(list(lengths)))

    @cached_property
    def _group(self) -> Any:
        """All ranks of the mesh, in its order, which is that of their numbers: DTensors know no other."""
        if self.mesh.ndim == 1:
            return self.mesh.get_group(0)
        members = self.mesh.mesh.flatten().tolist()
        if len(members) == dist.get_world_size():
            return dist.group.WORLD
        return dist.new_group(members, use_local_synchronization=True)
