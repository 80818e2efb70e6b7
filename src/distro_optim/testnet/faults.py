"""What goes wrong in a test network, and when: plain data, like "kill peer 1 at step 40"."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from typing_extensions import override

from ..errors import ConfigurationError

__all__ = ["Fault", "FaultPlan", "Join", "Kill", "KillHost", "Restart", "RestartHost", "parse_peer_at_step"]


@dataclass(frozen=True, kw_only=True)
class Kill:
    """Peer number ``peer`` gets ``kill -9`` once the run has come to ``step``."""

    peer: int
    step: int

    @override
    def __str__(self) -> str:
        return f"peer {self.peer} is killed with -9 at step {self.step}"


@dataclass(frozen=True, kw_only=True)
class Restart:
    """A peer that was killed is started again, with nothing of before."""

    peer: int
    step: int

    @override
    def __str__(self) -> str:
        return f"peer {self.peer} is started again at step {self.step}"


@dataclass(frozen=True, kw_only=True)
class KillHost:
    """The peer that hosts by then gets ``kill -9`` once the run has come to ``step``."""

    step: int

    @override
    def __str__(self) -> str:
        return f"the host is killed with -9 at step {self.step}"


@dataclass(frozen=True, kw_only=True)
class RestartHost:
    """The peer that was killed as the host is started again, with nothing of before, and joins."""

    step: int

    @override
    def __str__(self) -> str:
        return f"the host of before is started again at step {self.step}"


@dataclass(frozen=True, kw_only=True)
class Join:
    """One peer more joins; it gets the next free number."""

    step: int

    @override
    def __str__(self) -> str:
        return f"a peer joins at step {self.step}"


Fault = Kill | Restart | KillHost | RestartHost | Join


def parse_peer_at_step(text: str) -> tuple[int, int]:
    """Reads ``PEER@STEP``.

    Raises:
        ConfigurationError: it is something else.
    """
    peer, at, step = text.partition("@")
    if not (at and peer.isdecimal() and step.isdecimal()):
        raise ConfigurationError(
            f"{text!r} is not of the form PEER@STEP: 1@40 means peer 1 at step 40", name="fault", value=text
        )
    return int(peer), int(step)


class FaultPlan:
    """Faults in the order of their steps.

    Args:
        faults: any order.
        peers: in the run at the start.

    Raises:
        ConfigurationError: a fault concerns a peer that is not there, or not down, at its step.
    """

    def __init__(self, faults: Iterable[Fault], *, peers: int) -> None:
        self._pending = sorted(faults, key=lambda fault: fault.step)
        up, joined, hosts_down = set(range(peers)), peers, 0
        for fault in self._pending:
            match fault:
                case Join():
                    up.add(joined)
                    joined += 1
                case Kill(peer=peer):
                    if peer not in up:
                        raise ConfigurationError(
                            f"{fault}, but then no peer of that number is running; peers are counted from 0",
                            name="kill",
                            value=fault,
                        )
                    up.remove(peer)
                case Restart(peer=peer):
                    if peer in up or peer >= joined:
                        raise ConfigurationError(f"{fault}, but it was not killed before", name="restart", value=fault)
                    up.add(peer)
                case KillHost():
                    hosts_down += 1
                case RestartHost():
                    hosts_down -= 1
                    if hosts_down < 0:
                        raise ConfigurationError(f"{fault}, but it was not killed before", name="restart", value=fault)
        self.fewest_peers = _fewest(self._pending, peers)
        """How many peers run at the worst time."""

    @property
    def pending(self) -> tuple[Fault, ...]:
        """Those that have not happened yet."""
        return tuple(self._pending)

    def due(self, step: int) -> list[Fault]:
        """Those whose step has come; each is given once."""
        now = [fault for fault in self._pending if fault.step <= step]
        self._pending = self._pending[len(now) :]
        return now


def _fewest(faults: Iterable[Fault], peers: int) -> int:
    fewest = peers
    for fault in faults:
        peers += -1 if isinstance(fault, Kill | KillHost) else 1
        fewest = min(fewest, peers)
    return fewest
