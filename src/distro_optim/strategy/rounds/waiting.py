"""How long a round waits for results of the round before, of which its report is to tell. No I/O.

Everybody waits for everybody, so whatever never comes costs all of a round's time. A round that ended without
somebody's training, or with one who must not share what it trained, leaves such a gap, and so does a peer that
announces what cannot be had. (Psyche's clients wait for all of it, and for those who have left.) What somebody else did
get of them counts all the same, if a quorum got it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from ...coordinator.types import NodeIdentity
from .round_state import ClaimState, RoundState

__all__ = ["MAX_FAILURES_AWAITED", "UNHEARD_SECONDS", "is_awaited", "unheard_seconds"]

UNHEARD_SECONDS: Final = 5.0
"""After our training, for a result that nobody has announced. A round ends when everybody has trained, and a lost
announcement is said again after one second and after three: what was not heard by then was never made. Chosen
arbitrarily above that."""

UNHEARD_SHARE: Final = 0.25
"""Of the time of a round at most: a round in which nobody reports costs everybody the epoch. Chosen arbitrarily."""

MAX_FAILURES_AWAITED: Final = 3
"""Failed downloads of one result until nobody waits for it. Chosen arbitrarily."""


def unheard_seconds(max_round_train_time: float) -> float:
    """How long a result that nobody has announced is waited for, in rounds of so many seconds at most."""
    return min(UNHEARD_SECONDS, UNHEARD_SHARE * max_round_train_time)


def is_awaited(previous: RoundState, owners: Collection[NodeIdentity], unheard_until: float, now: float) -> bool:
    """Whether something of ``previous`` may still come.

    Args:
        previous: the round before.
        owners: those who may still bring it: without those who have left, and without ourselves, who have brought all
            that we had when that round ended.
        unheard_until: until when what nobody has announced is waited for.
        now: monotonic time in seconds, as ``unheard_until``.
    """
    missing = [batch for batch in previous.missing if previous.assignments[batch] in owners]
    if missing and now < unheard_until:
        return True
    return any(
        claim.state is ClaimState.FETCHING and claim.failures < MAX_FAILURES_AWAITED
        for batch in missing
        for claim in previous.claims.get(batch, ())
    )
