"""Whom to ask next for a part of the model: the fastest peer that is free and has not failed too often. No I/O.

The rule is that of Psyche's clients (``shared/client/src/state/init.rs``): peers with a measured bandwidth first, the
faster the better, then those not measured, then those measured at nothing; five errors exclude a peer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from typing import Final

__all__ = ["SharingPeers"]

_MAX_ERRORS: Final = 5


@dataclass
class _Peer:
    order: int
    latency: float
    bandwidth: float | None = None
    errors: int = 0
    busy: bool = False

    @property
    def rank(self) -> tuple[int, float, float, int]:
        """Lower is better."""
        if self.bandwidth is None:
            return 1, 0.0, self.latency, self.order
        if self.bandwidth <= 0:
            return 2, 0.0, self.latency, self.order
        return 0, -self.bandwidth, self.latency, self.order


class SharingPeers:
    """The peers that may share the model, each asked by one request at a time.

    Args:
        peers: endpoint ids; repetitions do not count.
        latencies: round-trip seconds where known.
        max_errors: a peer with so many errors is asked no more.
    """

    def __init__(
        self, peers: Iterable[bytes], *, latencies: dict[bytes, float] | None = None, max_errors: int = _MAX_ERRORS
    ) -> None:
        known = latencies or {}
        self._max_errors = max_errors
        self._peers = {peer: _Peer(order, known.get(peer, inf)) for order, peer in enumerate(dict.fromkeys(peers))}

    @property
    def exhausted(self) -> bool:
        """Whether no peer is left to ask, busy ones included."""
        return not self._peers

    def take(self) -> bytes | None:
        """The best free peer, taken until :meth:`give_back`; None if all are busy or excluded."""
        free = [(entry.rank, peer) for peer, entry in self._peers.items() if not entry.busy]
        if not free:
            return None
        peer = min(free)[1]
        self._peers[peer].busy = True
        return peer

    def give_back(self, peer: bytes) -> None:
        """The peer may be asked again."""
        if peer in self._peers:
            self._peers[peer].busy = False

    def measured(self, peer: bytes, bandwidth: float) -> None:
        """A download from the peer ran at ``bandwidth`` bytes a second."""
        if peer in self._peers:
            self._peers[peer].bandwidth = bandwidth

    def failed(self, peer: bytes) -> None:
        """The peer did not answer, refused, or sent something wrong."""
        entry = self._peers.get(peer)
        if entry is None:
            return
        entry.bandwidth = 0.0
        entry.errors += 1
        if entry.errors >= self._max_errors:
            del self._peers[peer]
