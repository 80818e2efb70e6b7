"""The way of an announcement from the wire to the application: checked, deduplicated, queued. No I/O, no clock.

Gossip carries bytes from anybody. Each must be a :class:`~distro_optim.comm.signing.SignedMessage` of a sender that is
allowed, not seen before, with a good signature; checks go from cheap to dear. The queue is bounded, and a sender that
floods it pushes out only its own announcements.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ..errors import ConfigurationError, ProtocolError
from .seen import SeenSet
from .signing import SignedMessage, is_signed_by

__all__ = ["MAX_ANNOUNCEMENT", "Announcement", "AnnouncementInbox", "InboxCounts", "InboxLimits"]

MAX_ANNOUNCEMENT: Final = 3957
"""Bytes of an announcement at most. Psyche's gossip messages are shorter than 4096 bytes; 4055 of it are content that
can be forwarded any number of times (``src/proto/topic.rs`` of iroh-gossip), and the signature's envelope takes 98."""


@dataclass(frozen=True)
class Announcement:
    """What a peer announced to all others.

    Attributes:
        sender: the peer's public key, proven by its signature, whichever peer passed the message on.
        data: its words; at most :data:`MAX_ANNOUNCEMENT` bytes.
    """

    sender: bytes
    data: bytes


@dataclass(frozen=True, kw_only=True)
class InboxLimits:
    """How much waits to be read. With the defaults at most 16 MiB.

    Attributes:
        queued: announcements of all senders; beyond it the sender with most of them loses its oldest.
        queued_per_sender: of one sender; beyond it, its oldest are dropped, since the newest matter.
    """

    queued: int = 4096
    queued_per_sender: int = 256

    def __post_init__(self) -> None:
        for name in ("queued", "queued_per_sender"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {getattr(self, name)}", name=name)


@dataclass(kw_only=True)
class InboxCounts:
    """What became of the messages that arrived.

    Attributes:
        accepted: queued for the application.
        malformed: not a signed message, too long, or badly signed.
        refused: from senders that are not allowed.
        duplicate: seen before.
        dropped: accepted, but pushed out of the queue unread.
    """

    accepted: int = 0
    malformed: int = 0
    refused: int = 0
    duplicate: int = 0
    dropped: int = 0


class AnnouncementInbox:
    """See the module.

    Args:
        me: own public key; what comes back from oneself is dropped.
        salt: random bytes for the set of seen messages.
        allowed: senders to listen to; None for everybody.
        limits: of the queue.
        max_data: bytes that a sender may say at a time.
    """

    def __init__(
        self,
        me: bytes,
        *,
        salt: bytes,
        allowed: Iterable[bytes] | None = None,
        limits: InboxLimits | None = None,
        max_data: int = MAX_ANNOUNCEMENT,
    ) -> None:
        self.counts = InboxCounts()
        self._me = me
        self._max_size = SignedMessage.size_with(max_data)
        self._limits = limits if limits is not None else InboxLimits()
        self._seen = SeenSet(salt)
        self._allowed: frozenset[bytes] | None = None
        self._number = 0
        # By number of arrival; and the numbers of each sender, oldest first.
        self._queue: OrderedDict[int, Announcement] = OrderedDict()
        self._of_sender: dict[bytes, deque[int]] = {}
        self.set_allowed(allowed)

    def __len__(self) -> int:
        """Announcements waiting."""
        return len(self._queue)

    def set_allowed(self, senders: Iterable[bytes] | None) -> None:
        """Replaces the senders to listen to; what waits from others is dropped."""
        self._allowed = None if senders is None else frozenset(senders)
        if self._allowed is not None:
            for sender in [sender for sender in self._of_sender if sender not in self._allowed]:
                while sender in self._of_sender:
                    self._drop_oldest(sender)

    def receive(self, sealed: bytes | memoryview, via: bytes | None = None) -> Announcement | None:
        """Takes in what gossip delivered; the announcement if it is queued, None if it is dropped. Never raises."""
        announcement = self.open(sealed, via)
        if announcement is not None:
            self.push(announcement)
        return announcement

    def open(self, sealed: bytes | memoryview, via: bytes | None = None) -> Announcement | None:
        """The announcement in it, if it counts and was not here before; it is not queued. Never raises.

        Args:
            sealed: as it came.
            via: the peer whose connection it came by: one who says it there itself need not have signed it.
        """
        if len(sealed) > self._max_size:
            self.counts.malformed += 1
            return None
        try:
            message = SignedMessage.read(sealed)
        except ProtocolError:
            self.counts.malformed += 1
            return None
        sender = message.sender
        if sender == self._me or (self._allowed is not None and sender not in self._allowed):
            self.counts.refused += 1
            return None
        identity = sender + message.data
        if identity in self._seen:
            self.counts.duplicate += 1
            return None
        # Only now, since it costs as much as all of the above. A bad one is not remembered, or a forger could
        # have the true message taken for a duplicate.
        if sender != via and not is_signed_by(sender, message.data, message.signature):
            self.counts.malformed += 1
            return None
        self._seen.add_new(identity)
        return Announcement(sender, message.data)

    def admit(self, announcement: Announcement) -> bool:
        """Queues what its sender said elsewhere, as :meth:`open` there has shown; False if it was here before."""
        identity = announcement.sender + announcement.data
        if identity in self._seen:
            self.counts.duplicate += 1
            return False
        self._seen.add_new(identity)
        self.push(announcement)
        return True

    def push(self, announcement: Announcement) -> None:
        """Queues what :meth:`open` gave."""
        self.counts.accepted += 1
        sender = announcement.sender
        if len(self._of_sender.get(sender, ())) >= self._limits.queued_per_sender:
            self._drop_oldest(sender)
            self.counts.dropped += 1
        elif len(self._queue) >= self._limits.queued:
            self._drop_oldest(max(self._of_sender, key=lambda key: len(self._of_sender[key])))
            self.counts.dropped += 1
        self._number += 1
        self._queue[self._number] = announcement
        self._of_sender.setdefault(sender, deque()).append(self._number)

    def take(self) -> Announcement | None:
        """The oldest announcement, in order of arrival; None if none waits."""
        if not self._queue:
            return None
        _, announcement = self._queue.popitem(last=False)
        numbers = self._of_sender[announcement.sender]
        numbers.popleft()  # the oldest of all is the oldest of its sender
        if not numbers:
            del self._of_sender[announcement.sender]
        return announcement

    def waiting(self) -> Counter[bytes]:
        """How many announcements of each sender wait."""
        return Counter({sender: len(numbers) for sender, numbers in self._of_sender.items()})

    def _drop_oldest(self, sender: bytes) -> None:
        numbers = self._of_sender[sender]
        del self._queue[numbers.popleft()]
        if not numbers:
            del self._of_sender[sender]
