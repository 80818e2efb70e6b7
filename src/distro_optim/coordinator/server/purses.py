"""Seconds that may be waited for somebody: taken out as they are used, and filled up as time goes by. No clock."""

from __future__ import annotations

from typing import Final

__all__ = ["SHARE", "Purse"]

SHARE: Final = 0.1
"""Of the time that goes by is added to a purse. Chosen so that nine tenths of the rounds remain."""

MOST_SECONDS: Final = 60.0
"""A purse holds no more. Chosen arbitrarily."""


class Purse:
    """Some of them; see the module.

    Args:
        seconds: it holds at first.
        now: in seconds.
        share: of the time that goes by that it gains.
        most: seconds that it holds at most.
    """

    __slots__ = ("_at", "_most", "_seconds", "_share", "first")

    def __init__(self, seconds: float, now: float, share: float = SHARE, most: float = MOST_SECONDS) -> None:
        self.first = seconds
        self._seconds = seconds
        self._share = share
        self._most = most
        self._at = now

    def left(self, now: float) -> float:
        """Seconds in it; below 0 if more was taken than was there."""
        self._seconds = min(self._most, self._seconds + max(0.0, now - self._at) * self._share)
        self._at = max(self._at, now)
        return self._seconds

    def take(self, seconds: float, now: float) -> None:
        """Takes seconds out, down to a debt of as much as it holds at most."""
        self._seconds = max(-MOST_SECONDS, self.left(now) - seconds)
