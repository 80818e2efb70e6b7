"""Where tiles lie in the memory of their tensor: what is needed next."""

from __future__ import annotations

from typing import Final

import numpy as np

from .caching import compiled

__all__ = ["ahead_of"]

_FAR: Final = 2048
"""Columns of a tensor: up to here 64 rows of it, twice, leave room in a cache of the second level."""


@compiled
def ahead_of(places, t, height, width):  # type: ignore[no-untyped-def]
    """Bytes from the start of tile ``t``'s tensor to what it should ask for, as much as there is in a tile.

    Tiles side by side share their rows, each a piece of every row: memory is quickest if it is read row by row. So
    together they ask for the rows of the tiles below them, each for its share, one after the other. Where rows are long
    that would be too far ahead, and each asks for the tile after it alone, though not all of it.

    Args:
        places: see :mod:`~distro_optim.compress.fast.momentum`.
        t: a row of it.
        height, width: of a tile.
    """
    stride = places[t, 2]
    beside = (stride + width - 1) // width if stride <= _FAR else np.int64(1)
    return 4 * height * width * (places[t, 5] + beside)
