"""What a simulation cost."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from .liars import LIARS
from .run import SimulatedRun

__all__ = ["Outcome", "as_table", "outcome_of"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One simulation. Everything but the CPU seconds follows from the options and is the same each time.

    Attributes:
        peers: honest ones that were there at the beginning.
        rounds: that were timed, the first two left out, in which there is nothing to apply. What is counted for a round
            is counted from the first one on; the warm-up is left out.
        round_seconds: virtual seconds of a round in the middle; half of the rounds take longer.
        slowest_round: virtual seconds of the longest one.
        bytes_sent, bytes_received: of a peer in a round on the average, the host left out.
        host_bytes_sent: of the host in a round, as coordinator and as peer together.
        cpu_seconds: measured, of a peer in a round, on the average: rounds, codec, merging, a small model.
        host_cpu_seconds: measured, of the coordinator in a round.
        requests: for blobs, for each one that a peer has fetched.
        loss: of the host's model at the end, where it began with ``first_loss``.
        equal: all honest peers had equal weights whenever two of them hashed those of the same step.
        lost_weights: how often an honest peer found that its weights are not the run's.
        dropped: messages and results that honest peers did not take, by reason.
        refused: messages that the coordinator did not take.
        events: of the simulation.
    """

    peers: int
    rounds: int
    round_seconds: float
    slowest_round: float
    bytes_sent: float
    bytes_received: float
    host_bytes_sent: float
    cpu_seconds: float
    host_cpu_seconds: float
    requests: float
    first_loss: float
    loss: float
    equal: bool
    lost_weights: int
    dropped: dict[str, int]
    refused: int
    events: int

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def outcome_of(run: SimulatedRun) -> Outcome:
    """The figures of a run that has ended."""
    honest = [peer for peer in run.peers if type(peer) not in LIARS]
    guests = [peer.number for peer in honest[1:]] or [0]
    times = [run.began[step] for step in sorted(run.began)]
    rounds = [end - begin for begin, end in pairwise(times)]
    settled = rounds[2:] or rounds
    count = max(1, len(times))
    fetched = sum(peer.seen["results fetched"] for peer in honest)
    hashes: dict[int, set[tuple[bytes, ...]]] = {}
    for peer in honest:
        for step, digests in peer.digests.items():
            hashes.setdefault(step, set()).add(digests)
    dropped: Counter[str] = Counter()
    for peer in honest:
        dropped.update({reason.name: number for reason, number in peer.rounds.dropped.items()})
    return Outcome(
        peers=run.options.peers,
        rounds=len(settled),
        round_seconds=statistics.median(settled),
        slowest_round=max(settled),
        bytes_sent=float(run.network.sent[guests].mean()) / count,
        bytes_received=float(run.network.received[guests].mean()) / count,
        host_bytes_sent=float(run.network.sent[0]) / count,
        cpu_seconds=statistics.mean(peer.cpu for peer in honest) / count,
        host_cpu_seconds=run.host_cpu / count,
        requests=sum(peer.seen["requests"] for peer in honest) / max(1, fetched),
        first_loss=run.first_loss,
        loss=run.peers[0].model.loss(),
        equal=all(len(different) == 1 for different in hashes.values()),
        lost_weights=sum(peer.seen["lost the run's weights"] for peer in honest),
        dropped=dict(sorted(dropped.items())),
        refused=run.refused,
        events=run.queue.count,
    )


HEADER = (
    f"{'peers':>5} {'round':>8} {'slowest':>8} {'sent':>9} {'received':>9} {'host sent':>9} "
    f"{'CPU':>7} {'host CPU':>8} {'requests':>8}  weights"
)


def as_table(outcomes: Sequence[Outcome]) -> list[str]:
    """Lines to be printed: the header, and one for each outcome. Bytes and CPU are of one peer in one round."""
    return [HEADER, *map(row_of, outcomes)]


def row_of(outcome: Outcome) -> str:
    """One line of :func:`as_table`."""
    weights = "equal" if outcome.equal else "DIFFER"
    if outcome.lost_weights:
        weights += f", lost {outcome.lost_weights} times"
    return (
        f"{outcome.peers:5} {outcome.round_seconds:6.2f} s {outcome.slowest_round:6.2f} s "
        f"{_bytes(outcome.bytes_sent):>9} {_bytes(outcome.bytes_received):>9} {_bytes(outcome.host_bytes_sent):>9} "
        f"{1000 * outcome.cpu_seconds:4.0f} ms {1000 * outcome.host_cpu_seconds:5.0f} ms "
        f"{outcome.requests:8.2f}  {weights}"
    )


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"
