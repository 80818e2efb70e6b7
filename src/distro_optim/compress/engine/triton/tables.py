"""What the kernels are told about a batch: where its tiles and tensors lie, and the bases, as tensors on the device."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from ...dct import dct_basis
from ...exact.definition import integer_basis
from ...plan import PLACE_COLUMNS, Batch
from .bounds import LONGEST_SIDE, MAX_TOPK

__all__ = ["COLUMNS", "Column", "Tables", "encoding_basis", "fits", "integer_digits", "padded_side", "places_of"]

COLUMNS: Final = 8
"""Of a table of addresses: a power of two."""

SHORTEST: Final = 32
"""Side of what a program holds of a tile: tensor cores take products of 8-bit integers with inner sides from 32 on."""

_ALIGNED: Final = 16
"""Bytes of an address, and elements of offsets and strides: what a GPU loads or stores in one instruction."""

_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


class Column(enum.IntEnum):
    """Of a table of addresses."""

    GRAD = 0
    MOMENTUM = 1
    OWN_INDEX = 2
    OWN_VALUE = 3
    WEIGHT = 4
    SHIFTED = 5


def padded_side(n: int) -> int:
    """A power of two, not less than ``n`` and :data:`SHORTEST`."""
    return max(SHORTEST, 1 << (n - 1).bit_length())


def fits(batch: Batch) -> bool:
    """Whether the kernels are for tiles and tensors of this kind."""
    return max(batch.h, batch.w) <= LONGEST_SIDE and batch.k <= MAX_TOPK and batch.value_dtype in _DTYPES


def places_of(batch: Batch) -> Tensor:
    """:attr:`Batch.places` on the device, ``(tiles, 6)`` int64."""
    return torch.from_numpy(batch.places).to(batch.device)


@lru_cache(maxsize=64)
def encoding_basis(n: int, device: torch.device, dtype: torch.dtype, *, whole: bool = False) -> Tensor:
    """The DCT's basis in two parts, ``(2, B, B)``: row = position, column = frequency, 0 beyond ``n``.

    Args:
        n: side of a tile.
        device: of the answer.
        dtype: bfloat16, or float32 for the same numbers.
        whole: the first part is the basis in float32, the second 0.
    """
    side = padded_side(n)
    parts = torch.zeros(2, side, side, dtype=torch.float32, device="cpu")
    basis = dct_basis(n, torch.float64, torch.device("cpu"))
    parts[0, :n, :n] = basis if whole else basis.to(torch.bfloat16)
    if not whole:
        parts[1, :n, :n] = (basis - parts[0, :n, :n].double()).to(torch.bfloat16)
    return parts.to(device=device, dtype=dtype)


@lru_cache(maxsize=64)
def integer_digits(n: int, device: torch.device) -> Tensor:
    """``B_n`` in digits of base 256 between -128 and 127, ``(2, B, B)`` int8, lower first, 0 beyond ``n``."""
    side = padded_side(n)
    basis = torch.zeros(side, side, dtype=torch.int32, device="cpu")
    basis[:n, :n] = torch.tensor(integer_basis(n).tolist(), dtype=torch.int32, device="cpu")
    low = ((basis + 128) & 255) - 128
    return torch.stack([low, (basis - low) >> 8]).to(torch.int8).to(device)


@dataclass
class Tables:
    """A table of addresses of a batch, on the device, that is made again where tensors have moved.

    Attributes:
        batch: of the plan.
        tensors: how many the model has.
    """

    batch: Batch
    tensors: int

    def __post_init__(self) -> None:
        # All tiles begin, and all their rows, where whole vectors can be loaded.
        self._even = not (self.batch.places[:, 1:3] % _ALIGNED).any()
        self._known: list[int] = []
        self._on_device: Tensor | None = None
        self._aligned = False

    def addresses(self, columns: dict[Column, Sequence[Tensor | None]]) -> tuple[Tensor, bool]:
        """``(tensors, 8)`` int64, and whether whole vectors can be loaded.

        Args:
            columns: tensors of the model by number; those of other batches are not looked at.
        """
        rows = [0] * (self.tensors * COLUMNS)
        for column, tensors in columns.items():
            for number in self.batch.ranges:
                tensor = tensors[number]
                rows[number * COLUMNS + column] = 0 if tensor is None else tensor.data_ptr()
        if rows != self._known or self._on_device is None:
            self._known = rows
            host = torch.tensor(rows, dtype=torch.int64, device="cpu").view(self.tensors, COLUMNS)
            self._on_device = host.to(self.batch.device, non_blocking=True)
            walked = (Column.GRAD, Column.MOMENTUM, Column.WEIGHT, Column.SHIFTED)
            self._aligned = self._even and not any(
                rows[number * COLUMNS + column] % _ALIGNED for number in self.batch.ranges for column in walked
            )
        return self._on_device, self._aligned


assert PLACE_COLUMNS == 6  # the kernels count on it
