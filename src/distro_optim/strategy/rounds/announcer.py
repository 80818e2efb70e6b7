"""What we announce, now and again, since gossip may lose a message. No I/O.

Psyche's clients repeat one of their messages every ten seconds (``REBROADCAST_SHAREABLE``, ``shared/client/src``), so
that each has its turn about once a minute, longer than most rounds last. In a run of our own kind every message is
repeated soon and then less and less often (:data:`PROMPT`), but seldom while we train: who has not heard trains as
well, and misses it only when its round waits for it. So in a round that goes well nothing is repeated. In a run of
Psyche's, whose rounds last seconds anyway, each message is repeated every ten seconds (:data:`AMONG_PSYCHES`), and not
at all once everybody is known to have it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from ...comm import postcard
from ...comm.signing import SecretKey
from ...coordinator.types import CommitteeProof
from ...verify.commitment import Commitment
from .actions import Announce, Outbox
from .broadcasts import Broadcast, BroadcastType, Finished

__all__ = [
    "AMONG_PSYCHES",
    "FIRST_REPEAT_SECONDS",
    "PROMPT",
    "REBROADCAST_SECONDS",
    "Announcer",
    "Pace",
    "Repeats",
]

FIRST_REPEAT_SECONDS: Final = 1.0
"""After a message; then twice as long each time. Longer than gossip takes around the world. Chosen arbitrarily."""

REPEAT_SECONDS_PER_CLIENT: Final = 0.01
"""The first repetition waits so long for each client, if that is longer than :data:`FIRST_REPEAT_SECONDS`. When all say
again what they have said, each peer reads that for a millisecond or so of each of the others: a tenth of a core at
most. The second one comes as soon after it as among few, since nobody waits for longer than ``UNHEARD_SECONDS``
(:mod:`.waiting`), in which both must have a place."""

REBROADCAST_SECONDS: Final = 10.0
"""Between two repetitions at most; Psyche's ``REBROADCAST_SHAREABLE``."""

WARMUP_REPEAT_SECONDS: Final = 2.0
"""In warm-up everybody waits for the last peer to be heard; so much shorter than in a round. Chosen arbitrarily."""

ANSWER_SECONDS: Final = 0.5
"""Until our "ready" is repeated for a client that says it is ready: Psyche's hear nothing before, and look every half
second."""


@dataclass(frozen=True)
class Pace:
    """How soon and how often something is repeated, in seconds; pauses double.

    Attributes:
        first: until the first repetition, among few.
        longest: pause at most.
        in_warm_up: pause at most, in warm-up.
        extra: by which the first repetition comes later.
    """

    first: float
    longest: float
    in_warm_up: float
    extra: float = 0.0

    def among(self, clients: int) -> Pace:
        """The same among so many clients; see :data:`REPEAT_SECONDS_PER_CLIENT`."""
        extra = REPEAT_SECONDS_PER_CLIENT * clients - self.first
        return replace(self, extra=extra) if extra > 0 else self


PROMPT: Final = Pace(FIRST_REPEAT_SECONDS, REBROADCAST_SECONDS, WARMUP_REPEAT_SECONDS)
AMONG_PSYCHES: Final = Pace(REBROADCAST_SECONDS, REBROADCAST_SECONDS, REBROADCAST_SECONDS)

_U32: Final = 0xFFFF_FFFF
_NONCE_BYTES: Final = 4


@dataclass
class _Said:
    """What was said, when it is to be repeated, and how long that takes from then on."""

    broadcast: Broadcast
    last: float
    due: float
    pause: float

    @property
    def is_of_warm_up(self) -> bool:
        """Whether it says that we are ready."""
        data = self.broadcast.data
        return isinstance(data, Finished) and data.warmup


class Repeats:
    """What we have said and will repeat.

    Attributes:
        pace: of what is said from now on.
        next_at: when :meth:`due` has something, in monotonic seconds; None if never. Every message asks for it.
    """

    def __init__(self) -> None:
        self.pace = PROMPT
        self.next_at: float | None = None
        self._said: list[_Said] = []
        self._held = False

    def add(self, broadcast: Broadcast, now: float) -> None:
        """Something was said for the first time."""
        self._keep([*self._said, _Said(broadcast, now, now + self._until_first, self.pace.first)])

    def hold(self) -> None:
        """We train: from now on nothing is repeated sooner than after the longest pause."""
        self._held = self.pace.first < self.pace.longest
        self._keep(self._said)

    def release(self, now: float = -math.inf) -> None:
        """We have trained, and may have to wait for others: in a round that goes well not so long that anything is
        repeated. Without ``now``, what is due is repeated at once."""
        if self._held:
            self._held = False
            for said in self._said:
                said.due = max(said.due, now + self._until_first)
            self._keep(self._said)

    def answer_ready(self, now: float) -> None:
        """A peer is ready. A client of Psyche's has not listened before; one of ours has."""
        for said in self._said:
            if said.is_of_warm_up and self.pace is AMONG_PSYCHES:
                said.due = min(said.due, now + ANSWER_SECONDS)
        self._keep(self._said)

    def drop_results_of(self, step: int) -> None:
        """Everybody has them."""
        self._keep(
            [said for said in self._said if said.broadcast.step != step or isinstance(said.broadcast.data, Finished)]
        )

    def drop_before(self, step: int) -> None:
        """Forgets what is about earlier steps (warm-up's have step 0), and who had finished in a round that is over."""
        self._keep(
            [
                said
                for said in self._said
                if said.broadcast.step >= step and not isinstance(said.broadcast.data, Finished)
            ]
        )

    def clear(self) -> None:
        """Forgets everything."""
        self._held = False
        self._keep([])

    @property
    def stored(self) -> tuple[Broadcast, ...]:
        """What would be repeated, the latest last."""
        return tuple(said.broadcast for said in self._said)

    def due(self, now: float) -> list[Broadcast]:
        """What is to be repeated now, with new nonces: gossip drops a message that it has passed on already."""
        again = []
        for said in self._said:
            if self._due_of(said) <= now:
                said.broadcast = replace(said.broadcast, nonce=(said.broadcast.nonce + 1) & _U32)
                longest = self.pace.in_warm_up if said.is_of_warm_up else self.pace.longest
                said.pause = min(2 * said.pause, longest)
                said.last, said.due = now, now + said.pause
                again.append(said.broadcast)
        self._keep(self._said)
        return again

    @property
    def _until_first(self) -> float:
        return self.pace.first + self.pace.extra

    def _keep(self, said: list[_Said]) -> None:
        self._said = said
        self.next_at = min(map(self._due_of, said), default=None)

    def _due_of(self, said: _Said) -> float:
        return max(said.due, said.last + self.pace.longest) if self._held else said.due


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

    def say(
        self,
        step: int,
        proof: CommitteeProof,
        data_hash: bytes,
        data: BroadcastType,
        now: float,
        *,
        blob: bytes | None = None,
    ) -> Commitment:
        """Announces ``data``, committing to ``data_hash``, and returns the commitment. In a run of our own kind a small
        ``blob`` may go along, to which ``data`` has the ticket."""
        commitment = Commitment(data_hash, self._key.sign(data_hash))
        broadcast = Broadcast(step, proof, commitment, self.nonce(), data)
        self.repeats.add(broadcast, now)
        self._outbox.put(Announce(postcard.encode(broadcast), None if self.repeats.pace is AMONG_PSYCHES else blob))
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
