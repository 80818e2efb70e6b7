"""What we announce, now and again, since gossip may lose a message. No I/O.

Psyche's clients repeat one of their messages every ten seconds (``REBROADCAST_SHAREABLE``, ``shared/client/src``), so
that each has its turn about once a minute, longer than most rounds last. Here every message is repeated soon and then
less and less often: a round waits for the peers that have not heard, while in a round that goes well nothing is
repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from ...comm import postcard
from ...comm.signing import SecretKey
from ...coordinator.types import CommitteeProof
from ...verify.commitment import Commitment
from .actions import Announce, Outbox
from .broadcasts import Broadcast, BroadcastType, Finished

__all__ = ["FIRST_REPEAT_SECONDS", "REBROADCAST_SECONDS", "Announcer", "Repeats"]

FIRST_REPEAT_SECONDS: Final = 1.0
"""After a message; then twice as long each time. Longer than gossip takes around the world. Chosen arbitrarily."""

REBROADCAST_SECONDS: Final = 10.0
"""Between two repetitions at most; Psyche's ``REBROADCAST_SHAREABLE``."""

WARMUP_REPEAT_SECONDS: Final = 2.0
"""In warm-up everybody waits for the last peer to be heard; so much shorter than in a round. Chosen arbitrarily."""

_U32: Final = 0xFFFF_FFFF
_NONCE_BYTES: Final = 4


@dataclass
class _Said:
    """What was said, when it is to be repeated, and how long that takes from then on."""

    broadcast: Broadcast
    due: float
    pause: float

    @property
    def longest_pause(self) -> float:
        """Seconds."""
        data = self.broadcast.data
        return WARMUP_REPEAT_SECONDS if isinstance(data, Finished) and data.warmup else REBROADCAST_SECONDS


class Repeats:
    """What we have said and will repeat."""

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

    def clear(self) -> None:
        """Forgets everything."""
        self._said.clear()

    @property
    def stored(self) -> tuple[Broadcast, ...]:
        """What would be repeated, the latest last."""
        return tuple(said.broadcast for said in self._said)

    @property
    def next_at(self) -> float | None:
        """When :meth:`due` has something, in monotonic seconds; None if never."""
        return min((said.due for said in self._said), default=None)

    def due(self, now: float) -> list[Broadcast]:
        """What is to be repeated now, with new nonces: gossip drops a message that it has passed on already."""
        again = []
        for said in self._said:
            if said.due <= now:
                said.broadcast = replace(said.broadcast, nonce=(said.broadcast.nonce + 1) & _U32)
                said.pause = min(2 * said.pause, said.longest_pause)
                said.due = now + said.pause
                again.append(said.broadcast)
        return again


class Announcer:
    """Signs what we have to say, announces it, and repeats it.

    Args:
        key: signs commitments.
        draw: gives so many random bytes, from a source that peers cannot guess.
        outbox: where announcements go.

    Attributes:
        repeats: what was said.
    """

    def __init__(self, key: SecretKey, draw: Callable[[int], bytes], outbox: Outbox) -> None:
        self.repeats = Repeats()
        self._key = key
        self._draw = draw
        self._outbox = outbox

    def say(self, step: int, proof: CommitteeProof, data_hash: bytes, data: BroadcastType, now: float) -> Commitment:
        """Announces ``data``, committing to ``data_hash``, and returns the commitment."""
        commitment = Commitment(data_hash, self._key.sign(data_hash))
        broadcast = Broadcast(step, proof, commitment, self.nonce(), data)
        self.repeats.add(broadcast, now)
        self._outbox.put(Announce(postcard.encode(broadcast)))
        return commitment

    def repeat(self, now: float) -> bool:
        """Announces again what is due; False if nothing is."""
        again = self.repeats.due(now)
        for broadcast in again:
            self._outbox.put(Announce(postcard.encode(broadcast)))
        return bool(again)

    def nonce(self) -> int:
        """A random 32-bit number, with which the repetitions of a message begin to count."""
        return int.from_bytes(self._draw(_NONCE_BYTES), "little")
