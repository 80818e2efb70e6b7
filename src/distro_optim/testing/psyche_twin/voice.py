"""What the twin says, and says again: one message every 10 s, in turn, each time with another nonce. No I/O."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from ...comm import postcard
from ...comm.signing import SecretKey
from ...coordinator.types import CommitteeProof
from ...strategy.rounds.actions import Announce
from ...strategy.rounds.broadcasts import Broadcast, BroadcastType
from ...verify.commitment import Commitment

__all__ = ["REBROADCAST_SECONDS", "Voice"]

REBROADCAST_SECONDS: Final = 10.0
"""``REBROADCAST_SHAREABLE``."""


class Voice:
    """Signs messages, and keeps them to be repeated.

    Args:
        key: of the client's endpoint.
        draw: gives so many random bytes.

    Attributes:
        repeats_at: when :meth:`repeat` has something to do, in monotonic seconds; None before :meth:`begin`.
    """

    def __init__(self, key: SecretKey, draw: Callable[[int], bytes]) -> None:
        self.repeats_at: float | None = None
        self._key = key
        self._draw = draw
        self._said: list[Broadcast] = []
        self._turn = 0

    def begin(self, now: float) -> None:
        """The client has begun to follow a run."""
        self.repeats_at = now + REBROADCAST_SECONDS

    def say(
        self, step: int, proof: CommitteeProof, data_hash: bytes, data: BroadcastType
    ) -> tuple[Commitment, Announce]:
        """Says something for the first time."""
        commitment = Commitment(data_hash, self._key.sign(data_hash))
        nonce = int.from_bytes(self._draw(4), "little")
        broadcast = Broadcast(step, proof, commitment, nonce, data)
        self._said.append(broadcast)
        return commitment, Announce(postcard.encode(broadcast))

    def repeat(self, now: float) -> list[Announce]:
        """Says the next of what was said again, if it is time to."""
        if self.repeats_at is None or now < self.repeats_at:
            return []
        self.repeats_at = now + REBROADCAST_SECONDS
        if not self._said:
            return []
        self._turn = (self._turn + 1) % len(self._said)
        said = self._said[self._turn]
        said = self._said[self._turn] = replace(said, nonce=(said.nonce + 1) & 0xFFFF_FFFF)
        return [Announce(postcard.encode(said))]

    def forget_before(self, step: int) -> None:
        """What is about older steps is not repeated any more."""
        self._said = [said for said in self._said if said.step >= step]
