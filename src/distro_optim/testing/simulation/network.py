"""What lies between the peers: lines with latency and bandwidth, gossip, losses; and how many bytes went over it.

Results, models and states of the coordinator wait until a line is free, in order. Messages of gossip are a few hundred
bytes between them: they take their own time, and wait for nobody.

Gossip goes over a tree that is drawn anew for each message, as over the eager links of Plumtree; over its other links a
peer says what it has. A message that is lost on one of them does not come again by itself: who said it repeats it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

__all__ = ["Line", "SimulatedNetwork"]

BITS_PER_BYTE: Final = 8

BRANCHES: Final = 3
"""Peers to which a peer passes a message on."""

ENVELOPE_BYTES: Final = 38 + 98
"""Around a message: gossip's own (``_GOSSIP_OVERHEAD`` in ``comm/iroh/gossip/config.py``), and key, length and
signature of :class:`~distro_optim.comm.signing.SignedMessage`."""

HAVE_BYTES: Final = 6 * 35
"""For each message, that a peer has it, over the six of its eight links (``PSYCHE_GOSSIP``) outside the tree."""


@dataclass
class Line:
    """A peer's line.

    Attributes:
        distance: one-way seconds to the middle of the network.
        sent, received: bytes.
        sending_until, receiving_until: when it is free again, by direction.
    """

    distance: float
    sent: int = 0
    received: int = 0
    sending_until: float = 0.0
    receiving_until: float = 0.0


class SimulatedNetwork:
    """Lines by number.

    Args:
        latency: shortest and longest one-way seconds between two peers.
        bandwidth: bits a second of each line, in each direction.
        loss: chance that a message does not reach a peer.
        rng: where everything random comes from.
    """

    def __init__(
        self, *, latency: tuple[float, float], bandwidth: float, loss: float, rng: np.random.Generator
    ) -> None:
        self.lines: list[Line] = []
        self._latency = latency
        self._bandwidth = bandwidth
        self._loss = loss
        self._rng = rng

    def join(self) -> int:
        """One more line; its number."""
        low, high = self._latency
        self.lines.append(Line(float(self._rng.uniform(low / 2, high / 2))))
        return len(self.lines) - 1

    def latency(self, one: int, other: int) -> float:
        """One-way seconds."""
        return self.lines[one].distance + self.lines[other].distance

    def is_lost(self) -> bool:
        """Whether something is lost, this time."""
        return self._loss > 0 and float(self._rng.random()) < self._loss

    def transit(self, sender: int, receiver: int, size: int, now: float) -> float:
        """Seconds until ``size`` bytes that are sent now have arrived; takes up both lines meanwhile."""
        source, target = self.lines[sender], self.lines[receiver]
        seconds = BITS_PER_BYTE * size / self._bandwidth
        sent = max(now, source.sending_until) + seconds
        received = max(sent, target.receiving_until + seconds)
        source.sending_until, target.receiving_until = sent, received
        source.sent += size
        target.received += size
        return received - now + self.latency(sender, receiver)

    def whisper(self, sender: int, receiver: int, size: int) -> float:
        """Seconds until a small message has arrived, that waits for nobody."""
        self.lines[sender].sent += size
        self.lines[receiver].received += size
        return self.latency(sender, receiver) + BITS_PER_BYTE * size / self._bandwidth

    def gossip(self, sender: int, size: int, others: Sequence[int]) -> Iterator[tuple[int, float]]:
        """Each of ``others`` that a message of ``size`` bytes reaches, and after how many seconds."""
        order = [sender, *(others[place] for place in self._rng.permutation(len(others)).tolist())]
        lost = self._rng.random(len(order)) < self._loss if self._loss else np.zeros(len(order), dtype=bool)
        size += ENVELOPE_BYTES
        seconds = BITS_PER_BYTE * size / self._bandwidth
        lines, arrival = self.lines, [0.0] * len(order)
        for place in range(1, len(order)):
            parent = (place - 1) // BRANCHES
            source, target = lines[order[parent]], lines[order[place]]
            source.sent += size + HAVE_BYTES
            target.received += size + HAVE_BYTES
            # Behind a link that lost it the others hear of it from somebody else.
            arrival[place] = arrival[parent] + source.distance + target.distance + seconds
            if not lost[place]:
                yield order[place], arrival[place]
