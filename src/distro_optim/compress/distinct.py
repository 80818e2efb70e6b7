"""Is a position named twice in a tile? The same exact answer by two ways, of which each is the faster one somewhere."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["has_repeats"]

_PAIRWISE_LIMIT: Final = 16
"""Up to so many positions a row, comparing all pairs is faster than sorting (measured for 1, 2 and 4 bytes each)."""

_BLOCK_ELEMENTS: Final = 1 << 18
"""Elements that are compared at a time: they, and a byte for each, stay in a CPU's cache."""


_SMALL_ELEMENTS: Final = 1 << 14
"""Up to so many elements all pairs are looked at together: in fewer steps of numpy, each of which costs as much."""


def has_repeats(rows: npt.NDArray[Any]) -> bool:
    """Whether a row of ``rows``, ``(n, k)`` of an integer type, holds a number twice."""
    if rows.shape[1] > _PAIRWISE_LIMIT:
        ordered = np.sort(rows, axis=1)
        return bool((ordered[:, 1:] == ordered[:, :-1]).any())
    if rows.size <= _SMALL_ELEMENTS:
        return _has_equal_pair_at_once(rows)
    step = max(1, _BLOCK_ELEMENTS // max(1, rows.shape[1]))
    return any(_has_equal_pair(rows[start : start + step]) for start in range(0, len(rows), step))


def _has_equal_pair_at_once(rows: npt.NDArray[Any]) -> bool:
    """Each column beside the next ones, round a circle: half way round, every two have met."""
    count, width = rows.shape
    half = width // 2
    circle = np.empty((width + half, count), dtype=rows.dtype)
    circle[:width] = rows.T
    circle[width:] = circle[:half]
    equal = np.empty((half, width, count), dtype=np.bool_)
    for shift in range(1, half + 1):
        np.equal(circle[:width], circle[shift : shift + width], out=equal[shift - 1])
    return bool(equal.any())


def _has_equal_pair(rows: npt.NDArray[Any]) -> bool:
    """Column by column, because comparing long runs of memory is what vector units are good at."""
    columns = np.ascontiguousarray(rows.T)
    return any(bool((columns[shift:] == columns[:-shift]).any()) for shift in range(1, len(columns)))
