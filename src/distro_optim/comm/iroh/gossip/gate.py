"""What gossip passes on: a share of messages and bytes for each author, counted before any work is done. No I/O.

Gossip carries what anybody says to everybody, so who floods one peer floods all of them, and each honest peer that
passes the flood on looks like its source. So each peer looks at a message before it passes it on: an author has a
budget, and what is over it goes nowhere. A peer that sends far more of its own is cut off. One that passes it on is
not, since clients of Psyche pass everything on.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from ....errors import ProtocolError
from ...serving.limits import Bucket
from ...signing import SignedMessage, is_signed_by

__all__ = ["AnnouncementGate", "GateLimits", "Verdict"]

MAX_AUTHORS: Final = 1024
"""Remembered; beyond it the one not heard of for longest. Four times the clients of an epoch."""


class Verdict(enum.Enum):
    """What becomes of a message."""

    PASS = "it is delivered, and passed on"
    IGNORE = "it goes nowhere"
    OFFENCE = "it goes nowhere, and whoever sent it is cut off"


@dataclass(frozen=True, kw_only=True)
class GateLimits:
    """What one author may say on one channel. In a round a peer says three or four times some 400 bytes, and its report
    on the weights, which has up to 4 KiB; the shortest rounds take some ten milliseconds.

    Attributes:
        messages_per_second, messages_burst: sustained and at once.
        bytes_per_second, bytes_burst: likewise.
        excess_per_second, excess_burst: messages over that, of which nothing is passed on, until their author is cut
            off by those that it sends them to.
    """

    messages_per_second: float = 200.0
    messages_burst: float = 1000.0
    bytes_per_second: float = 64.0 * 1024
    bytes_burst: float = 1024.0 * 1024
    excess_per_second: float = 10.0
    excess_burst: float = 200.0


class _Budget:
    __slots__ = ("bytes", "excess", "messages")

    def __init__(self, limits: GateLimits, now: float) -> None:
        self.messages = Bucket(limits.messages_per_second, limits.messages_burst, now)
        self.bytes = Bucket(limits.bytes_per_second, limits.bytes_burst, now)
        self.excess = Bucket(limits.excess_per_second, limits.excess_burst, now)


class AnnouncementGate:
    """See the module. Times are monotonic seconds.

    Args:
        limits: of each author.
        me: own public key; what we say is signed.
    """

    def __init__(self, limits: GateLimits | None = None, *, me: bytes = b"") -> None:
        self._me = me
        self._limits = limits if limits is not None else GateLimits()
        self._budgets: OrderedDict[bytes, _Budget] = OrderedDict()

    def judge(self, content: bytes | memoryview, via: bytes, now: float) -> Verdict:
        """What becomes of a message that was not seen before. Never raises.

        Args:
            content: of the gossip message, as it came.
            via: the peer that it came from.
            now: monotonic time in seconds.
        """
        try:
            message = SignedMessage.read(content)
        except ProtocolError:
            return self._over(via, via, now)
        budget = self._budget(message.sender, now)
        if budget.messages.available(now) < 1 or budget.bytes.available(now) < len(content):
            return self._over(message.sender, via, now)
        # Only now, since it costs more than all of the above; but before it is counted, or anybody could use up the
        # budget of another. What comes from its author over its own connection is proven by that.
        if message.sender != via and not is_signed_by(message.sender, message.data, message.signature):
            return self._over(via, via, now)
        budget.messages.take(1, now)
        budget.bytes.take(len(content), now)
        return Verdict.PASS

    def may_pass_on(self, content: bytes | memoryview) -> bool:
        """Whether others can know who says it. Asked before a payload is sent: the signature of what came from its
        author was not checked when it came. Never raises."""
        try:
            message = SignedMessage.read(content)
        except ProtocolError:
            return False
        return message.sender == self._me or is_signed_by(message.sender, message.data, message.signature)

    def _over(self, author: bytes, via: bytes, now: float) -> Verdict:
        if author != via or self._budget(via, now).excess.take(1, now):
            return Verdict.IGNORE
        return Verdict.OFFENCE

    def _budget(self, author: bytes, now: float) -> _Budget:
        budget = self._budgets.get(author)
        if budget is None:
            budget = self._budgets[author] = _Budget(self._limits, now)
            if len(self._budgets) > MAX_AUTHORS:
                self._budgets.popitem(last=False)
        else:
            self._budgets.move_to_end(author)
        return budget
