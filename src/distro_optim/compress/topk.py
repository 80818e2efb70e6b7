"""Which coefficients are sent, and what several senders' coefficients mean together."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .profile import Profile, profile_of

__all__ = ["contributor_mean", "contributor_weights", "select_topk"]

_MIN_SIZE_FOR_GROUPS: Final = 1024
"""Below this a row is so short that a second round costs more than it saves."""

_NOBODY: Final = 1e-30
"""Lost in rounding when 1 is added to it."""

_WIDTHS_TRIED: Final = 4096
"""A tile of huge prime sides has no fitting divisor; chosen so that finding out takes no time."""


def select_topk(
    coefficients: Tensor, k: int, *, scratch: Tensor, profile: Profile | None = None
) -> tuple[Tensor, Tensor]:
    """The ``k`` coefficients of largest magnitude in each row, in no particular order.

    Args:
        coefficients: ``(n, size)``.
        k: between 1 and ``size``.
        scratch: ``(n, size)``, overwritten.
        profile: how to work; by default as suits the device.

    Returns:
        index ``(n, k) int64`` and value ``(n, k)``, signed. Among equal magnitudes the choice is arbitrary.
    """
    index = _largest(torch.abs(coefficients, out=scratch), k, profile or profile_of(coefficients.device))
    return index, coefficients.gather(-1, index)


def _largest(magnitude: Tensor, k: int, profile: Profile) -> Tensor:
    """Positions ``(n, k) int64`` of the ``k`` largest elements in each row of ``(n, size)``, in no particular order."""
    size = magnitude.shape[1]
    if not profile.partition_topk:
        return torch.topk(magnitude, k, dim=1, sorted=False).indices
    if size < _MIN_SIZE_FOR_GROUPS:
        return _largest_of_short_rows(magnitude, k)
    width = _group_width(size, k)
    return _largest_of_groups(magnitude, k, width) if width else torch.topk(magnitude, k, dim=1, sorted=False).indices


def _largest_of_groups(magnitude: Tensor, k: int, width: int) -> Tensor:
    """The same choice in two rounds: the ``k`` of ``width`` groups with the largest maxima, then among their members.

    None of the ``k`` largest elements can lie in another group: there are ``k`` groups with a maximum as large.
    A group is a column of the row seen as ``(size / width, width)``, so that its maximum is a vectorised reduction.
    """
    n, size = magnitude.shape
    members = size // width
    grid = magnitude.view(n, members, width)
    groups = _largest_of_short_rows(grid.amax(1), k)
    candidates = grid.gather(2, groups.unsqueeze(1).expand(n, members, k)).view(n, members * k)
    chosen = _largest_of_short_rows(candidates, k)
    member = torch.div(chosen, k, rounding_mode="floor")
    return member * width + groups.gather(1, chosen - member * k)


def _largest_of_short_rows(rows: Tensor, k: int) -> Tensor:
    """The same choice by the ``k``-th largest of each row, which numpy finds with vector instructions: torch's topk
    moves pairs of value and position one by one, which takes three to five times as long on some hundred elements.
    """
    n, size = rows.shape
    values = rows.numpy()
    chosen = values >= np.partition(values, size - k, axis=1)[:, size - k : size - k + 1]
    flat = np.flatnonzero(chosen)
    if flat.size == n * k:
        position = flat.reshape(n, k) - _row_starts(n, size)
        if position.min() >= 0 and position.max() < size:
            return torch.from_numpy(position)
    # Some rows have equals at their bound, and so more than k chosen (tiles of zeros, say); or NaN, and so none.
    odd = np.count_nonzero(chosen, axis=1) != k
    chosen[odd] = False
    position = np.empty((n, k), dtype=np.int64)
    position[~odd] = np.nonzero(chosen)[1].reshape(-1, k)
    position[odd] = torch.topk(torch.from_numpy(values[odd]), k, dim=1, sorted=False).indices.numpy()
    return torch.from_numpy(position)


@lru_cache(maxsize=256)
def _row_starts(n: int, size: int) -> npt.NDArray[np.int64]:
    return np.arange(n, dtype=np.int64)[:, None] * size


@lru_cache(maxsize=1024)
def _group_width(size: int, k: int) -> int:
    """How many groups :func:`_largest_of_groups` should make, or 0 where one round is as fast.

    Both rounds have equally many elements to choose from with ``sqrt(size * k)`` groups.
    """
    wanted = math.isqrt(size * k)
    for width in range(wanted, min(size // 4, wanted + _WIDTHS_TRIED) + 1):
        if size % width == 0:
            return width
    return 0


def contributor_mean(
    index: Tensor,
    value: Tensor,
    weight: Tensor | None,
    *,
    out: Tensor,
    scratch: Tensor,
    parts: int,
    profile: Profile | None = None,
) -> Tensor:
    """Mean over contributors of each coefficient: over those who sent it, not over all.

    The sum and the count are exact for one-bit values, whatever the order of addition.

    Args:
        index: ``(n, m) int64``, ``m`` = the coefficients of all contributors side by side.
        value: ``(n, m)``.
        weight: ``(n, m)`` of 1 (counts) and 0 (absent), or None where all count.
        out, scratch: ``(n, size)``, overwritten.
        parts: number of contributors; each brings ``m / parts`` different positions.
        profile: how to work; by default as suits the device.

    Returns:
        ``out``: the means, 0 where nobody sent anything.
    """
    out.zero_()
    if parts == 1 and weight is None:
        return out.scatter_(1, index, value)
    _sum_and_count(index, value, weight, out, scratch, parts, profile or profile_of(out.device))
    return out.div_(scratch)


def contributor_weights(
    index: Tensor,
    value: Tensor,
    weight: Tensor | None,
    *,
    scratch: Tensor,
    scratch2: Tensor,
    parts: int,
    profile: Profile | None = None,
) -> Tensor:
    """Values ``(n, m)`` such that summing them per position gives :func:`contributor_mean`.

    Arguments are those of :func:`contributor_mean`; ``scratch`` and ``scratch2``, ``(n, size)``, are overwritten.
    """
    if parts == 1:
        return value if weight is None else value * weight
    _sum_and_count(index, value, weight, scratch.zero_(), scratch2, parts, profile or profile_of(scratch.device))
    count = scratch2.gather(1, index).clamp_(min=1)
    # A position named by c contributors occurs c times below: each occurrence carries 1/c of the mean. An absent
    # one carries nothing, so the others' share must not be cut by it.
    share = scratch.gather(1, index).div_(count).div_(count)
    return share if weight is None else share.mul_(weight)


def _sum_and_count(
    index: Tensor,
    value: Tensor,
    weight: Tensor | None,
    total: Tensor,
    count: Tensor,
    parts: int,
    profile: Profile,
) -> None:
    counted = torch.ones_like(value) if weight is None else weight
    weighted = value if weight is None else value * weight
    # Where nobody counts, the sum is 0: divided by next to nothing it stays 0.
    count.fill_(_NOBODY).scatter_add_(1, index, counted)
    if not profile.ordered_adds:
        total.scatter_add_(1, index, weighted)
        return
    # One contributor at a time there are no two adds to one
    # position, so that every peer gets the same bits.
    for i, v in zip(index.chunk(parts, 1), weighted.chunk(parts, 1), strict=True):
        total.scatter_add_(1, i, v)
