"""Messages of many peers on their way, in slots of a few milliseconds.

Every peer of a large swarm hears hundreds of messages in a round. Each as an event of its own would have this process
go from peer to peer with each of them; so what comes to a peer in the same slot is read together at its end, in the
order in which it came, as by a process that had something else to do meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from operator import itemgetter
from typing import Final

from ...comm.announcements import Announcement
from .events import EventQueue

__all__ = ["SLOT_SECONDS", "Inboxes", "Message"]

SLOT_SECONDS: Final = 0.005
"""Less than any latency, and a few hundredths of what gossip takes among hundreds. Chosen arbitrarily."""

Message = tuple[float, Announcement, bool]
"""When it came, what it says, and whether only peers of our own kind say this."""


class Inboxes:
    """See the module.

    Args:
        queue: of all that happens.
        read: called with the number of a peer and what has come to it.
    """

    def __init__(self, queue: EventQueue, read: Callable[[int, list[Message]], object]) -> None:
        self._queue = queue
        self._read = read
        self._slots: dict[int, dict[int, list[Message]]] = {}  # by the number of the slot, and of the peer

    def put(self, numbers: Sequence[int], times: Sequence[float], announcement: Announcement, *, weights: bool) -> None:
        """A message comes to the peers with these numbers at these times."""
        slots = self._slots
        for number, time in zip(numbers, times, strict=True):
            slot = ceil(time / SLOT_SECONDS)
            boxes = slots.get(slot)
            if boxes is None:
                boxes = slots[slot] = {}
                self._queue.at(slot * SLOT_SECONDS, lambda slot=slot: self._open(slot))  # type: ignore[misc]
            message = time, announcement, weights
            if number in boxes:
                boxes[number].append(message)
            else:
                boxes[number] = [message]

    def _open(self, slot: int) -> None:
        for number, messages in self._slots.pop(slot).items():
            messages.sort(key=itemgetter(0))
            self._read(number, messages)
