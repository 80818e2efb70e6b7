"""Looks at all connections of a node all the time, and says which do not answer.

The rules are in :mod:`~distro_optim.comm.iroh.watching.silence`.

What to do about it is the affair of those who use the connection: a link of gossip dials the peer anew, the pool of
connections for blobs lets go of it, a coordinator's link has a watch of its own. Here only such connections are closed
whose peer has been heard meanwhile over another one: they are dead, and hold iroh to a way that is.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Collection
from typing import Final

from ....errors import ExchangeError
from ..connection import Connection

__all__ = ["LOOK_SECONDS", "Vigil", "pause_with"]

LOOK_SECONDS: Final = 0.25
"""Between two looks at a connection over which somebody waits for something; at others it looks less often, see
:meth:`~.connection.Connection.is_due`."""

FEW: Final = 8
"""Connections of that kind, with more of which there are fewer looks: half as many with twice as many, or more. Among
sixteen peers all looks together had taken a twentieth of what a round costs."""

LOOK_COST_SECONDS: Final = 0.004
"""Between two looks for each connection, with very many: all looks together take two per cent of a processor. Measured:
one takes 0.07 ms."""

MAX_LOOK_SECONDS: Final = 2.0
"""Between two looks at most, with however many connections."""

_log = logging.getLogger(__name__)

WAYS_SECONDS: Final = 6.0
"""For which connections are looked at for having no path left after our own addresses have changed: the transport gives
up paths from an address that is gone. Chosen arbitrarily, above the time that a machine takes to get another one."""

REPLACED_SECONDS: Final = 2.0
"""After which a newer connection has taken the place of an older one. Enough for a handshake and the proof of a key."""


def pause_with(count: int) -> float:
    """Seconds between two looks, if somebody waits for something over so many connections."""
    of_few = LOOK_SECONDS * min(max(1.0, count / FEW), 2.0)
    return min(max(of_few, LOOK_COST_SECONDS * count), MAX_LOOK_SECONDS)


class Vigil:
    """The watch of one node. All of it belongs to the node's loop.

    Args:
        connections: all that are open.
        places: where we are, to be compared.
    """

    def __init__(self, connections: Callable[[], Collection[Connection]], places: Callable[[], object]) -> None:
        self._connections = connections
        self._places = places
        self._place: object = None
        self._ways_until = 0.0

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            count = sum(1 for connection in self._connections() if connection.awaiting)
            await asyncio.sleep(pause_with(count))
            self.look(asyncio.get_running_loop().time())

    def look(self, now: float) -> None:
        """One look at all."""
        if (place := self._places()) != self._place:
            self._place, self._ways_until = place, now + WAYS_SECONDS
        at_ways = now < self._ways_until
        connections = tuple(self._connections())
        silent: list[Connection] = []
        for connection in connections:
            was_silent = is_silent = connection.is_silent
            if at_ways or connection.is_due(now):
                try:
                    is_silent = connection.look(now, at_ways=at_ways)
                except ExchangeError:
                    continue  # it has just ended
            if is_silent != was_silent:
                _log.debug("%r %s", connection, "does not answer" if is_silent else "answers again")
            if is_silent:
                silent.append(connection)
        if silent:
            self._close_what_is_dead(silent, connections, now)

    def _close_what_is_dead(
        self, silent: Collection[Connection], connections: Collection[Connection], now: float
    ) -> None:
        """Closes connections to peers that were heard meanwhile over others."""
        heard: dict[bytes, float] = {}  # when each peer was last heard, over connections that answer
        for connection in connections:
            if not connection.is_silent and not connection.has_ended:
                peer = connection.remote_id
                heard[peer] = max(heard.get(peer, connection.heard_at), connection.heard_at)
        for connection in [*silent, *self._as_dead(silent)]:
            last = heard.get(connection.remote_id)
            since = connection.unanswered_since
            if since is None:
                since = connection.heard_at
            if last is not None and last > since and (not connection.is_patient or self._is_replaced(connection, now)):
                connection.close_as_silent()

    def _is_replaced(self, connection: Connection, now: float) -> bool:
        """Whether the peer has had another connection for the same purpose for a while. Before, whoever serves it may
        not know yet whose it is, and would take the peer for gone."""
        what, until = (connection.remote_id, connection.alpn), now - REPLACED_SECONDS
        open_ones = [other for other in self._connections() if not other.has_ended]
        return any((one.remote_id, one.alpn) == what and connection.opened < one.opened <= until for one in open_ones)

    def _as_dead(self, silent: Collection[Connection]) -> list[Connection]:
        """Connections on which nothing was said since others to the same peer have fallen silent.

        They are closed with those, where there is a relay server: as long as one of them is open, the transport takes
        their way for the best one, and dials the peer there and nowhere else.
        """
        since: dict[tuple[bytes, int], float] = {}
        for one in silent:
            if one.has_relay and one.unanswered_since is not None:
                way = one.remote_id, id(one.endpoint)
                since[way] = min(one.unanswered_since, since.get(way, one.unanswered_since))
        if not since:
            return []
        others = [one for one in self._connections() if not one.has_ended and not one.is_silent]
        return [
            one for one in others if one.heard_nothing_since(since.get((one.remote_id, id(one.endpoint)), -math.inf))
        ]
