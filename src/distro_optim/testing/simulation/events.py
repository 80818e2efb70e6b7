"""Virtual time: what happens, in its order."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

__all__ = ["EventQueue"]


class EventQueue:
    """Things that are to happen. What is due at the same time happens in the order in which it was put in.

    Attributes:
        now: seconds since the beginning.
        count: of events that have happened.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.count = 0
        self._entries: list[tuple[float, int, Callable[[], object]]] = []
        self._number = 0

    def after(self, seconds: float, what: Callable[[], object]) -> None:
        """``what`` is called so much later; at once, but after what goes on now, if that is 0 or below."""
        self.at(self.now + seconds, what)

    def at(self, time: float, what: Callable[[], object]) -> None:
        """``what`` is called at that time, or now if it is over."""
        self._number += 1
        heapq.heappush(self._entries, (max(time, self.now), self._number, what))

    def series(self, times: Sequence[float], what: Callable[[int], object]) -> None:
        """``what`` is called at each of ``times``, which ascend, with its place among them.

        Only the next of them waits among all other events: what goes to hundreds would make every event slower.
        """
        places = iter(range(len(times)))

        def happen() -> None:
            place = next(places)
            if place + 1 < len(times):
                self.at(times[place + 1], happen)
            what(place)

        if times:
            self.at(times[0], happen)

    def step(self) -> bool:
        """The next event happens; False if there is none."""
        if not self._entries:
            return False
        self.now, _, what = heapq.heappop(self._entries)
        self.count += 1
        what()
        return True
