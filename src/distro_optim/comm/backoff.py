"""When to dial a peer that did not answer: exponential back-off with jitter, per peer. No I/O, no clock.

One failure never writes a peer off: home routers lose packets, laptops sleep, a trainer restarts. The wait doubles
with each failure in a row up to a bound, and is forgotten at the first success.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ..errors import ConfigurationError

__all__ = ["BackoffPolicy", "DialSchedule"]

_MAX_PEERS: Final = 4096
"""As many peers as the connection pool of Psyche's clients holds (``shared/network/src/lib.rs``), four times over."""


@dataclass(frozen=True, kw_only=True)
class BackoffPolicy:
    """How long to wait after the n-th failure in a row: ``first * factor**(n - 1)``, at most ``longest``.

    Attributes:
        first: seconds after the first failure. Chosen so that a packet lost on the way costs little.
        factor: growth from one failure to the next.
        longest: seconds; the bound keeps a peer that comes back after an hour from being noticed an hour later.
        jitter: share of the wait that is drawn at random, 0 to 1, so that peers that lost the same neighbour do not
            all return in the same instant.
    """

    first: float = 0.25
    factor: float = 2.0
    longest: float = 30.0
    jitter: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.first <= self.longest:
            raise ConfigurationError(
                f"first must lie between 0 and longest = {self.longest}, got {self.first}", name="first"
            )
        if self.factor < 1:
            raise ConfigurationError(f"factor must be at least 1, got {self.factor}", name="factor")
        if not 0 <= self.jitter <= 1:
            raise ConfigurationError(f"jitter must lie between 0 and 1, got {self.jitter}", name="jitter")

    def delay(self, failures: int, draw: float) -> float:
        """Seconds to wait after ``failures`` failures in a row, at least 1; ``draw`` is uniform in [0, 1)."""
        # The exponent is bounded, since a float power overflows; 64 doublings are beyond any `longest`.
        full = min(self.longest, self.first * self.factor ** min(failures - 1, 64))
        return full * (1 - self.jitter * draw)


@dataclass
class _Failures:
    count: int
    next_attempt: float


class DialSchedule:
    """Remembers how often each peer failed, and says when it may be dialled again.

    Args:
        policy: the waits.
        random: draws uniform numbers in [0, 1) for the jitter, such as ``Random(seed).random``.
        max_peers: how many failing peers are remembered; the one that failed longest ago is forgotten first.
    """

    def __init__(self, policy: BackoffPolicy, random: Callable[[], float], *, max_peers: int = _MAX_PEERS) -> None:
        self._policy = policy
        self._random = random
        self._max_peers = max_peers
        self._failures: OrderedDict[bytes, _Failures] = OrderedDict()

    def __len__(self) -> int:
        return len(self._failures)

    def failures(self, peer: bytes) -> int:
        """Failures in a row so far."""
        entry = self._failures.get(peer)
        return entry.count if entry else 0

    def wait(self, peer: bytes, now: float) -> float:
        """Seconds until ``peer`` may be dialled; 0 if now."""
        entry = self._failures.get(peer)
        return max(0.0, entry.next_attempt - now) if entry else 0.0

    def failed(self, peer: bytes, now: float) -> float:
        """Notes a failed dial and returns the seconds to wait before the next."""
        count = self.failures(peer) + 1
        delay = self._policy.delay(count, self._random())
        self._failures[peer] = _Failures(count, now + delay)
        self._failures.move_to_end(peer)
        while len(self._failures) > self._max_peers:
            self._failures.popitem(last=False)
        return delay

    def succeeded(self, peer: bytes) -> None:
        """Forgets the failures of a peer that answered, or that called us."""
        self._failures.pop(peer, None)
