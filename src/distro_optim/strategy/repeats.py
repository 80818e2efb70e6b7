"""Messages that are said again, since gossip may lose one. Rules: ``shared/client/src/client.rs`` of Psyche."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from .broadcasts import Broadcast, Finished

__all__ = ["REBROADCAST_SECONDS", "Repeats"]

REBROADCAST_SECONDS: Final = 10.0
"""``REBROADCAST_SHAREABLE``. Psyche says one of its messages every so often, so that each has its turn about once a
minute, longer than most rounds last; here every message has its turn once in this time."""

_U32: Final = 0xFFFF_FFFF


class Repeats:
    """What we have said and will say again."""

    def __init__(self) -> None:
        self._stored: list[Broadcast] = []
        self._place = 0

    def add(self, broadcast: Broadcast) -> None:
        self._stored.append(broadcast)

    def drop_before(self, step: int) -> None:
        """Forgets what is about earlier steps (warm-up's have step 0), and who had finished in a round that is over."""
        self._stored = [b for b in self._stored if b.step >= step and not isinstance(b.data, Finished)]

    @property
    def pause(self) -> float:
        """Seconds until the next one."""
        return REBROADCAST_SECONDS / max(1, len(self._stored))

    def next(self) -> Broadcast | None:
        """The next in turn, with a new nonce: else gossip would take it for one that it has passed on already."""
        if not self._stored:
            return None
        self._place = (self._place + 1) % len(self._stored)
        again = replace(self._stored[self._place], nonce=(self._stored[self._place].nonce + 1) & _U32)
        self._stored[self._place] = again
        return again
