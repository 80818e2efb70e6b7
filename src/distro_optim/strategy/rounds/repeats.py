"""Messages that are said again, since gossip may lose one.

Psyche's clients say one of their messages every ten seconds (``REBROADCAST_SHAREABLE``, ``shared/client/src``), so that
each has its turn about once a minute, longer than most rounds last. Here every message is said again soon and then ever
more rarely: a round waits for whoever has not heard, while in a round that goes well nothing is repeated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from .broadcasts import Broadcast, Finished

__all__ = ["FIRST_REPEAT_SECONDS", "REBROADCAST_SECONDS", "Repeats"]

FIRST_REPEAT_SECONDS: Final = 1.0
"""After a message; then twice as long each time. Above what gossip takes around the world. Chosen arbitrarily."""

REBROADCAST_SECONDS: Final = 10.0
"""Between two repetitions at most; Psyche's ``REBROADCAST_SHAREABLE``."""

WARMUP_REPEAT_SECONDS: Final = 2.0
"""In warm-up everybody waits for the last to be heard; so much shorter than in a round. Chosen arbitrarily."""

_U32: Final = 0xFFFF_FFFF


@dataclass
class _Said:
    """What was said, when it is to be said again, and how long that takes from then on."""

    broadcast: Broadcast
    due: float
    pause: float

    @property
    def longest_pause(self) -> float:
        data = self.broadcast.data
        return WARMUP_REPEAT_SECONDS if isinstance(data, Finished) and data.warmup else REBROADCAST_SECONDS


class Repeats:
    """What we have said and will say again."""

    def __init__(self) -> None:
        self._said: list[_Said] = []

    def add(self, broadcast: Broadcast, now: float) -> None:
        """Something was said for the first time."""
        self._said.append(_Said(broadcast, now + FIRST_REPEAT_SECONDS, FIRST_REPEAT_SECONDS))

    def drop_before(self, step: int) -> None:
        """Forgets what is about earlier steps (warm-up's have step 0), and who had finished in a round that is over."""
        self._said = [
            said for said in self._said if said.broadcast.step >= step and not isinstance(said.broadcast.data, Finished)
        ]

    @property
    def stored(self) -> tuple[Broadcast, ...]:
        """What would be said again, the latest last."""
        return tuple(said.broadcast for said in self._said)

    @property
    def next_at(self) -> float | None:
        """When :meth:`due` has something; None if never."""
        return min((said.due for said in self._said), default=None)

    def due(self, now: float) -> list[Broadcast]:
        """What is to be said again, with new nonces: else gossip would take it for what it has passed on already."""
        again = []
        for said in self._said:
            if said.due <= now:
                said.broadcast = replace(said.broadcast, nonce=(said.broadcast.nonce + 1) & _U32)
                said.pause = min(2 * said.pause, said.longest_pause)
                said.due = now + said.pause
                again.append(said.broadcast)
        return again
