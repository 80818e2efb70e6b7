"""What neighbours are to be told that there is, until it is told: one IHave for all of it.

A payload waits for the next dispatch, or for the one after that: of two neighbours one speaks first, and the other then
has nothing to say.
"""

from __future__ import annotations

from .messages import IHave, MessageId, PeerId

__all__ = ["LazyQueue"]


class LazyQueue:
    """Payloads by whom they are to be announced to.

    Args:
        largest: entries of one IHave.

    Attributes:
        is_scheduled: whether a dispatch is under way.
        since: when the first of what is in it was added, if that was told.
    """

    __slots__ = ("_largest", "_later", "_soon", "is_scheduled", "since")

    def __init__(self, largest: int) -> None:
        self.is_scheduled = False
        self.since: float | None = None
        self._largest = largest
        self._soon: dict[PeerId, dict[MessageId, int]] = {}
        self._later: dict[PeerId, dict[MessageId, int]] = {}

    def __bool__(self) -> bool:
        return bool(self._soon or self._later)

    def add(self, peer: PeerId, id_: MessageId, round_: int, *, later: bool = False) -> IHave | None:
        """``peer`` is to be told of a payload. Returns what has to be said at once, since no more fits into it."""
        queues = self._later if later else self._soon
        queue = queues.setdefault(peer, {})
        queue[id_] = round_
        return IHave(tuple(queues.pop(peer).items())) if len(queue) >= self._largest else None

    def need_not_tell(self, peer: PeerId, id_: MessageId) -> None:
        """``peer`` has shown that it has a payload."""
        for queues in (self._soon, self._later):
            queue = queues.get(peer)
            if queue is not None:
                queue.pop(id_, None)

    def forget(self, peer: PeerId) -> None:
        """``peer`` is not a neighbour any more."""
        self._soon.pop(peer, None)
        self._later.pop(peer, None)

    def take(self) -> list[tuple[PeerId, IHave]]:
        """What is to be said now; what had to wait for longer is due next time."""
        due, self._soon, self._later, self.since = self._soon, self._later, {}, None
        return [(peer, IHave(tuple(queue.items()))) for peer, queue in due.items() if queue]
