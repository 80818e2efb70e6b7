"""When an epoch ends early because a client waits for the next one. No I/O, no clock.

Every such end costs all members two rounds without training and a warm-up, so it must not come for free:

- a client that was dropped, for lying or for doing nothing, waits twice as long each time, up to a whole epoch. Once it
  has stayed to the end of an epoch it counts as a newcomer again;
- a new key costs nothing, so the early ends themselves are counted: a few may follow each other quickly, when a run
  begins and friends come one by one, and after those one in each quarter of an epoch.

An epoch that has lost a third of its clients does not wait that long, but ends as soon as anybody waits who was not
dropped: those who are left train less, and it is they who choose another host when theirs is gone
(:mod:`...strategy.rounds.trust.succession`). Hosts that are killed one after the other would otherwise leave two, of
whom none may host alone, while all the others wait for an epoch that nobody ends.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Final

from ..types import ClientState, CoordinatorEpochState, NodeIdentity

__all__ = ["EARLY_ENDS", "JoinerPatience"]

EARLY_ENDS: Final = 4
"""Early ends that may follow each other as soon as a client has waited long enough. Chosen arbitrarily."""

EPOCH_SHARE: Final = 4
"""After those, one early end in each such part of an epoch's time. Chosen arbitrarily."""

THINNED: Final = 3
"""An epoch that has lost one in so many of its clients is thinned out. With three and four clients that is before two
are left, of whom one is no majority."""

MAX_REMEMBERED: Final = 1024
"""Keys of dropped clients; beyond it the one that was dropped longest ago is forgotten."""

_MAX_DOUBLINGS: Final = 32


class JoinerPatience:
    """Decides whether an epoch is to end early; see the module. Times are whole seconds.

    Args:
        wait_time: for a newcomer.
        epoch_time: of an epoch that does not end early.
    """

    def __init__(self, wait_time: int, epoch_time: int) -> None:
        self._wait_time = wait_time
        self._epoch_time = max(epoch_time, wait_time)
        self._pause = max(self._epoch_time // EPOCH_SHARE, wait_time)
        self._times_dropped: OrderedDict[NodeIdentity, int] = OrderedDict()
        self._left = EARLY_ENDS
        self._last_refill: int | None = None

    def wait_time(self, client: NodeIdentity) -> int:
        """Seconds after which the epoch is to end for this client."""
        doublings = min(self._times_dropped.get(client, 0), _MAX_DOUBLINGS)
        return min(self._wait_time << doublings, self._epoch_time)

    def is_due(self, pending: Mapping[NodeIdentity, int], epoch: CoordinatorEpochState, now: int) -> bool:
        """Whether one of ``pending``, given with the times of joining, has waited long enough for the next epoch."""
        self._refill(now)
        if not self._left:
            return False
        members = {client.id for client in epoch.clients}
        waiting = {client: since for client, since in pending.items() if client not in members}
        if _is_thinned(epoch) and any(client not in self._times_dropped for client in waiting):
            return True
        if now < epoch.start_timestamp + self._wait_time:
            return False
        return any(now >= since + self.wait_time(client) for client, since in waiting.items())

    def ended_early(self, now: int) -> None:
        """An epoch has ended early."""
        self._refill(now)
        if self._left == EARLY_ENDS:
            self._last_refill = now
        self._left = max(0, self._left - 1)

    def dropped(self, client: NodeIdentity) -> None:
        """A client was taken off the list."""
        self._times_dropped[client] = self._times_dropped.pop(client, 0) + 1
        if len(self._times_dropped) > MAX_REMEMBERED:
            self._times_dropped.popitem(last=False)

    def stayed(self, clients: Iterable[NodeIdentity]) -> None:
        """These have been in an epoch to its end."""
        for client in clients:
            self._times_dropped.pop(client, None)

    def _refill(self, now: int) -> None:
        if self._last_refill is None or self._left == EARLY_ENDS:
            return
        pauses = max(0, now - self._last_refill) // self._pause
        self._left = min(EARLY_ENDS, self._left + pauses)
        self._last_refill += pauses * self._pause


def _is_thinned(epoch: CoordinatorEpochState) -> bool:
    """Whether a third of the clients that it began with have left, or were dropped."""
    left = sum(client.state is ClientState.HEALTHY for client in epoch.clients)
    began = len(epoch.clients) + len(epoch.exited_clients)
    return THINNED * (began - left) >= began > 0
