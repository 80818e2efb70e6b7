"""Many small audits of one peer, added up until they say something: a sequential test on the numbers of test 1.

One audit of a small model is not enough. The signs that a peer sent are compared with the gradients of its own batch
and of another one; the positions at which those two disagree *tell* which of them was trained. Of these, an honest
result sides with its batch at 0.6 to 0.9, a peer that has trained nothing, or something else, at one half, and both
scatter from round to round. So each audit gives a number, the :func:`siding`, and three things are made of many:

- :class:`Usual` is what honest results have in this run: the median of what all peers find of *themselves*, and how it
  scatters. Medians over peers, so that less than half of them can lie about it.
- :class:`Balance` adds up, for one peer, by how much likelier each number is from an honest peer than from one that
  did not train its batch (Wald's sequential probability ratio test, both as normal distributions of the same scatter).
- It ends with "failed" when dishonesty is :data:`FAILS` nats likelier, and with "passed" when honesty is
  :data:`PASSES` nats likelier, and begins again.

A single audit counts with :data:`MOST` nats at most, so that no single accident fails anybody. Where honest results do
not stand out, as where all batches say the same, numbers weigh next to nothing, and nobody passes or fails.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

__all__ = ["FAILS", "LEAST_TELLING", "MOST", "PASSES", "Balance", "Usual", "siding", "usual_of"]

CHANCE: Final = 0.5
"""The siding of a result that has nothing to do with either batch."""

LEAST_TELLING: Final = 16
"""Positions; from fewer no number is made. Chosen arbitrarily."""

LEAST_SENT: Final = 0.5
"""Of the coefficients that a batch has: a result that leaves out more says as little as one that was not trained."""

SAMPLES_OF_A_PEER: Final = 32
"""What it found of itself lately; older ones are of another phase of the training. Chosen arbitrarily."""

LEAST_SAMPLES: Final = 6
"""Of all peers together, before anything is usual. Chosen arbitrarily."""

LEAST_SCATTER: Final = 0.03
"""Honest results are taken to scatter so much at least, since other hardware scatters, too. Chosen arbitrarily."""

MOST_DEVIATIONS: Final = 4.0
"""Between honesty and chance: where honest results are far from chance and alike, those that are not so alike shall not
be taken for chance. Chosen so that two results that were not trained are still enough."""

_DEVIATIONS: Final = 1.4826
"""From the median of absolute deviations to the standard deviation of a normal distribution."""

FAILS: Final = 12.0
"""Nats. By Wald's bound an honest peer fails once in ``exp(12)`` = 160,000 balances."""

PASSES: Final = 6.0
"""Nats, after which a balance begins again, so that nobody saves up honesty for later."""

MOST: Final = 6.0
"""Nats of one audit: at least two have to speak against a peer that fails."""


def siding(only_assigned: int, only_control: int, *, sent: int = 1, expected: int = 0) -> float | None:
    """Of the positions that tell one batch from the other, the share at which a result sides with its own; 0 to 1.

    Args:
        only_assigned, only_control: positions, as in :class:`~.recompute.Evidence`.
        sent, expected: likewise; a result that leaves most out has one half at most.

    Returns:
        None if too few positions tell.
    """
    share = None
    if (telling := only_assigned + only_control) >= LEAST_TELLING:
        share = only_assigned / telling
    if sent < LEAST_SENT * expected:
        return CHANCE if share is None else min(CHANCE, share)
    return share


@dataclass(frozen=True)
class Usual:
    """What honest results have.

    Attributes:
        middle: of their sidings.
        scatter: standard deviation.
    """

    middle: float
    scatter: float

    @property
    def half_way(self) -> float:
        """Between honesty and chance."""
        return (self.middle + CHANCE) / 2

    def weigh(self, found: float) -> float:
        """By how much likelier a siding is from an honest peer than by chance, in nats, at most :data:`MOST`."""
        if self.middle <= CHANCE:
            return 0.0
        nats = (self.middle - CHANCE) * (found - self.half_way) / self.scatter**2
        return max(-MOST, min(MOST, nats))


def usual_of(samples: Mapping[bytes, Sequence[float]]) -> Usual | None:
    """What is usual, by what peers found of themselves, in the order of time; None if there is too little.

    Args:
        samples: by public key. Each peer has one voice, however many it gives.
    """
    given = [list(of_peer[-SAMPLES_OF_A_PEER:]) for of_peer in samples.values() if of_peer]
    if sum(map(len, given)) < LEAST_SAMPLES:
        return None
    middle = statistics.median(map(statistics.median, given))
    # About the middle of all, so that a peer with few samples has a scatter, too.
    scatter = statistics.median(statistics.median(abs(x - middle) for x in of_peer) for of_peer in given)
    least = max(LEAST_SCATTER, (middle - CHANCE) / MOST_DEVIATIONS)
    return Usual(middle, max(least, _DEVIATIONS * scatter))


@dataclass
class Balance:
    """What the audits of one peer say so far.

    Attributes:
        nats: by how much likelier honesty is.
        audits: since it began.
    """

    nats: float = 0.0
    audits: int = 0

    def add(self, found: float, usual: Usual) -> bool | None:
        """One more audit. True or False is the end of this balance: the peer passed or failed; None goes on.

        Args:
            found: its siding.
            usual: in this run.
        """
        self.nats += usual.weigh(found)
        self.audits += 1
        if -FAILS < self.nats < PASSES:
            return None
        passed = self.nats > 0
        self.nats, self.audits = 0.0, 0
        return passed
