"""A clock that notices when its process slept: a laptop whose lid was closed, a process that was stopped. No I/O.

To the others a server that sleeps is silent, and so are they to it: when it wakes, every deadline is long over, and
every client seems to be gone. But nobody was late except for the server.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

__all__ = ["SLEEP_SECONDS", "WatchedClock"]

SLEEP_SECONDS: Final = 5.0
"""A server looks at its clock with each tick, twice a second. One that did not for so long was not running, or its
event loop was not, which is the same to its clients. Chosen arbitrarily."""


class WatchedClock:
    """Gives the time of ``clock``.

    Args:
        clock: monotonic seconds.
        on_wake: called at the first look after a sleep, with the time and the seconds slept, before that look returns.
    """

    def __init__(self, clock: Callable[[], float], on_wake: Callable[[float, float], None]) -> None:
        self._clock = clock
        self._on_wake = on_wake
        self._last = clock()

    def __call__(self) -> float:
        """Seconds."""
        last, self._last = self._last, self._clock()
        if self._last - last > SLEEP_SECONDS:
            self._on_wake(self._last, self._last - last)
        return self._last
