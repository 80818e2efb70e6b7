"""When something happens: the time, and the coordinator's state as last told. No I/O.

Every input becomes a :class:`Moment`, which is passed down to whatever depends on it. Only
:class:`~.rounds.Rounds` keeps the latest one, to make the next one of it; nothing else here remembers the time or the
state.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...coordinator.types import ClientState, Coordinator, NodeIdentity, RunState

__all__ = ["Moment"]


@dataclass(frozen=True)
class Moment:
    """The time of an input, and the state of the run at that time.

    Attributes:
        now: monotonic time in seconds.
        state: the latest that the coordinator has told.
    """

    now: float
    state: Coordinator

    @property
    def step(self) -> int:
        """The coordinator's step."""
        return self.state.progress.step

    @property
    def clients(self) -> tuple[NodeIdentity, ...]:
        """The clients of the epoch, in the order of its list."""
        return tuple(client.id for client in self.state.epoch_state.clients)

    def is_same_phase(self, other: Moment) -> bool:
        """Whether the run is still where it was, however its list has changed."""
        ours, theirs = self.state, other.state
        return (ours.run_state, ours.progress) == (theirs.run_state, theirs.progress)

    def is_in(self, *run_states: RunState) -> bool:
        """Whether the run is in one of these phases."""
        return self.state.run_state in run_states

    def lists(self, client: NodeIdentity) -> bool:
        """Whether ``client`` is in the list of the epoch."""
        return any(listed.id == client for listed in self.state.epoch_state.clients)

    def present(self, clients: Iterable[NodeIdentity]) -> set[NodeIdentity]:
        """Those of ``clients`` that have not left, or been dropped, in the meantime."""
        healthy = {c.id for c in self.state.epoch_state.clients if c.state is ClientState.HEALTHY}
        return healthy.intersection(clients)
