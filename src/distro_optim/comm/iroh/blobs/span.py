"""A whole span of a response, 1 MiB of data, taken apart at once.

Most of what a getter reads is complete subtrees of 64 chunk groups. Their items, 63 hash pairs and 64 groups of data,
always lie in the same places, so a table of places replaces the walk. Item by item, :mod:`.decoder` spends more time
in the interpreter than in hashing, and beside a thread that computes in Python all of that time counts twice.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from .prefix import SPAN_LEN
from .ranges import ALL
from .tree import GROUP_LEN, HASH_LEN, PAIR_LEN
from .walk import Parent, walk

__all__ = ["SPAN_PAIRS", "SPAN_WIRE_LEN", "expected_in_span", "split_span"]

SPAN_PAIRS: Final = SPAN_LEN // GROUP_LEN - 1
"""Hash pairs of a span."""

SPAN_WIRE_LEN: Final = SPAN_LEN + SPAN_PAIRS * PAIR_LEN
"""Bytes of a span in a response, from the pair of its top node on."""


def _places() -> tuple[list[slice], list[slice], list[int]]:
    """Where the pairs are and where the data; and for each pair but the first, which half of a pair vouches for it."""
    pairs: list[slice] = []
    data: list[slice] = []
    halves: list[int] = []
    # The halves that vouch for the nodes to come; the last one comes next.
    waiting: list[int] = []
    at = 0
    for item in walk(SPAN_LEN, ALL):
        half = waiting.pop() if waiting else None
        if isinstance(item, Parent):
            if half is not None:
                halves.append(half)
            waiting += (2 * len(pairs) + 1, 2 * len(pairs))
            pairs.append(slice(at, at + PAIR_LEN))
            at += PAIR_LEN
        else:
            data.append(slice(at, at + item.size))
            at += item.size
    return pairs, data, halves


_PAIRS, _DATA, _halves = _places()
_HALVES: Final = np.array(_halves)


def split_span(view: memoryview) -> tuple[bytes, bytes]:
    """The pairs in pre-order and the data of a span, from its :data:`SPAN_WIRE_LEN` bytes in a response.

    The data comes in one piece although that is a copy: the hasher lets go of the interpreter lock for each buffer it
    is given, and beside a thread that computes in Python it waits for the lock after each.
    """
    return b"".join([view[place] for place in _PAIRS]), b"".join([view[place] for place in _DATA])


def expected_in_span(pairs: bytes) -> bytes:
    """The CVs that all pairs but the first must have, by what the pairs above them say."""
    return bytes(np.frombuffer(pairs, np.uint8).reshape(-1, HASH_LEN)[_HALVES].tobytes())
