"""Which messages were here before, over days and in bounded memory. No I/O.

Gossip forgets the ids of messages after two minutes; a copy that comes back later, from a peer that slept or from one
that replays it on purpose, must still not count twice. Bloom filters of two generations hold millions of ids in a few
megabytes. They never forget within a generation; the price is a tiny chance that a fresh message is taken for an old
one.
"""

from __future__ import annotations

import hashlib
from typing import Final

from pybloom_live import BloomFilter

from ..errors import ConfigurationError

__all__ = ["SeenSet"]

_CAPACITY: Final = 100_000
"""A run of 100 peers with rounds of ten seconds announces some 10 messages a second: a generation lasts three hours."""

_ERROR_RATE: Final = 1e-9
"""A lost result costs its trainer one round; at 1e-9 that is less often than a cosmic ray. 43 bits an entry."""


class SeenSet:
    """Remembers at least the last ``capacity`` and at most the last ``2 * capacity`` entries.

    Args:
        salt: random and secret. Without it, others could compute which made-up messages set the bits of a message
            to come, and have it suppressed.
        capacity: entries of one generation.
        error_rate: chance that a new entry is taken for an old one.
    """

    def __init__(self, salt: bytes, *, capacity: int = _CAPACITY, error_rate: float = _ERROR_RATE) -> None:
        if capacity < 1:
            raise ConfigurationError(f"capacity must be at least 1, got {capacity}", name="capacity", value=capacity)
        self._salt = salt
        self._capacity = capacity
        self._error_rate = error_rate
        self._young = BloomFilter(capacity, error_rate)
        self._old: BloomFilter | None = None

    def __contains__(self, entry: bytes) -> bool:
        key = self._key(entry)
        return key in self._young or (self._old is not None and key in self._old)

    def add(self, entry: bytes) -> bool:
        """Remembers ``entry``; whether it was new."""
        if entry in self:
            return False
        self.add_new(entry)
        return True

    def add_new(self, entry: bytes) -> None:
        """Remembers ``entry``, which the caller knows not to be there."""
        if len(self._young) >= self._capacity:
            self._old, self._young = self._young, BloomFilter(self._capacity, self._error_rate)
        self._young.add(self._key(entry), skip_check=True)

    def _key(self, entry: bytes) -> str:
        return hashlib.blake2b(entry, key=self._salt[:64], digest_size=24).hexdigest()
