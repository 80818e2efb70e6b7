"""Random choice from a source that the caller owns, so that a run can be repeated exactly."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

__all__ = ["RandomSource", "choose", "pick", "sample"]

T = TypeVar("T")


class RandomSource(Protocol):
    """What the state machines need of :class:`random.Random`."""

    def randrange(self, start: int, /) -> int:
        """A uniform integer from 0 to ``start - 1``."""


def pick(rng: RandomSource, items: Iterable[T]) -> T | None:
    """One of ``items``, or None if there are none."""
    pool = list(items)
    return choose(rng, pool) if pool else None


def choose(rng: RandomSource, items: Iterable[T]) -> T:
    """One of ``items``, of which there must be at least one."""
    pool = list(items)
    return pool[rng.randrange(len(pool))]


def sample(rng: RandomSource, items: Iterable[T], count: int) -> list[T]:
    """Up to ``count`` different ones of ``items``, in random order: the front part of a Fisher-Yates shuffle."""
    pool = list(items)
    count = min(count, len(pool))
    for i in range(count):
        j = i + rng.randrange(len(pool) - i)
        pool[i], pool[j] = pool[j], pool[i]
    return pool[:count]
