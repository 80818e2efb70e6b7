"""Bytes and bytes per second, over a sliding window. No I/O, no clock."""

from __future__ import annotations

from collections import deque
from typing import Final

from ..errors import ConfigurationError

__all__ = ["RateMeter"]

_WINDOW_SECONDS: Final = 15.0
"""Psyche's connection monitor measures bandwidth over 15 s (``shared/network/src/connection_monitor.rs``)."""

_STEPS: Final = 15
"""The window moves in steps of a fifteenth; so many numbers are held, however many bytes are counted."""


class RateMeter:
    """Counts bytes.

    Args:
        window: seconds over which :meth:`rate` is the mean.

    Attributes:
        total: bytes counted since the beginning.
    """

    __slots__ = ("_began", "_steps", "_width", "_window", "total")

    def __init__(self, window: float = _WINDOW_SECONDS) -> None:
        if window <= 0:
            raise ConfigurationError(f"window must be positive, got {window}", name="window", value=window)
        self.total = 0
        self._window = window
        self._width = window / _STEPS
        self._began: float | None = None
        # (step number, bytes in it), oldest first
        self._steps: deque[tuple[int, int]] = deque(maxlen=_STEPS + 1)

    def add(self, count: int, now: float) -> None:
        """Counts ``count`` bytes at ``now``, which never goes back."""
        if self._began is None:
            self._began = now
        self.total += count
        step = int(now / self._width)
        if self._steps and self._steps[-1][0] == step:
            self._steps[-1] = (step, self._steps[-1][1] + count)
        else:
            self._steps.append((step, count))

    def rate(self, now: float) -> float:
        """Bytes a second over the window that ends at ``now``, or since the first byte if that is later."""
        if self._began is None:
            return 0.0
        oldest = int((now - self._window) / self._width)
        while self._steps and self._steps[0][0] <= oldest:
            self._steps.popleft()
        # Not less than one step: a first packet a microsecond ago is not gigabytes a second.
        seconds = max(self._width, min(self._window, now - self._began))
        return sum(count for _, count in self._steps) / seconds
