"""Who has trained in this run, and so may vote on its weights. No I/O.

Identities cost nothing, results do: they are trained, sent, checked here and seen by a quorum. Each peer keeps this
book by itself, of what it saw itself, so that nobody can write into it but by working.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Final

__all__ = ["RESULTS_TO_EARN", "SILENT_ROUNDS", "Standing"]

RESULTS_TO_EARN: Final = 2
"""Results that counted, after which an identity has earned standing. Chosen so that a short epoch is enough."""

SILENT_ROUNDS: Final = 3
"""In a row, in which nothing that fits came of an identity that had work: then its standing is gone. A result that is
late by a round is none of them. Chosen arbitrarily."""


class Standing:
    """See the module. Identities are public keys of 32 bytes; the book has only those of the epoch's list.

    Args:
        me: our own public key.
    """

    def __init__(self, me: bytes) -> None:
        self._me = me
        self._results: dict[bytes, int] = {}  # that counted, in this epoch
        self._silent: dict[bytes, int] = {}  # rounds in a row
        self._epochs: dict[bytes, int] = {}  # at whose ends it had standing, without a gap

    def begin_epoch(self, clients: Iterable[bytes]) -> None:
        """An epoch begins with ``clients``: who has earned standing keeps it, and whoever is not there loses it."""
        there = set(clients)
        earned = {key for key in there if self.has_earned(key)}
        self._epochs = {key: self._epochs.get(key, 0) + 1 for key in earned}
        self._results = {}
        self._silent = {key: rounds for key, rounds in self._silent.items() if key in there}

    def end_round(self, counted: Collection[bytes], silent: Iterable[bytes]) -> None:
        """What came of a round.

        Args:
            counted: those whose results a quorum saw and fit here, and we, if we made one.
            silent: those that had work, and of whom nothing that fits has come here.
        """
        for key in counted:
            self._results[key] = self._results.get(key, 0) + 1
            self._silent.pop(key, None)
        for key in silent:
            self._silent[key] = self._silent.get(key, 0) + 1
            if self._silent[key] >= SILENT_ROUNDS:
                self._epochs.pop(key, None)
                self._results.pop(key, None)

    def has_earned(self, key: bytes) -> bool:
        """Whether an identity has standing, of an earlier epoch or of this one."""
        return key in self._epochs or self._results.get(key, 0) >= RESULTS_TO_EARN

    @property
    def is_ours_earned(self) -> bool:
        """Whether we have it ourselves."""
        return self.has_earned(self._me)

    def voters(self, clients: Sequence[bytes]) -> tuple[bytes, ...]:
        """Those of ``clients``, given in the order of the epoch's list, that may vote, the longest standing first.

        If any of them had standing before this epoch, only those do. If nobody has any, nobody may.
        """
        veterans = [key for key in clients if key in self._epochs]
        if veterans:
            return tuple(sorted(veterans, key=lambda key: -self._epochs[key]))
        return tuple(key for key in clients if self.has_earned(key))
