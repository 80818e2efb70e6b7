"""A queue of things to do later, without a clock."""

from __future__ import annotations

import heapq
from itertools import count
from typing import Generic, TypeVar

__all__ = ["TimerQueue"]

T = TypeVar("T")


class TimerQueue(Generic[T]):
    """Items with deadlines in seconds. Items with equal deadlines come out in the order they went in."""

    __slots__ = ("_heap", "_order")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []
        self._order = count()

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, deadline: float, item: T) -> None:
        """Has ``item`` come up at ``deadline``, in seconds of the caller's clock."""
        heapq.heappush(self._heap, (deadline, next(self._order), item))

    def next_deadline(self) -> float | None:
        """The earliest deadline, or None if nothing waits."""
        return self._heap[0][0] if self._heap else None

    def pop_due(self, now: float) -> T | None:
        """The earliest item if its deadline is not after ``now``, else None."""
        if self._heap and self._heap[0][0] <= now:
            return heapq.heappop(self._heap)[2]
        return None
