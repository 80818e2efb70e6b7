"""Which connections do not answer, by the bytes that they have sent and received. No I/O, no clock.

The transport acknowledges what matters within a round trip, whatever the program at the other end does, and sends again
what is not acknowledged, in growing pauses. So a connection that sends again and again and receives nothing has lost
its way: the network drops its packets, or the other end is gone. An acknowledgement is not answered itself; hence one
sending alone says nothing. A connection without a path at all cannot even send.

The transport waits much longer before it says so: 15 seconds for a path, 30 for a connection (iroh ``socket.rs``).
"""

from __future__ import annotations

from typing import Final

__all__ = ["SILENCE_SECONDS", "Silence"]

SILENCE_SECONDS: Final = 1.0
"""After the first packet that was not answered. Three round trips around the world; short enough that a new connection
stands within three seconds."""

SENDINGS: Final = 2
"""Looks at which more had been sent, with nothing received since. One may be an acknowledgement."""

SLEEP_SECONDS: Final = 4.0
"""Between two looks: if more time went by, it is we who slept, and nobody else was silent. Longer than any pause
between two looks of :mod:`~distro_optim.comm.iroh.node.vigil`."""


class Silence:
    """One connection. Times are monotonic seconds.

    Args:
        now: when the connection was opened.
    """

    __slots__ = ("_looked", "_received", "_sendings", "_sent", "_since")

    def __init__(self, now: float) -> None:
        self._looked = now
        self._sent = self._received = -1
        self._sendings = 0
        self._since: float | None = None

    @property
    def since(self) -> float | None:
        """When the first packet that was not answered was found sent; None if everything is answered so far."""
        return self._since

    def look(self, sent: int, received: int, now: float, *, has_way: bool = True) -> bool:
        """Takes note of the counters; returns whether the connection does not answer.

        Args:
            sent: bytes so far.
            received: likewise.
            now: the time.
            has_way: whether the connection has any path.
        """
        slept = now - self._looked > SLEEP_SECONDS
        self._looked = now
        if received != self._received or slept:
            self._since, self._sendings = None, 0
        elif sent != self._sent or not has_way:
            self._sendings += 1
            if self._since is None:
                self._since = now
        self._sent, self._received = sent, received
        return self.is_silent(now)

    def is_silent(self, now: float) -> bool:
        """Whether it has not answered for too long, as of the last look."""
        return self._since is not None and self._sendings >= SENDINGS and now - self._since >= SILENCE_SECONDS
