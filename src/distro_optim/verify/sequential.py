"""Many small audits of one peer, added up until they say something: a sequential test on the numbers of test 1.

One audit of a small model is not enough. The signs that a peer sent are compared with the gradients of its own batch
and of another one; the positions at which those two disagree *tell* which of them was trained. Of these, an honest
result sides with its batch at 0.6 to 0.9, a peer that has trained nothing, or something else, at one half. Both scatter
from round to round, and honest results do so with a long tail: in 2 to 4 of 100 rounds the gradient of a batch is
unlike all others, and its signs side with it as little as chance would. So each audit gives a number, the
:func:`siding`, and three things are made of many:

- :class:`Usual` is what honest results have in this run: the median of what all peers find of *themselves*, how it
  scatters, and how often it looks like chance. Lies of less than half of the peers do not keep cheats from failing.
- :class:`Balance` adds up, for one peer, how much each number says against it (Wald's sequential probability ratio
  test, with the ratio cut off on both sides as Huber's robust one has it).
- It ends with "failed" at :data:`FAILS` nats against the peer, and with "passed" at :data:`PASSES` nats for it, and
  begins again.

What a number says is learnt, and not taken from a distribution. A score grows with how much nearer to chance it is than
to honest numbers; it is divided by its mean over the honest numbers themselves (:attr:`Usual.surprise`). So honest
audits have a mean of 1 at most, whatever their distribution is, as far as the next one is like those that are known:
such numbers are called e-values, and by Ville's inequality the product of them ever exceeds ``exp(FAILS)`` with a
probability of ``exp(-FAILS)`` at most. That was not so with normal distributions on both sides, by which the mean was 4
for honest numbers that were measured. A single audit counts with :data:`MOST` nats at most, and with less while few
honest numbers are known: of n, none says that something happens less often than once in n + 1.

Where honest results do not stand out, as where all batches say the same, or where they often look like chance, numbers
weigh next to nothing, and nobody passes or fails.
"""

from __future__ import annotations

import math
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
be taken for chance. Chosen so that a result that was not trained still counts with :data:`MOST`."""

_DEVIATIONS: Final = 1.4826
"""From the median of absolute deviations to the standard deviation of a normal distribution."""

FAILS: Final = 12.0
"""Nats. An honest peer fails once in ``exp(12)`` = 160,000 balances at most, by Ville's inequality."""

PASSES: Final = 6.0
"""Nats, after which a balance begins again, so that nobody saves up honesty for later."""

MOST: Final = 3.0
"""Nats of one audit: at least four have to speak against a peer that fails. By Huber's rule where to cut, one honest
audit in 20 may then look like anything at all, which is more than were measured."""


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
        scatter: standard deviation, without the tails.
        surprise: logarithm of the mean of :meth:`score` over honest results, in nats; 0 if it is as it would be with
            normal distributions.
    """

    middle: float
    scatter: float
    surprise: float = 0.0

    @property
    def half_way(self) -> float:
        """Between honesty and chance."""
        return (self.middle + CHANCE) / 2

    def score(self, found: float) -> float:
        """By how much nearer to chance a siding is than to honesty, from ``exp(-MOST)`` to ``exp(MOST)``: the ratio of
        the likelihoods of two normal distributions of the same scatter, cut off on both sides."""
        nats = (self.middle - CHANCE) * (self.half_way - found) / self.scatter**2
        return math.exp(_cut(nats))

    def weigh(self, found: float) -> float:
        """How much a siding speaks for an honest peer, in nats, at most :data:`MOST` either way."""
        if self.middle <= CHANCE:
            return 0.0
        return _cut(self.surprise - math.log(self.score(found)))

    def is_near(self, found: float) -> bool:
        """Whether a siding is nearer to honest ones than to chance."""
        return self.middle > CHANCE and found > self.half_way


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
    usual = Usual(middle, max(least, _DEVIATIONS * scatter))
    # Who mostly finds chance in itself is no example of honesty, or says so to make cheats look usual. Of the others
    # each may say it of less than half of its results, and they are less than half: cheats are still a surprise.
    scores = [usual.score(x) for of_peer in given if statistics.median(of_peer) > usual.half_way for x in of_peer]
    # The one that is audited may be like none of them, and honest all the same.
    mean = (sum(scores) + math.exp(MOST)) / (len(scores) + 1)
    return Usual(usual.middle, usual.scatter, math.log(mean))


@dataclass
class Balance:
    """What the audits of one peer say so far.

    Attributes:
        nats: for the peer; below 0 against it.
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


def _cut(nats: float) -> float:
    return max(-MOST, min(MOST, nats))
