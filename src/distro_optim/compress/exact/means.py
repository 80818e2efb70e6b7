"""Coefficients of all contributors to integers: their means, position by position."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from ..profile import Profile
from .definition import SIGN_SCALE, VALUE_BITS, mean_of_signs

__all__ = ["Means", "means_of_signs", "means_of_values"]


@dataclass(frozen=True)
class Means:
    """Integer coefficients of ``n`` tiles.

    Attributes:
        index: ``(n, m) int64``, positions; one may occur several times.
        q: ``(n, m)`` of a float type that holds these integers exactly: the coefficient at each position.
        unique: no position occurs twice in a tile, but with a coefficient of 0.
        unit: ``(n, 1) int32``: a coefficient of 1 stands for ``2**unit``; None for ``1 / SIGN_SCALE``.
    """

    index: Tensor
    q: Tensor
    unique: bool
    unit: Tensor | None

    def rows(self, some: slice) -> Means:
        """Those of some tiles."""
        return Means(self.index[some], self.q[some], self.unique, None if self.unit is None else self.unit[some])

    def once(self, scratch: Tensor) -> Tensor:
        """``q`` with 0 at all but one of the occurrences of a position.

        Args:
            scratch: ``(n, size)`` of the type of ``q``, overwritten.
        """
        if self.unique:
            return self.q
        own = torch.arange(self.q.shape[1], dtype=self.q.dtype, device=self.q.device).expand(self.q.shape)
        # Which of several writes to one place stays is left open, and does not matter.
        scratch.scatter_(1, self.index, own)
        return torch.where(scratch.gather(1, self.index) == own, self.q, 0)


def means_of_signs(index: Tensor, sign: Tensor, weight: Tensor | None, *, parts: int, scratch: Tensor) -> Means:
    """Of signs.

    Args:
        index: ``(n, m) int64``, the positions of all contributors side by side.
        sign: ``(n, m) bool``, True is -1.
        weight: ``(n, m)`` of 1 and 0, or None: whose contributor says nothing has 0.
        parts: contributors, at most :data:`~.definition.MAX_CONTRIBUTORS`.
        scratch: ``(n, size)`` float32 or float64, overwritten.
    """
    value = sign.to(scratch.dtype)
    if parts == 1:
        value.mul_(-2 * SIGN_SCALE).add_(SIGN_SCALE)
        return Means(index, value if weight is None else value.mul_(weight), True, None)
    radix = _radix(parts)
    value.mul_(-2).add_(1 + radix)
    if weight is not None:
        value.mul_(weight)
    scratch.zero_().scatter_add_(1, index, value)  # at most 256 * 1025 = 2**18: exact in any order
    total = scratch.gather(1, index)
    table = _table(parts, scratch.dtype, scratch.device)
    q = table.index_select(0, total.view(-1).to(torch.int32)).view(total.shape)
    return Means(index, q, False, None)


def _radix(parts: int) -> int:
    """A position named ``c`` times with the sum ``s`` of signs is held as ``s + radix * c``: ``|s| <= parts``."""
    return 1 << (2 * parts).bit_length()


@lru_cache(maxsize=64)
def _table(parts: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    radix = _radix(parts)
    table = [0.0] * (parts * radix + parts + 1)
    for count in range(1, parts + 1):
        for total in range(-count, count + 1):
            table[total + radix * count] = float(mean_of_signs(total, count))
    return torch.tensor(table, dtype=dtype, device=device)


def means_of_values(
    index: Tensor,
    value: Tensor,
    weight: Tensor | None,
    *,
    parts: int,
    scratch: Tensor,
    profile: Profile,
    largest: Tensor | None = None,
) -> Means:
    """Of values; arguments as for :func:`means_of_signs`, but ``value`` is ``(n, m)`` float32 or float64.

    Args:
        scratch: ``(rows, size)``, overwritten: of as many tiles as are added up at a time.
        profile: how to work.
        largest: ``(n, 1)`` of the type of ``value``: the magnitude of which the unit is made; None is that of the tile.
    """
    if weight is not None:
        # Not by a product: what absent contributors hold is not looked at, and may be anything.
        value = torch.where(weight.to(torch.bool), value, 0)
    rounded, unit = _to_integers(value, largest, profile)
    if parts == 1:
        return Means(index, rounded.to(scratch.dtype), True, unit)
    total, count = _sum_and_count(index, rounded.to(scratch.dtype), weight, parts, scratch)
    return Means(index, _divided(total, count, profile), False, unit)


def _sum_and_count(
    index: Tensor, value: Tensor, weight: Tensor | None, parts: int, scratch: Tensor
) -> tuple[Tensor, Tensor]:
    """For each entry, the sum of all at its position, and their number, at least 1. Overwrites ``value``."""
    if parts > _TOGETHER:
        total = _sum_at(index, value, scratch)  # at most 2**20
        ones = torch.ones_like(total) if weight is None else weight
        return total, _sum_at(index, ones, scratch).clamp_(min=1)
    # Both in one number, sum + radix * count, below 2**24.
    radix = float(1 << (2 * parts << VALUE_BITS).bit_length())
    value.add_(radix if weight is None else weight * radix)
    both = _sum_at(index, value, scratch)
    count = both.mul(1 / radix).add_(0.5).floor_()
    return both.sub_(count, alpha=radix), count.clamp_(min=1)


def _sum_at(index: Tensor, value: Tensor, scratch: Tensor) -> Tensor:
    """For each entry, the sum of all at its position: integers, which no order of additions changes."""
    n, rows = len(index), len(scratch)
    if n <= rows:
        return scratch[:n].zero_().scatter_add_(1, index, value).gather(1, index)
    total = torch.empty_like(value)
    for start in range(0, n, rows):
        some = slice(start, start + rows)
        room = scratch[: len(index[some])].zero_().scatter_add_(1, index[some], value[some])
        torch.gather(room, 1, index[some], out=total[some])
    return total


_TOGETHER: Final = 31
"""Contributors up to which a sum of values and a count fit into the 24 bits of a float32 together."""


def _to_integers(value: Tensor, at_most: Tensor | None, profile: Profile) -> tuple[Tensor, Tensor]:
    """``(n, m)`` values to integers of at most ``2**VALUE_BITS``, in units ``2**unit`` that the tile shares.

    Multiplying with powers of two is exact for all that does not round to 0, and so is what the rounding is made of.
    Only the largest value of a tile is taken apart by its bits. Values below the normal numbers count as 0, and so does
    not matter whether a device flushes them.
    """
    double = value.dtype == torch.float64
    fraction, bias, integer = (52, 1023, torch.int64) if double else (23, 127, torch.int32)
    magnitude = value.abs()
    most = magnitude.amax(1, keepdim=True) if at_most is None else at_most
    largest = most.view(integer) >> fraction
    power = bias + VALUE_BITS - 1 - largest
    half = power >> 1  # in two steps: 2**power itself may be too large
    scaled = (
        magnitude
        * ((half + bias) << fraction).view(value.dtype)
        * ((power - half + bias) << fraction).view(value.dtype)
    )
    if not profile.keeps_subnormals or bool((largest <= VALUE_BITS + 1).any()):
        scaled.masked_fill_(magnitude < torch.finfo(value.dtype).tiny, 0)
    whole = scaled.floor()
    rounded = whole.add_(scaled.sub_(whole) >= 0.5)
    return torch.copysign(rounded, value), (-power).to(torch.int32)


def _divided(total: Tensor, count: Tensor, profile: Profile) -> Tensor:
    """``total / count``, rounded to the nearest integer, halves away from zero; both hold integers.

    A quotient of floats may be off by a little, on devices that divide approximately; so it is only taken for a guess,
    and corrected by what is left. All numbers are integers below ``2**24``.
    """
    numerator = total.abs().mul_(2).add_(count)
    denominator = count * 2
    guess = (numerator / denominator).floor_()
    if profile.exact_quotients:  # what is below an integer is not rounded up to it
        return torch.where(total < 0, -guess, guess)
    left = numerator - guess * denominator
    guess.sub_((left < 0).to(guess.dtype)).add_((left >= denominator).to(guess.dtype))
    return torch.where(total < 0, -guess, guess)
