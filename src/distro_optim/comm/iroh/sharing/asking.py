"""How often each peer may still ask about the model, counted before anything of a question is read. No I/O.

An honest peer asks once for the description and once for each part, and some of them again where others failed. Each
question costs a connection and, at most once a part, the copy of a tensor; whoever asks more often is not heard until
its share has grown again.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

__all__ = ["AskBudget"]

FREE: Final = 64
"""Questions beside those for parts: a peer that waits for a model asks each two seconds whether there is one."""

TIMES: Final = 4
"""A peer may ask for each part at once; the last ones of a download are asked for again where peers fail. Chosen
arbitrarily."""

REFILL_SECONDS: Final = 600.0
"""Until a share that was used up is whole again: a peer that is started anew downloads everything anew."""

SLOWEST: Final = 1.0
"""Questions a second that a share grows by at least, for those that wait."""

MAX_PEERS: Final = 1024
"""Of which we remember what they asked; an epoch has 256 at most."""


class AskBudget:
    """A share of questions for each peer, which grows again with time.

    Args:
        parts: that there are to ask for.
    """

    def __init__(self, parts: int = 0) -> None:
        self._left: OrderedDict[bytes, tuple[float, float]] = OrderedDict()  # (questions, when)
        self.share = 0.0
        """Questions that a peer has at most."""
        self.resize(parts)

    def resize(self, parts: int) -> None:
        """There are so many parts from now on. What was asked before counts on, and what is new may be asked by all."""
        before, self.share = self.share, float(FREE + TIMES * (parts + 1))
        more = max(0.0, self.share - before)
        for peer, (left, since) in self._left.items() if more else ():
            self._left[peer] = (left + more, since)

    def take(self, peer: bytes, now: float) -> bool:
        """Whether ``peer`` may ask one more question; it is counted then.

        Args:
            peer: its key.
            now: seconds that only grow.
        """
        left, since = self._left.pop(peer, (self.share, now))
        grown = (now - since) * max(SLOWEST, self.share / REFILL_SECONDS)
        left = min(self.share, left + grown)
        may = left >= 1
        self._left[peer] = (left - 1 if may else left, now)
        while len(self._left) > MAX_PEERS:
            self._left.popitem(last=False)  # who has not asked for longest has the most left
        return may
