"""Virtual time: what happens, in its order."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["EventQueue"]


class _Series:
    """The same with one after the other, each at its time."""

    __slots__ = ("_place", "times", "what", "whom")

    def __init__(self, times: Sequence[float], what: Callable[[Any], object], whom: Sequence[Any]) -> None:
        self.times = times
        self.what = what
        self.whom = whom
        self._place = 0

    def pop(self) -> tuple[Any, float | None]:
        """With whom it happens now, and when it happens next; None if that was the last."""
        place = self._place
        self._place = place + 1
        return self.whom[place], self.times[place + 1] if place + 1 < len(self.times) else None


class EventQueue:
    """Things that are to happen. What is due at the same time happens in the order in which it was put in.

    Attributes:
        now: seconds since the beginning.
        count: of events that have happened.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.count = 0
        self._entries: list[tuple[float, int, Callable[[], object] | _Series]] = []
        self._number = 0
        self._stopped = False

    def after(self, seconds: float, what: Callable[[], object]) -> None:
        """``what`` is called so much later; at once, but after what goes on now, if that is 0 or below."""
        self.at(self.now + seconds, what)

    def at(self, time: float, what: Callable[[], object]) -> None:
        """``what`` is called at that time, or now if it is over."""
        self._put(time, what)

    def series(self, times: Sequence[float], what: Callable[[Any], object], whom: Sequence[Any]) -> None:
        """``what`` is called with each of ``whom`` at its time of ``times``, which ascend from now on.

        Only the next of them waits among all other events: what goes to hundreds would make every event slower.
        """
        if times:
            self._put(times[0], _Series(times, what, whom))

    def stop(self) -> None:
        """Nothing happens any more after what goes on now."""
        self._stopped = True

    def run(self) -> None:
        """Everything happens, until :meth:`stop` is called or nothing is left."""
        entries = self._entries
        while entries and not self._stopped:
            self.now, number, what = entries[0]
            self.count += 1
            if type(what) is _Series:
                whom, following = what.pop()
                if following is None:
                    heapq.heappop(entries)
                else:
                    self._number = number = self._number + 1
                    heapq.heapreplace(entries, (following, number, what))
                what.what(whom)
            else:
                heapq.heappop(entries)
                what()  # type: ignore[operator]

    def _put(self, time: float, what: Callable[[], object] | _Series) -> None:
        self._number += 1
        heapq.heappush(self._entries, (max(time, self.now), self._number, what))
