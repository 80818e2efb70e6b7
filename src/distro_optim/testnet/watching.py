"""What the reports of all peers say together: who is where, how the loss goes, and whether the weights are equal."""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field
from typing import Final

from ..strategy.rounds.trust.succession_outcomes import HOSTS_NOW
from ..strategy.run_report import ENDED, JOINED, ROUND, ReportLine

__all__ = ["Comparison", "PeerState", "PeerWatch", "SwarmWatch"]

SMOOTHING: Final = 0.1
"""How much of the loss that is shown is the newest round's."""

FINAL_ROUNDS: Final = 50
"""Rounds over which the loss at the end is the mean."""

COMPARED_ROUNDS: Final = 500
"""A round so far behind gets no more reports and is counted; bounds what is kept."""

PACE_STEPS: Final = 50
"""Over so many steps the time left is reckoned. Chosen arbitrarily."""

SHOWN_EVENTS: Final = 8
"""Lines below the table."""


class PeerState(enum.Enum):
    """Of a peer's process, as seen from outside."""

    STARTING = "starting"
    RUNNING = "in the run"
    KILLED = "killed -9"
    ENDED = "ended"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass
class PeerWatch:
    """One peer.

    Attributes:
        number: counted from 0, the host.
        last: its last line about a round or its end.
        losses: (step, loss) of every round it trained in.
        smoothed_loss: exponential mean.
        exit_code: of its process, once that has ended.
        final_hash: weights that it ended with.
    """

    number: int
    state: PeerState = PeerState.STARTING
    key: str = ""
    last: ReportLine = field(default_factory=lambda: ReportLine(kind=JOINED))
    losses: list[tuple[int, float]] = field(default_factory=list)
    rounds: int = 0
    smoothed_loss: float | None = None
    exit_code: int | None = None
    final_hash: str = ""
    _earlier: ReportLine = field(default_factory=lambda: ReportLine(kind=JOINED))

    @property
    def name(self) -> str:
        """What people call it."""
        return f"peer {self.number}"

    @property
    def has_survived(self) -> bool:
        """Whether it should be there at the end."""
        return self.state is not PeerState.KILLED

    @property
    def bytes_sent(self) -> int:
        """Of all its processes, if it was started again."""
        return self._earlier.bytes_sent + self.last.bytes_sent

    @property
    def bytes_received(self) -> int:
        """Of all its processes."""
        return self._earlier.bytes_received + self.last.bytes_received

    @property
    def ddp_bytes(self) -> int:
        """What DDP would have sent in its place."""
        return self._earlier.ddp_bytes + self.last.ddp_bytes

    @property
    def seconds_training(self) -> float:
        """Of all its processes."""
        return self._earlier.seconds_training + self.last.seconds_training

    @property
    def seconds_waiting(self) -> float:
        """Of all its processes."""
        return self._earlier.seconds_waiting + self.last.seconds_waiting

    def restarted(self) -> None:
        """A new process counts from 0."""
        self._earlier = ReportLine(
            kind=JOINED,
            bytes_sent=self.bytes_sent,
            bytes_received=self.bytes_received,
            ddp_bytes=self.ddp_bytes,
            seconds_training=self.seconds_training,
            seconds_waiting=self.seconds_waiting,
        )
        self.last = ReportLine(kind=JOINED)
        self.state, self.exit_code, self.final_hash = PeerState.STARTING, None, ""


@dataclass(frozen=True)
class Comparison:
    """Weights of different peers at the start of the same step.

    Attributes:
        compared: rounds in which at least two peers told theirs.
        differing: how many of them had two that differ.
        first_differing: step of the first of them.
    """

    compared: int
    differing: int
    first_differing: int | None


