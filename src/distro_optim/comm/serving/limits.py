"""How much one stranger may ask for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

from ...errors import ConfigurationError

__all__ = ["Bucket", "ServerLimits"]

KIB: Final = 1024


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """Bounds of a server. The defaults are chosen, not derived: generous for a client of Psyche, which sends about
    three messages of a kilobyte in each round, and far below what would slow a server down.

    Attributes:
        connections: open at once.
        unproved: of those, how many may not have answered their challenge yet; beyond it the oldest are closed.
        per_address: connections from one network address.
        handshake_seconds: within which the challenge has to be answered.
        message_bytes: longest message of a client. The largest honest one, 256 health checks, has 17 KiB.
        messages_per_second, messages_burst: of one client, sustained and at once.
        bytes_per_second, bytes_burst: of one client, sustained and at once.
        unsent_frames: states that wait for a slow reader; beyond it the oldest are dropped, since the newest counts.
        stall_seconds: after which a client that does not read is cut off. Psyche's reads nothing while it waits for
            its training to stop, which takes a batch.

    Raises:
        ConfigurationError: one of them is not above 0.
    """

    connections: int = 1024
    unproved: int = 128
    per_address: int = 512
    handshake_seconds: float = 10.0
    message_bytes: int = 64 * KIB
    messages_per_second: float = 20.0
    messages_burst: float = 100.0
    bytes_per_second: float = 128.0 * KIB
    bytes_burst: float = 512.0 * KIB
    unsent_frames: int = 16
    stall_seconds: float = 60.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ConfigurationError(f"{field.name} must be above 0, got {value}", name=field.name, value=value)


class Bucket:
    """A token bucket: ``burst`` at once, ``rate`` a second in the long run.

    Args:
        rate: tokens a second.
        burst: tokens it holds; it begins full.
        now: monotonic time in seconds.
    """

    __slots__ = ("_burst", "_rate", "_tokens", "_updated")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._updated = now

    def available(self, now: float) -> float:
        """Tokens that are there at ``now``."""
        self._tokens = min(self._burst, self._tokens + max(0.0, now - self._updated) * self._rate)
        self._updated = now
        return self._tokens

    def take(self, amount: float, now: float) -> bool:
        """Takes ``amount`` tokens; False, and takes none, if there are fewer."""
        if amount > self.available(now):
            return False
        self._tokens -= amount
        return True
