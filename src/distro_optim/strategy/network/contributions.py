"""What each identity has given to a run, counted from the results that were applied here and the messages that were
not taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from ..port import Contribution
from ..rounds.actions import CountedResult, DropReason

__all__ = ["Contributions"]

MAX_IDENTITIES: Final = 1024
"""That are counted. Four times the clients that an epoch has at most: identities cost nothing, and who makes new ones
all the time must not fill the memory. Of more, those that gave least are forgotten."""


HARMLESS: Final = frozenset({DropReason.NOT_RUNNING, DropReason.WRONG_STEP, DropReason.DUPLICATE})
"""Why an honest peer's messages are not taken again and again: they come late, early or by several ways."""


class Contributions:
    """Counts. Belongs to the network's thread."""

    def __init__(self) -> None:
        self._by_peer: dict[bytes, Contribution] = {}

    def counted(self, results: Sequence[CountedResult]) -> None:
        """These results of one round are applied."""
        for result in results:
            before = self._by_peer.get(result.owner, Contribution())
            self._by_peer[result.owner] = replace(
                before,
                rounds=before.rounds + 1,
                samples=before.samples + result.samples,
                bytes=before.bytes + result.bytes,
            )
        self._forget()

    def dropped(self, sender: bytes, reason: DropReason) -> None:
        """A message or a result of this peer was not taken. What an honest peer's network does is not counted."""
        if reason in HARMLESS:
            return
        before = self._by_peer.get(sender, Contribution())
        self._by_peer[sender] = replace(before, dropped=before.dropped + 1)
        self._forget()

    def seen(self) -> dict[bytes, Contribution]:
        """All that is counted, by public key."""
        return dict(self._by_peer)

    def _forget(self) -> None:
        while len(self._by_peer) > MAX_IDENTITIES:
            least = min(self._by_peer, key=lambda peer: (self._by_peer[peer].rounds, self._by_peer[peer].dropped))
            del self._by_peer[least]
