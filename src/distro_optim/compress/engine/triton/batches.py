"""One batch of a plan by the kernels: its tables, and the two halves of a step without a look at the device.

Nothing here waits for the device or copies from it, and what is copied to it is copied only where it has changed: from
the second step on, with gradients and updates in the same memory, a step can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from ...extraction import OwnPart
from ...merging import Ahead
from ...plan import Batch
from ...update import CompressedUpdate
from . import launching
from .launching import Extracting, Merging
from .tables import Column, Tables, padded_side, places_of

__all__ = ["KernelBatch", "on_device"]

_KEPT: Final = 64
"""Small tensors on the device that are not copied again where they are needed again."""


def on_device(rows: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor made in main memory, on its way to the device: the program does not wait for it."""
    host = torch.tensor(rows, dtype=dtype, device="cpu")
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


class KernelBatch:
    """One batch, which the kernels are for.

    Args:
        number: of the batch in the plan.
        batch: itself.
        tensors: of the model.
    """

    def __init__(self, number: int, batch: Batch, tensors: int) -> None:
        self.number = number
        self.batch = batch
        self.tensors = tensors
        self._extracting, self._merging, self._checking = (Tables(batch, tensors) for _ in range(3))
        self._places = places_of(batch)
        self._constants: dict[tuple[object, ...], Tensor] = {}
        self._nothing = torch.zeros(1, dtype=torch.uint8, device=batch.device)
        self._left: Tensor | None = None
        self._codes: Tensor | None = None

    def _constant(self, rows: Sequence[int] | Sequence[float], dtype: torch.dtype) -> Tensor:
        key = (dtype, *rows)
        if key not in self._constants:
            if len(self._constants) >= _KEPT:
                self._constants.clear()
            self._constants[key] = on_device(rows, dtype, self.batch.device)
        return self._constants[key]

    def flags(self, present: Sequence[Sequence[bool]]) -> Tensor:
        """``(contributors, tensors)`` int32 on the device; not to be written to."""
        rows = [int(flag) for one in present for flag in one]
        return self._constant(rows, torch.int32).view(len(present), self.tensors)

    @property
    def codes(self) -> Tensor:
        """Room for the signs of the momentum, in 2 bits each."""
        if self._codes is None:
            size = padded_side(self.batch.h) * padded_side(self.batch.w) // 4
            self._codes = torch.zeros(self.batch.tiles, size, dtype=torch.uint8, device=self.batch.device)
        return self._codes

    def check(self, grads: Sequence[Tensor | None], present: Tensor) -> None:
        """Takes tensors out of ``present``, ``(tensors,)`` int32, whose gradients are not finite."""
        addresses, aligned = self._checking.addresses({Column.GRAD: grads})
        launching.check(
            self.batch,
            self._type_of_gradients(grads),
            places=self._places,
            addresses=addresses,
            aligned=aligned,
            present=present,
        )

    def _type_of_gradients(self, grads: Sequence[Tensor | None]) -> torch.dtype:
        kinds = {grad.dtype for n in self.batch.ranges if (grad := grads[n]) is not None}
        return kinds.pop() if len(kinds) == 1 else self.batch.value_dtype

    def of_one_type(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients, contiguous, and all of this batch of one type: float32 where they are of several."""
        kinds = {grad.dtype for n in self.batch.ranges if (grad := grads[n]) is not None}
        usual = len(kinds) <= 1 and kinds <= {torch.float32, torch.bfloat16, torch.float16}
        taken: list[Tensor | None] = list(grads)
        for n in self.batch.ranges:
            grad = grads[n]
            if grad is not None:
                taken[n] = (grad if usual else grad.to(torch.float32)).contiguous()
        return taken

    def extract(
        self,
        grads: Sequence[Tensor | None],
        momenta: Sequence[Tensor],
        own: Sequence[OwnPart] | None,
        *,
        as_coefficients: bool,
        rate: float,
        keep: float,
        present: Tensor,
        index: Tensor,
        value: Tensor,
        spoken: Tensor,
        scale: Tensor | None = None,
        precision: str = "split",
        tiles: tuple[int, int] | None = None,
    ) -> None:
        """The first half of a step.

        Args:
            grads: of the model, as :meth:`of_one_type` gives them.
            momenta, own, as_coefficients, rate, keep: as in :class:`~distro_optim.compress.extraction.Extraction`.
            present: ``(tensors,)`` int32: 0 for gradients that are left out.
            index, value: ``(tiles, k)``, filled.
            spoken: ``(tensors,)`` int32, becomes 1 where anything is said.
            scale: 0-D float32: what ``rate`` is divided by, on the device.
            precision: of the transform.
            tiles: the first and the one after the last; by default all.
        """
        batch = self.batch
        columns: dict[Column, Sequence[Tensor | None]] = {Column.GRAD: grads, Column.MOMENTUM: momenta}
        if own is not None:
            columns |= {Column.OWN_INDEX: [o.index for o in own], Column.OWN_VALUE: [o.value for o in own]}
        elif not as_coefficients and self._left is None:
            self._left = torch.empty(
                batch.tiles, 1 << (max(batch.k, 16) - 1).bit_length(), dtype=torch.float32, device=batch.device
            )
        addresses, aligned = self._extracting.addresses(columns)
        first, last = tiles or (0, batch.tiles)
        numbers = self._constant([rate, keep], torch.float32)
        if scale is not None:
            numbers = numbers / torch.cat([scale.reshape(1), self._constant([1.0], torch.float32)])
        launching.extract(
            batch,
            Extracting(
                own=own is not None,
                as_coefficients=as_coefficients,
                signs=value.dtype == torch.bool,
                grad=self._type_of_gradients(grads),
                precision=precision,
            ),
            first=first,
            tiles=last - first,
            places=self._places,
            addresses=addresses,
            aligned=aligned,
            present=present,
            index=index,
            value=value,
            left=self._nothing if self._left is None else self._left,
            spoken=spoken,
            codes=self.codes if own is not None else self._nothing,
            numbers=numbers,
        )

    def merge(
        self,
        updates: Sequence[CompressedUpdate],
        present: Tensor,
        weights: Sequence[Tensor],
        rate: float,
        *,
        ahead: Ahead | None = None,
        tiles: tuple[int, int] | None = None,
    ) -> None:
        """The second half of a step.

        Args:
            updates: on the device, all with signs or all with values of one type.
            present: ``(contributors, tensors)`` int32.
            weights: of the model, contiguous; changed in place.
            rate: of learning, with its gain.
            ahead: by the momentum that :meth:`extract` left last, with ``own``.
            tiles: the first and the one after the last; by default all.
        """
        batch, number = self.batch, self.number
        columns: dict[Column, Sequence[Tensor | None]] = {Column.WEIGHT: weights}
        if ahead is not None:
            columns[Column.SHIFTED] = ahead.shifted
        addresses, aligned = self._merging.addresses(columns)
        first, last = tiles or (0, batch.tiles)
        said = [address for u in updates for address in (u.index[number].data_ptr(), u.value[number].data_ptr())]
        launching.merge(
            batch,
            Merging(updates[0].value[number].dtype, ahead is not None),
            first=first,
            tiles=last - first,
            places=self._places,
            addresses=addresses,
            aligned=aligned,
            said=self._constant(said, torch.int64),
            present=present,
            codes=self._nothing if ahead is None else self.codes,
            numbers=self._constant([rate, ahead.lr[batch.group] if ahead is not None else 0.0], torch.float32),
        )