class SwarmWatch:
    """All peers. Lines go in, the picture comes out."""

    def __init__(self) -> None:
        self.peers: list[PeerWatch] = []
        self.step = 0
        """The furthest that any peer has come in training, and never beyond the last step that is trained."""
        self.total_steps = 0
        """The last step that is trained; 0 before it is known."""
        self.host = 0
        """Number of the peer that hosts, as it said itself."""
        self.run_state = ""
        self.epoch = 0
        self.waiting_peers: int | None = None
        """That wait for the next epoch, as the host last reported; None before."""
        self.events: deque[str] = deque(maxlen=SHOWN_EVENTS)
        self._pace: deque[tuple[int, float]] = deque(maxlen=PACE_STEPS)  # steps, and when they were first seen
        self._hashes: dict[int, dict[str, int]] = {}
        self._compared = 0
        self._differing: list[int] = []

    def add_peer(self) -> PeerWatch:
        """A new peer with the next number."""
        self.peers.append(PeerWatch(len(self.peers)))
        return self.peers[-1]

    def take(self, peer: PeerWatch, line: ReportLine) -> None:
        """Takes in a line of a peer's report."""
        peer.key = line.peer or peer.key
        if peer.state is PeerState.STARTING:
            peer.state = PeerState.RUNNING
        self.total_steps = line.total_steps or self.total_steps
        if HOSTS_NOW in line.text:
            self.host = peer.number
        if line.kind == JOINED:
            return
        if line.kind == ROUND:
            peer.rounds += 1
            if line.waiting_peers is not None:
                self.waiting_peers = line.waiting_peers
            if line.loss is not None:
                peer.losses.append((line.step, line.loss))
                before = line.loss if peer.smoothed_loss is None else peer.smoothed_loss
                peer.smoothed_loss = before + SMOOTHING * (line.loss - before)
            # What follows the last step shows in the weights that each ends with.
            if line.weights_hash and line.step == self.counted(line.step):
                self._compare(line.step, line.weights_hash)
            if (step := self.counted(line.step)) > self.step:
                self.step, self.run_state, self.epoch = step, line.run_state, line.epoch
                self._pace.append((step, line.time))
        if line.kind == ENDED:
            peer.final_hash = line.weights_hash
            self.run_state = line.run_state or self.run_state
        peer.last = line

    def counted(self, step: int) -> int:
        """A step as people count it: whoever asks for 600 is never told of the 601st."""
        return min(step, self.total_steps) if self.total_steps else step

    @property
    def seconds_left(self) -> float | None:
        """Until the last step, at the pace of the last ones; None if that cannot be said."""
        if len(self._pace) < 2 or self.step >= self.total_steps:
            return None
        (first, began), (last, now) = self._pace[0], self._pace[-1]
        return max(0.0, now - began) / (last - first) * (self.total_steps - last)

    @property
    def survivors(self) -> list[PeerWatch]:
        """Peers that nobody killed, or that were started again."""
        return [peer for peer in self.peers if peer.has_survived]

    @property
    def comparison(self) -> Comparison:
        """How the weights of all peers compare, over the whole run."""
        compared = self._compared + sum(1 for told in self._hashes.values() if sum(told.values()) > 1)
        differing = self._differing + [step for step, told in self._hashes.items() if len(told) > 1]
        return Comparison(compared, len(differing), min(differing, default=None))

    @property
    def equal_at_the_end(self) -> bool:
        """Whether all survivors have ended, and with the same weights."""
        return len({peer.final_hash for peer in self.survivors}) == 1 and all(p.final_hash for p in self.survivors)

    @property
    def final_loss(self) -> float | None:
        """Mean over the last rounds of all survivors; None if nobody has trained."""
        last = [
            loss
            for peer in self.survivors
            for step, loss in peer.losses[-FINAL_ROUNDS:]
            if step > self.step - FINAL_ROUNDS
        ]
        return sum(last) / len(last) if last else None

    def _compare(self, step: int, weights: str) -> None:
        told = self._hashes.setdefault(step, {})
        told[weights] = told.get(weights, 0) + 1
        for old in [old for old in self._hashes if old < self.step - COMPARED_ROUNDS]:
            told = self._hashes.pop(old)
            self._compared += sum(told.values()) > 1
            if len(told) > 1:
                self._differing.append(old)
