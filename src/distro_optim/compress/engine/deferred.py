"""An update of which the device knows sooner than the host what it speaks of."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from ..plan import TilePlan
from ..update import CompressedUpdate

__all__ = ["DeferredUpdate"]


class DeferredUpdate(CompressedUpdate):
    """A contribution on the devices of its plan, of which nobody has asked yet which tensors are present.

    Whoever reads ``present`` waits for the device, once. Engines that made the update read ``flags`` instead, on the
    device. For the thread that trains alone: others get what
    :meth:`~distro_optim.compress.engine.Engine.download` makes of it, in which all is said.

    Args:
        plan, index, value: as for the base class.
        given: of each tensor, whether it can be present at all.
        flags: by batch ``(tensors,)`` int32, on its device: not 0 for tensors of the batch that are present.
    """

    given: tuple[bool, ...]
    flags: dict[int, Tensor]

    def __init__(
        self,
        plan: TilePlan,
        index: tuple[Tensor, ...],
        value: tuple[Tensor, ...],
        given: tuple[bool, ...],
        flags: Mapping[int, Tensor],
    ) -> None:
        settled: dict[str, Any] = {"plan": plan, "index": index, "value": value, "given": given, "flags": dict(flags)}
        for name, of_it in settled.items():
            object.__setattr__(self, name, of_it)

    @cached_property
    @override
    def present(self) -> tuple[bool, ...]:
        """For each tensor, whether the peer says anything about it. Waits for the device when it is first read."""
        present = list(self.given)
        if self.flags:
            first = next(iter(self.flags.values())).device
            rows = torch.stack([flags.to(first) for flags in self.flags.values()]).tolist()
            for number, row in zip(self.flags, rows, strict=True):
                for tensor in self.plan.batches[number].ranges:
                    present[tensor] = present[tensor] and bool(row[tensor])
        return tuple(present)
