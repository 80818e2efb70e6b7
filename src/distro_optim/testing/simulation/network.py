"""What lies between the peers: lines with latency and bandwidth, gossip, losses; and how many bytes went over it.

Results, models and states of the coordinator wait until a line is free, in order. Messages of gossip are a few hundred
bytes between them: they take their own time, and wait for nobody.

Gossip goes over a tree that is drawn anew for each message, as over the eager links of Plumtree; over its other links a
peer says what it has. A message that is lost on one of them does not come again by itself: who said it repeats it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

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
        sending_until, receiving_until: when it is free again, by direction.
        sent, received: bytes of what went over it alone; gossip is counted for all lines together.
    """

    distance: float
    sending_until: float = 0.0
    receiving_until: float = 0.0
    sent: int = 0
    received: int = 0


class SimulatedNetwork:
    """Lines by number.

    Args:
        latency: shortest and longest one-way seconds between two peers.
        bandwidth: bits a second of each line, in each direction.
        loss: chance that a message does not reach a peer.
        rng: where everything random comes from.

    Attributes:
        lines: as above.
    """

    def __init__(
        self, *, latency: tuple[float, float], bandwidth: float, loss: float, rng: np.random.Generator
    ) -> None:
        self.lines: list[Line] = []
        # Bytes of gossip by the line's number.
        self._gossip_sent: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._gossip_received: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._distances: NDArray[np.float64] = np.zeros(0)  # of the lines
        self._latency = latency
        self._bandwidth = bandwidth
        self._loss = loss
        self._rng = rng

    def join(self) -> int:
        """One more line; its number."""
        low, high = self._latency
        line = Line(self._rng.uniform(low / 2, high / 2))
        self.lines.append(line)
        self._gossip_sent, self._gossip_received = np.append(self._gossip_sent, 0), np.append(self._gossip_received, 0)
        self._distances = np.append(self._distances, line.distance)
        return len(self.lines) - 1

    @property
    def sent(self) -> NDArray[np.int64]:
        """Bytes, by the line's number, ``(lines,) int64``."""
        return self._gossip_sent + np.array([line.sent for line in self.lines], dtype=np.int64)

    @property
    def received(self) -> NDArray[np.int64]:
        """The same of what came."""
        return self._gossip_received + np.array([line.received for line in self.lines], dtype=np.int64)

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
        self._count(sender, receiver, size)
        return received - now + self.latency(sender, receiver)

    def whisper(self, sender: int, receiver: int, size: int) -> float:
        """Seconds until a small message has arrived, that waits for nobody."""
        self._count(sender, receiver, size)
        return self.latency(sender, receiver) + BITS_PER_BYTE * size / self._bandwidth

    def gossip(self, sender: int, size: int, now: float) -> tuple[list[int], list[float]]:
        """The lines that a message of ``size`` bytes reaches, and when, in the order of these times."""
        lines = len(self.lines)
        others = self._rng.permutation(lines - 1)
        order = np.concatenate([[sender], others + (others >= sender)])  # places in the tree, the root first
        size += ENVELOPE_BYTES
        parents = (np.arange(1, lines) - 1) // BRANCHES
        seconds = self._distances[order[parents]] + self._distances[order[1:]] + BITS_PER_BYTE * size / self._bandwidth
        arrival = np.full(lines, now)
        first, last = 1, 1 + BRANCHES  # of the tree's next level
        while first < lines:
            arrival[first:last] = arrival[parents[first - 1 : last - 1]] + seconds[first - 1 : last - 1]
            first, last = last, 1 + BRANCHES * last
        self._gossip_sent += np.bincount(order[parents], minlength=lines) * (size + HAVE_BYTES)
        self._gossip_received[order[1:]] += size + HAVE_BYTES
        reached = np.arange(1, lines)
        if self._loss:
            # Behind a link that lost it the others hear of it from somebody else.
            reached = reached[self._rng.random(lines - 1) >= self._loss]
        reached = reached[arrival[reached].argsort(kind="stable")]
        return order[reached].tolist(), arrival[reached].tolist()

    def forget_counts(self) -> None:
        """Nothing was sent so far."""
        self._gossip_sent[:] = self._gossip_received[:] = 0
        for line in self.lines:
            line.sent = line.received = 0

    def _count(self, sender: int, receiver: int, size: int) -> None:
        self.lines[sender].sent += size
        self.lines[receiver].received += size
