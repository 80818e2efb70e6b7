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
        named: the scratch memory, ``(n, size)`` of the type of ``q``, where it was left with 0 at all positions that
            are not in ``index``; otherwise None.
    """

    index: Tensor
    q: Tensor
    unique: bool
    unit: Tensor | None
    named: Tensor | None = None

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
        return scratch.gather(1, self.index).eq_(own).mul_(self.q)


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
    return Means(index, q, False, None, scratch)


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
        value = value.masked_fill(weight == 0, 0)
    rounded, unit = _to_integers(value, largest, profile)
    rounded = rounded.to(scratch.dtype)
    if parts == 1:
        return Means(index, rounded, True, unit)
    total, count = _sum_and_count(index, rounded, weight, parts, scratch)
    return Means(index, _divided(total, count, profile), False, unit, _named(index, scratch))


def _named(index: Tensor, scratch: Tensor) -> Tensor | None:
    """``scratch``, after sums were taken there, if of all tiles at once: it is 0 but at the positions ``index``."""
    return scratch if len(index) == len(scratch) else None


def _sum_and_count(
    index: Tensor, value: Tensor, weight: Tensor | None, parts: int, scratch: Tensor
) -> tuple[Tensor, Tensor]:
    """For each entry, the sum of all at its position, and their number, at least 1. Overwrites ``value``."""
    if parts > _TOGETHER:
        total = _sum_at(index, value, scratch)  # at most 2**20
        ones = torch.ones_like(total) if weight is None else weight
        return total, _sum_at(index, ones, scratch).clamp_(min=1)
    # Both in one number, sum + radix * count, below 2**24: the sum is at most a quarter of radix.
    radix = float(1 << (2 * parts << VALUE_BITS).bit_length())
    value.add_(radix if weight is None else weight * radix)
    both = _sum_at(index, value, scratch)
    count = both.mul(1 / radix).round_()
    total = both.sub_(count, alpha=radix)
    return total, count if weight is None else count.clamp_(min=1)


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

    Multiplying with powers of two is exact for all that does not round to 0. Only the largest value of a tile is taken
    apart by its bits. Values below the normal numbers count as 0, and so does not matter whether a device flushes them.
    """
    double = value.dtype == torch.float64
    fraction, bias, integer = (52, 1023, torch.int64) if double else (23, 127, torch.int32)
    most = value.abs().amax(1, keepdim=True) if at_most is None else at_most
    largest = most.view(integer) >> fraction
    power = bias + VALUE_BITS - 1 - largest
    if profile.keeps_subnormals and int(largest.min()) > VALUE_BITS + 1:
        # 2**power is a normal number, and what is below the normal numbers becomes less than a half.
        scaled = value * ((power + bias) << fraction).view(value.dtype)
    else:
        half = power >> 1  # in two steps: 2**power itself may be too large
        scaled = (
            value
            * ((half + bias) << fraction).view(value.dtype)
            * ((power - half + bias) << fraction).view(value.dtype)
        )
        scaled.masked_fill_(value.abs() < torch.finfo(value.dtype).tiny, 0)
    return _rounded(scaled, fraction), -power.to(torch.int32)


def _rounded(x: Tensor, fraction: int) -> Tensor:
    """``x`` to the nearest integers, halves away from zero, in place; for magnitudes of at most ``2**VALUE_BITS``.

    What is added before the fraction is cut off is the largest number below a half, with the sign of ``x``. Let ``x``
    be positive, and ``k`` its integer part. From ``k + 1/2`` on the sum is at least ``k + 1 - 2**-(fraction + 2)``,
    which rounds to ``k + 1`` (for ``k = 0`` it is a tie, and goes to 1, which is even). For any smaller ``x`` the sum
    is below ``k + 1`` by at least one unit in the last place of the numbers there, and stays below.
    The sign times that number is exact, so that fused operations give the same.
    """
    return x.add_(x.sign(), alpha=0.5 - 2.0 ** -(fraction + 2)).trunc_()


def _divided(total: Tensor, count: Tensor, profile: Profile) -> Tensor:
    """``total / count``, rounded to the nearest integer, halves away from zero; both hold integers. Overwrites both.

    ``count`` is at most 256, and the quotient at most ``2**VALUE_BITS``. So a quotient that is not a half of an odd
    number is away from each such half by ``2**-9`` or more. Making it larger by ``2**-22``, and two roundings, move it
    by less than ``1.5 * 2**-10``; but a tie, which was exact, is beyond the half then.
    """
    if profile.exact_quotients:
        return total.div_(count).mul_(1 + 2.0**-22).round_()
    # A quotient of floats may be off by a little, on devices that divide approximately; so it is only taken for a
    # guess, and corrected by what is left. All numbers are integers below 2**24.
    numerator = total.abs().mul_(2).add_(count)
    denominator = count * 2
    guess = (numerator / denominator).floor_()
    left = numerator - guess * denominator
    guess.sub_((left < 0).to(guess.dtype)).add_((left >= denominator).to(guess.dtype))
    return torch.where(total < 0, -guess, guess)
