"""Which of several places is asked first, and whom to believe where they differ. No I/O, no clock: time is reads.

A place that failed is put last for some reads, longer each time it fails again, and is asked all the same where the
others fail too. Where places differ, what most of them say counts; in a tie, the one that was named first, which is the
run's own.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeVar

import numpy as np

from ..provider import TokenSequence

__all__ = ["Ranking", "Trouble", "content_of", "most_say"]

H = TypeVar("H", bound=Hashable)

FIRST_REST: Final = 8
"""Reads for which a place is put last when it fails; a round is a read, or a few."""

LONGEST_REST: Final = 256
"""The same after many failures. Chosen so that a place that comes back is used within an hour of rounds of 15 s."""


class Trouble(enum.Enum):
    """What may be wrong with a place."""

    GONE = "gives nothing"
    WRONG = "gives what cannot be the run's data"
    DIFFERS = "gives other data than the rest"


@dataclass
class _Standing:
    failures: int = 0
    rests_until: int = 0
    trouble: Trouble | None = None
    length: int | None = None
    compared: bool = False
    said: set[Trouble] = field(default_factory=set)


class Ranking:
    """What is known of some places, which are numbers from 0 on; 0 is the run's own.

    Args:
        count: places.
    """

    def __init__(self, count: int) -> None:
        self._places = [_Standing() for _ in range(count)]
        self._reads = 0

    def begin_read(self) -> None:
        """One more."""
        self._reads += 1

    def order(self) -> list[int]:
        """All places, the best first."""
        return sorted(
            range(len(self._places)),
            key=lambda place: (self.rests(place), self.rests(place) and self._places[place].trouble in _LIES, place),
        )

    def rests(self, place: int) -> bool:
        """Whether it failed lately."""
        return self._reads < self._places[place].rests_until

    def failed(self, place: int, trouble: Trouble) -> bool:
        """Puts a place last; returns whether it is the first trouble of this kind with it, which is worth a line."""
        standing = self._places[place]
        # Its exponent is bounded by the longest rest.
        standing.rests_until = self._reads + min(FIRST_REST << min(standing.failures, 16), LONGEST_REST)
        standing.failures += 1
        standing.trouble = trouble
        standing.compared = False
        new = trouble not in standing.said
        standing.said.add(trouble)
        return new

    def gave(self, place: int) -> None:
        """A place gave what can be trained on. One that fails every now and then keeps part of its rest."""
        standing = self._places[place]
        standing.failures = max(0, standing.failures - 1)
        standing.rests_until = 0
        standing.trouble = None

    def agreed(self, place: int) -> None:
        """What it gives was compared with what others give."""
        self._places[place].compared = True

    def is_compared(self, place: int) -> bool:
        """Whether it agreed with others since it failed last."""
        return self._places[place].compared

    # -- how much there is ---------------------------------------------------------------------------------------------

    def says_length(self, place: int, length: int | None) -> None:
        """How many sequences a place says there are; None if it does not say."""
        self._places[place].length = length

    def length(self) -> int | None:
        """How many there are, by those that can be reached and did not lie; None if nobody says."""
        for disbelieved in ((Trouble.GONE, *_LIES), (Trouble.WRONG,), ()):
            said = {
                place: standing.length
                for place, standing in enumerate(self._places)
                if standing.length is not None and standing.trouble not in disbelieved
            }
            if said:
                return most_say(said)
        return None

    def fits(self, place: int) -> bool:
        """Whether a place has as many as the others that are believed, or does not say."""
        own = self._places[place].length
        others = {
            other: standing.length
            for other, standing in enumerate(self._places)
            if standing.length is not None and (other == place or standing.trouble is None)
        }
        return own is None or own == most_say(others)


_LIES: Final = (Trouble.WRONG, Trouble.DIFFERS)


def most_say(said: Mapping[int, H]) -> H:
    """What most places say; among several of which as many say each, the one of the place with the lowest number.

    Args:
        said: at least one, by place.
    """
    counts: dict[H, int] = {}
    for place in sorted(said):
        counts[said[place]] = counts.get(said[place], 0) + 1
    return max(counts, key=lambda one: counts[one])  # the first of several


def content_of(sample: TokenSequence) -> tuple[bytes, ...]:
    """What is trained on, to be compared: places that leave out what is usual say the same as those that do not."""
    length = len(sample.input_ids)
    lists = (
        (sample.labels, sample.input_ids),
        (sample.position_ids, np.arange(length)),
        (sample.sequence_lengths, np.array([length])),
    )
    filled = [sample.input_ids, *(usual if given is None else given for given, usual in lists)]
    return tuple(one.astype(np.int32, copy=False).tobytes() for one in filled)
