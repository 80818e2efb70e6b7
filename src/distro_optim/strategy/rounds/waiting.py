"""How long a round waits for results of the round before, which its report is about. No I/O.

All peers wait for each other, so a result that never comes costs everyone the round's time. There is such a gap if a
round ended before a peer had trained, if a peer must not share what it trained, or if a peer announces what nobody can
download. (Psyche's clients wait for all of these, and for clients that have left.) A result that did not come to us
still counts if a quorum of the others got it.

Peers of our own kind repeat what they said while they wait themselves, one second after their training and three (2.6
and 4.6 among 256 of them), and among Psyche's clients after ten seconds. A client of Psyche's repeats one of its last
messages every ten seconds, so that a lost one may come a minute later; and if a quorum misses its result, the client
reports itself as idle and is dropped. For those we wait to the end of the round's time, as its own kind does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ...coordinator.types import NodeIdentity
from .round_state import ClaimState, RoundState

__all__ = [
    "MAX_FAILURES_AWAITED",
    "UNHEARD_SECONDS",
    "UNHEARD_SHARE",
    "is_awaited",
    "is_missing",
    "unheard_seconds",
]

UNHEARD_SECONDS: Final = 5.0
"""After our training, for a result that nobody has announced. A round ends when everybody has trained, and a lost
announcement is repeated twice within that time: a result not heard of by then was never made. Chosen arbitrarily above
that."""

UNHEARD_AMONG_PSYCHES_SECONDS: Final = 12.0
"""The same for a peer of our kind in a run of Psyche's, where a lost announcement is repeated after ten seconds."""

UNHEARD_AMONG_PSYCHES_SHARE: Final = 0.75
"""Of a round's time at most. Who has not reported when it is over reports then. Chosen arbitrarily."""

UNHEARD_SHARE: Final = 0.25
"""At most this share of a round's time: a round in which nobody reports ends the epoch. Chosen arbitrarily."""

MAX_FAILURES_AWAITED: Final = 3
"""Failed downloads of one result after which a round does not wait for it. Chosen arbitrarily."""


def unheard_seconds(max_round_train_time: float, *, among_psyches: bool = False) -> float:
    """How many seconds to wait for a result that nobody has announced, where a round may last so many seconds."""
    if among_psyches:
        return min(UNHEARD_AMONG_PSYCHES_SECONDS, UNHEARD_AMONG_PSYCHES_SHARE * max_round_train_time)
    return min(UNHEARD_SECONDS, UNHEARD_SHARE * max_round_train_time)


def is_missing(previous: RoundState, may_bring: Callable[[NodeIdentity], bool]) -> bool:
    """Whether something of ``previous`` is not here that a client was to make which may still bring it, nor anything
    false.
    """
    return any(
        may_bring(previous.assignments[batch])
        and all(claim.state is not ClaimState.BROKEN for claim in previous.claims.get(batch, ()))
        for batch in previous.missing
    )


def is_awaited(
    previous: RoundState, may_bring: Callable[[NodeIdentity], bool], unheard_until: float, now: float
) -> bool:
    """Whether something of ``previous`` may still come.

    Args:
        previous: the round before.
        may_bring: whether a client may still bring it: not one that has left, and not we, since we published all that
            we had when that round ended.
        unheard_until: how long to wait for what nobody has announced, in monotonic seconds.
        now: monotonic time in seconds.
    """
    # Asked with every message: where anything is awaited, the first look shows it.
    missing = (batch for batch in previous.missing if may_bring(previous.assignments[batch]))
    if now < unheard_until:
        return any(True for _ in missing)
    return any(
        claim.state is ClaimState.FETCHING and claim.failures < MAX_FAILURES_AWAITED
        for batch in missing
        for claim in previous.claims.get(batch, ())
    )
