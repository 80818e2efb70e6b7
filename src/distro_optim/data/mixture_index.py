"""Which member of a weighted mixture gives which sample. No I/O.

PsycheFoundation/psyche, ``shared/data-provider/src/weighted/mod.rs``. Of ``k`` members with sizes ``n_i`` and weights
``w_i`` that sum to 1, the place ``s`` goes to the first member with the largest ``w_i * max(s, 1) - drawn_i``, which
gives its next sample, from its start again once it has given all. So every prefix of the mixture has the proportions
of the weights to within a sample or so, while a mixture has as many samples as its members together: a member with
more than its share of weight repeats, one with less is not seen whole.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Final

from ..coordinator.model import Seeded, Shuffle
from ..coordinator.types import BatchId
from ..errors import ConfigurationError, DataUnavailableError
from .sequences import MAX_SHUFFLED
from .shuffle import ChaCha8, index_shuffle

__all__ = ["MemberRequest", "MixtureIndex", "normalized_weights"]

MAX_MEMBERS: Final = 1 << 16
"""Data sets of a mixture; their numbers are kept in two bytes."""

PAST_THE_END: Final = (0, 0)
"""Member and sample that Psyche's mixtures give for every index beyond their end."""

MAX_PLACES: Final = 1 << 30
"""Places up to which the order is computed: six gigabytes, two trillion tokens of 2048 a sequence. Members that lie
about their sizes get no further."""

_STEP: Final = 1 << 16
"""Places that the index grows by at least, so that growing it costs little beside filling it."""


@dataclass(frozen=True)
class MemberRequest:
    """Samples to be asked of one member at once.

    Attributes:
        member: its number.
        batch: its samples.
        positions: where in the batch that was asked for each of them goes.
    """

    member: int
    batch: BatchId
    positions: tuple[int, ...]


def normalized_weights(weights: Sequence[float]) -> list[float]:
    """Weights that sum to 1.

    Raises:
        ConfigurationError: a weight is negative or no number, or all are 0.
    """
    for weight in weights:
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigurationError(f"weights must be 0 or above, got {weight}", name="weights", value=weight)
    # Not sum(): from Python 3.12 on it is more exact than Rust's, and a last bit decides ties.
    total = reduce(add, weights, 0.0)
    if not (math.isfinite(total) and total > 0):
        raise ConfigurationError(f"weights must have a sum above 0, got {list(weights)}", name="weights")
    return [weight / total for weight in weights]


class MixtureIndex:
    """The order of a mixture.

    Unshuffled it is computed as far as it is asked for, shuffled at once; six bytes a sample. Not to be shared between
    threads without a lock.

    Args:
        sizes: samples of each member.
        weights: of each member; None for their sizes.
        shuffle: the order.

    Raises:
        ConfigurationError: the arguments make no mixture.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, shuffle: Shuffle) -> None:
        if weights is None:
            weights = [float(size) for size in sizes]
        if not 1 <= len(sizes) <= MAX_MEMBERS or len(weights) != len(sizes):
            raise ConfigurationError(
                f"a mixture needs a weight for each of 1 to {MAX_MEMBERS} members, got {len(sizes)} members and "
                f"{len(weights)} weights",
                name="weights",
            )
        if not any(sizes):
            raise ConfigurationError("no member of the mixture has a sample", name="members")
        self._sizes = list(sizes)
        self._weights = normalized_weights(weights)
        self._drawn = [0] * len(sizes)
        self._members = array("H")
        # The largest number is below the largest size; eight bytes only where four do not hold it.
        self._samples = array("I" if max(sizes) < 1 << 32 else "Q")
        if isinstance(shuffle, Seeded):
            if len(self) > MAX_SHUFFLED:
                raise ConfigurationError(
                    f"a mixture of {len(self)} samples is too large to shuffle, at most {MAX_SHUFFLED} can be: set "
                    "shuffle to DontShuffle, and shuffle the members when they are made",
                    name="shuffle",
                )
            self._grow(len(self))
            index_shuffle([self._members, self._samples], ChaCha8(shuffle.seed))

    def __len__(self) -> int:
        """Samples; a mixture has as many as its members together."""
        return sum(self._sizes)

    def locate(self, index: int) -> tuple[int, int]:
        """Member and its sample. Beyond the end it is :data:`PAST_THE_END`, as in Psyche.

        Raises:
            DataUnavailableError: above :data:`MAX_PLACES`.
        """
        if index >= len(self):
            return PAST_THE_END
        self._grow(index + 1)
        return self._members[index], self._samples[index]

    def requests(self, batch: BatchId) -> list[MemberRequest]:
        """What to ask of whom for ``batch``; samples that follow each other in a member together."""
        wanted = sorted((*self.locate(index), index - batch.start) for index in range(batch.start, batch.end + 1))
        found: list[MemberRequest] = []
        for member, sample, position in wanted:
            last = found[-1] if found else None
            if last is not None and last.member == member and last.batch.end + 1 == sample:
                found[-1] = MemberRequest(member, BatchId(last.batch.start, sample), (*last.positions, position))
            else:
                found.append(MemberRequest(member, BatchId(sample, sample), (position,)))
        return found

    def _grow(self, length: int) -> None:
        """Computes the order up to ``length`` places, and some more while at it."""
        done = len(self._members)
        if length <= done:
            return
        if length > MAX_PLACES:
            raise DataUnavailableError(
                f"place {length - 1} of this mixture is beyond the {MAX_PLACES} whose order can be computed"
            )
        goal = min(len(self), max(length, done + _STEP))
        sizes, drawn = self._sizes, self._drawn
        members = [(number, self._weights[number]) for number, size in enumerate(sizes) if size]
        add_member, add_sample = self._members.append, self._samples.append
        for place in range(done, goal):
            factor = float(place) if place else 1.0
            chosen, most = 0, -math.inf
            for number, weight in members:
                error = weight * factor - drawn[number]
                if error > most:
                    chosen, most = number, error
            add_member(chosen)
            add_sample(drawn[chosen] % sizes[chosen])
            drawn[chosen] += 1
