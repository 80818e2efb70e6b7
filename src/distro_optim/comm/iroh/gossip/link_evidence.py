"""When a link is worth changing: evidence before a Prune or a lasting Graft.

The rules of the PlumTree paper suit one sender. A duplicate makes its link lazy at once, a missing payload makes a
link eager at once. With many senders at a time those decisions are made on messages that overlap: two messages break
one cycle at two places and cut off a part of the tree, everybody in that part grafts, new cycles appear. In a
simulated swarm of 200 nodes with 5 to 50 ms between them and ten messages a second from random senders, more than
40 % of the payloads are duplicates, and it stays so.

So a node here waits for evidence, in messages that every PlumTree node understands:

* a link is pruned after some duplicates more than first copies have come over it. On a cycle the link where messages
  meet most often gets there first, and when it is gone the others collect no more duplicates;
* a missing payload is fetched, by a Graft with a Prune behind it, and only repeated misses make a link eager;
* where a neighbour that pushed payloads is gone, the evidence is nearly complete: one miss makes another link eager;
* the wait before fetching adapts, like a retransmission timer: it grows when the payload comes the normal way after
  all, and shrinks slowly when nothing is missed. It is drawn at random from a range, so that not everybody behind
  one broken link fetches at the same moment.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from .config import GossipConfig
from .messages import MessageId, PeerId
from .random_choice import RandomSource

__all__ = ["LinkEvidence"]

# All of these were found by simulation (see the module's docstring); the result changes little around them.

_PRUNE_AFTER: Final = 4
"""Duplicates beyond first copies after which a link is pruned."""

_PRUNE_NEW_AFTER: Final = 1
"""The same for a link that has just come up."""

_GRAFT_AFTER: Final = 3.0
"""Misses after which a link is made eager."""

_MISS_DECAY: Final = 0.2
"""What one first copy over an eager link takes off the count of misses."""

_GRAFT_PAUSE: Final = 0.5
"""Seconds between two links made eager, so that the first has time to show its worth."""

#: Factors of the wait when a fetch was needless, and when a payload came before its fetch. In balance, needless
#: fetches are ln(1 / down) / ln(up) = 1.2 % of the payloads, and each is a duplicate.
_WAIT_UP, _WAIT_DOWN = 1.5, 0.995
_WAIT_MAX: Final = 1.5
"""Longest wait, in seconds. Where it is shorter than the way through the tree, needless fetches are not kept rare."""

_FETCHED_CAPACITY: Final = 1024
"""Fetched ids remembered; the oldest go first."""

_JITTER_STEPS: Final = 1 << 16
"""Steps of the random part of a wait."""


class LinkEvidence:
    """Counts what the links of one node are good for, in one topic."""

    __slots__ = ("_config", "_duplicates", "_fetched", "_misses", "_next_graft", "_rng", "_wait")

    def __init__(self, config: GossipConfig, rng: RandomSource) -> None:
        self._config = config
        self._rng = rng
        self._wait = config.graft_timeout_1
        self._misses = 0.0
        self._next_graft = 0.0
        self._duplicates: dict[PeerId, int] = {}
        self._fetched: OrderedDict[MessageId, None] = OrderedDict()

    def first_wait(self) -> float:
        """Seconds from the first announcement of a payload until it is fetched."""
        return self._wait * self._jitter()

    def next_wait(self) -> float:
        """Seconds from one fetch of a payload until another peer is asked for it."""
        return max(self._wait / 2, self._config.graft_timeout_2)

    def missed(self, id_: MessageId, now: float) -> bool:
        """A payload has to be fetched. Whether the link it is fetched over should become eager."""
        self._fetched[id_] = None
        if len(self._fetched) > _FETCHED_CAPACITY:
            self._fetched.popitem(last=False)
        self._misses = min(self._misses + 1, _GRAFT_AFTER)
        if self._misses < _GRAFT_AFTER or now < self._next_graft:
            return False
        self._misses = 0.0
        self._next_graft = now + _GRAFT_PAUSE * self._jitter()
        return True

    def first_copy(self, peer: PeerId, id_: MessageId) -> None:
        """A payload came from ``peer`` that we did not have."""
        if id_ in self._fetched:
            return
        self._wait = max(self._wait * _WAIT_DOWN, self._config.graft_timeout_1)
        self._misses = max(self._misses - _MISS_DECAY, 0.0)
        if self._duplicates.get(peer, 0) > 1:
            self._duplicates[peer] -= 1
        else:
            self._duplicates.pop(peer, None)

    def was_needless(self, id_: MessageId) -> bool:
        """A payload came that we had. Whether the second copy is there because we fetched one too early."""
        if id_ not in self._fetched:
            return False
        self._wait = min(self._wait * _WAIT_UP, max(_WAIT_MAX, self._config.graft_timeout_1))
        self._misses = max(self._misses - 1, 0.0)
        return True

    def duplicate(self, peer: PeerId) -> bool:
        """A payload came from the eager ``peer`` that we had. Whether to prune the link."""
        count = self._duplicates.get(peer, 0) + 1
        self._duplicates[peer] = count
        if count < _PRUNE_AFTER:
            return False
        del self._duplicates[peer]
        return True

    def new_link(self, peer: PeerId) -> None:
        """``peer`` is now a neighbour, and eager without having shown any worth."""
        self._duplicates[peer] = _PRUNE_AFTER - _PRUNE_NEW_AFTER

    def forget(self, peer: PeerId, *, was_eager: bool) -> None:
        """``peer`` is not a neighbour any more."""
        self._duplicates.pop(peer, None)
        if was_eager:
            self._misses = max(self._misses, _GRAFT_AFTER - 1)
            self._next_graft = 0.0

    def _jitter(self) -> float:
        """Uniform in [1, 2)."""
        return 1.0 + self._rng.randrange(_JITTER_STEPS) / _JITTER_STEPS
