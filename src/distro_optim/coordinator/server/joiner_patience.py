"""When an epoch is brought to its end because somebody waits for the next one. No I/O, no clock.

Every such end costs everybody two rounds without training and a warm-up, so it must not be to be had for nothing:

- whoever was dropped, for lying or for doing nothing, waits twice as long with each time, up to a whole epoch, and is
  a newcomer again once it has stayed to the end of an epoch;
- a new key costs nothing, so the ends themselves are counted: a few soon after each other, when a run begins and
  friends come one by one, and then one in each quarter of an epoch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Final

from ..types import CoordinatorEpochState, NodeIdentity

__all__ = ["EARLY_ENDS", "JoinerPatience"]

EARLY_ENDS: Final = 4
"""Ends that may follow each other as soon as somebody has waited long enough. Chosen arbitrarily."""

EPOCH_SHARE: Final = 4
"""After those, one in so many parts of an epoch's time. Chosen arbitrarily."""

MAX_REMEMBERED: Final = 1024
"""Keys of those who were dropped; beyond it the one that was dropped longest ago is forgotten."""

_MAX_DOUBLINGS: Final = 32


class JoinerPatience:
    """See the module. Times are whole seconds.

    Args:
        wait_time: for a newcomer.
        epoch_time: of an epoch that nobody ends.
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
        """Whether somebody of ``pending``, who joined at those times, has waited long enough for the next epoch."""
        self._refill(now)
        if not self._left or now < epoch.start_timestamp + self._wait_time:
            return False
        members = {client.id for client in epoch.clients}
        return any(client not in members and now >= since + self.wait_time(client) for client, since in pending.items())

    def ended_early(self, now: int) -> None:
        """An epoch was brought to its end."""
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
