"""The connections of a node that are open, incoming and outgoing."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from ..connection import Connection

__all__ = ["OpenConnections"]

_log = logging.getLogger(__name__)


class OpenConnections:
    """See the module. What has ended leaves by itself.

    Args:
        uses_relays: whether an endpoint, on which a connection is, uses relay servers.
    """

    def __init__(self, uses_relays: Callable[[Any], bool]) -> None:
        self._uses_relays = uses_relays
        self._open: set[Connection] = set()
        self._per_peer: Counter[bytes] = Counter()
        self._watches: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Connection]:
        """As they are now: some may be closed, and leave, meanwhile."""
        return iter(list(self._open))

    def number_with(self, peer: bytes) -> int:
        """How many there are with a peer, whatever the protocols."""
        return self._per_peer[peer]

    def with_peer(self, peer: bytes) -> list[Connection]:
        """Those with a peer, whatever the protocols."""
        return [connection for connection in self._open if connection.remote_id == peer]

    def add(self, connection: Connection) -> None:
        """Takes a connection in, until its end, which is watched for from now on."""
        connection.has_relay = self._uses_relays(connection.endpoint)
        self._open.add(connection)
        self._per_peer[connection.remote_id] += 1

        def ended(watch: asyncio.Task[None]) -> None:
            self._watches.discard(watch)
            self._open.discard(connection)
            self._per_peer[connection.remote_id] -= 1
            if not self._per_peer[connection.remote_id]:
                del self._per_peer[connection.remote_id]
            if not watch.cancelled() and (error := watch.exception()) is not None:
                _log.debug("watching %r failed: %s", connection, error)

        watch = connection.watch()
        self._watches.add(watch)
        watch.add_done_callback(ended)

    def close(self) -> None:
        """Closes all of them, and watches no more."""
        for watch in self._watches:
            watch.cancel()
        for connection in self:
            connection.close()
