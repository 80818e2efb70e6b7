"""Bytes and rates of each peer, over all its connections, those that have ended included."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from ..meter import RateMeter
from .connection import Connection

__all__ = ["PeerTraffic", "TrafficMonitor"]

_MAX_PEERS: Final = 4096
"""As many peers as the address book holds; at some 3 kB each."""


@dataclass
class PeerTraffic:
    """UDP payload to and from one peer."""

    sent: RateMeter = field(default_factory=RateMeter)
    received: RateMeter = field(default_factory=RateMeter)


class TrafficMonitor:
    """Adds up what connections count; :meth:`sample` it every second or so, and before reading.

    Args:
        max_peers: beyond it, the peer not heard of for longest is forgotten.
    """

    def __init__(self, max_peers: int = _MAX_PEERS) -> None:
        self._max_peers = max_peers
        self._peers: OrderedDict[bytes, PeerTraffic] = OrderedDict()
        # What each connection had counted when last looked at. Kept until its end was seen, for the last bytes.
        self._counted: dict[Connection, tuple[int, int]] = {}

    @property
    def peers(self) -> dict[bytes, PeerTraffic]:
        """Traffic by endpoint id."""
        return dict(self._peers)

    def sample(self, connections: list[Connection], now: float, *, exact: bool = True) -> None:
        """Takes note of what ``connections``, all that are open, have carried up to ``now``.

        Args:
            connections: as above.
            now: loop time.
            exact: asks each of them; else takes what the node's watch has seen last, a second ago at most.
        """
        open_now = set(connections)
        for connection in [*connections, *(known for known in self._counted if known not in open_now)]:
            ask = exact or connection not in open_now
            now_sent, now_received = connection.traffic() if ask else connection.counted
            sent, received = self._counted.get(connection, (0, 0))
            traffic = self._traffic(connection.remote_id)
            if now_sent > sent:
                traffic.sent.add(now_sent - sent, now)
            if now_received > received:
                traffic.received.add(now_received - received, now)
            if connection in open_now:
                # The watch may have looked before we asked last.
                self._counted[connection] = (max(sent, now_sent), max(received, now_received))
            else:
                del self._counted[connection]

    def _traffic(self, peer: bytes) -> PeerTraffic:
        traffic = self._peers.setdefault(peer, PeerTraffic())
        self._peers.move_to_end(peer)
        while len(self._peers) > self._max_peers:
            self._peers.popitem(last=False)
        return traffic
