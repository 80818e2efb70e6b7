"""Endpoints beside a node's first one, and which of them dials whom. No I/O.

An endpoint of iroh sends a handshake to where it last reached the peer, and nowhere else, as long as any connection to
it is open (``remote_state.rs``, ``handle_msg_send_datagram``). If that way is dead, so are all dials, for fifteen
seconds. An endpoint that has no connection to the peer tries all addresses at once. So a peer that does not answer is
dialled from another endpoint, with the same key and another port; what is open stays as it is until that succeeds.

Such an endpoint has no relay server, where two with one key would get in each other's way, and is published nowhere;
who is connected to it dials there, too. What the first endpoint has open is closed if only a relay server is left
(``Dialler.give_up_old_way``).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Final, Generic, TypeVar

__all__ = ["IDLE_SECONDS", "MAX_BESIDE", "EndpointsBeside"]

E = TypeVar("E")

MAX_BESIDE: Final = 3
"""Endpoints beside the first: a second change of network may come before the connections of the first change have
ended. Each is a socket and about a megabyte. Chosen arbitrarily."""

IDLE_SECONDS: Final = 30.0
"""After which one that nobody uses is closed. Chosen arbitrarily."""


class _Used(Generic[E]):
    def __init__(self, endpoint: E, now: float) -> None:
        self.endpoint = endpoint
        self.idle_since = now
        self.busy = 1  # dials under way


class EndpointsBeside(Generic[E]):
    """See the module.

    Args:
        open_one: opens an endpoint.
        clock: monotonic seconds.
    """

    def __init__(self, open_one: Callable[[], Awaitable[E]], clock: Callable[[], float]) -> None:
        self._open_one = open_one
        self._clock = clock
        self._used: list[_Used[E]] = []
        self._opening = 0

    def __len__(self) -> int:
        return len(self._used)

    def __iter__(self) -> Iterator[E]:
        return iter([used.endpoint for used in self._used])

    async def take(self, knows_peer: Callable[[E], bool]) -> E | None:
        """An endpoint to dial a peer from; None if there is none and no more may be opened. To be given back.

        Args:
            knows_peer: whether an endpoint has an open connection to the peer.
        """
        for used in self._used:
            if not knows_peer(used.endpoint):
                used.busy += 1
                return used.endpoint
        if len(self._used) + self._opening >= MAX_BESIDE:
            return None
        self._opening += 1
        try:
            endpoint = await self._open_one()
        finally:
            self._opening -= 1
        self._used.append(_Used(endpoint, self._clock()))
        return endpoint

    def give_back(self, endpoint: E) -> None:
        """The dial has ended in whatever way."""
        for used in self._used:
            if used.endpoint is endpoint:
                used.busy -= 1
                used.idle_since = self._clock()

    def idle(self, is_used: Callable[[E], bool]) -> list[E]:
        """Removes those that nobody has used for long, and returns them, to be closed.

        Args:
            is_used: whether an endpoint has an open connection.
        """
        now = self._clock()
        for used in self._used:
            if used.busy or is_used(used.endpoint):
                used.idle_since = now
        gone = [used for used in self._used if now - used.idle_since >= IDLE_SECONDS]
        self._used = [used for used in self._used if used not in gone]
        return [used.endpoint for used in gone]

    def all(self) -> list[E]:
        """Removes all of them, and returns them, to be closed."""
        used, self._used = self._used, []
        return [one.endpoint for one in used]
