"""When something happens: the time, and the coordinator's state as last told. No I/O.

Every input becomes a :class:`Moment`, which is passed down to whatever depends on it. Only
:class:`~.rounds.Rounds` keeps the latest one, to make the next one of it; nothing else here remembers the time or the
state.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

from ...coordinator.types import ClientState, Coordinator, NodeIdentity, RunState

__all__ = ["Moment", "sooner"]


def sooner(one: float | None, other: float | None) -> float | None:
    """The earlier of two times; None is never."""
    return other if one is None or (other is not None and other < one) else one


class _Listed:
    """Who is in the list of a state, as sets: every message asks for them, and a state stays for a while."""

    def __init__(self, state: Coordinator) -> None:
        self._clients = state.epoch_state.clients

    @cached_property
    def all(self) -> frozenset[NodeIdentity]:
        return frozenset(client.id for client in self._clients)

    @cached_property
    def healthy(self) -> frozenset[NodeIdentity]:
        return frozenset(client.id for client in self._clients if client.state is ClientState.HEALTHY)


class Moment:
    """The time of an input, and the state of the run at that time. Nobody changes one.

    Args:
        now: monotonic time in seconds.
        state: the latest that the coordinator has told.
        listed: who is in the list of ``state``, if that was looked up before.

    Attributes:
        now, state: as above.
    """

    # No frozen dataclass: every message makes one, and setting three attributes of those takes five times as long.
    __slots__ = ("_list", "now", "state")

    def __init__(self, now: float, state: Coordinator, listed: _Listed | None = None) -> None:
        self.now = now
        self.state = state
        self._list = listed if listed is not None else _Listed(state)

    def later(self, now: float) -> Moment:
        """The same state at another time."""
        return Moment(now, self.state, self._list)

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
        return client in self._list.all

    def present(self, clients: Iterable[NodeIdentity]) -> set[NodeIdentity]:
        """Those of ``clients`` that have not left, or been dropped, in the meantime."""
        return {client for client in clients if self.is_present(client)}

    def is_present(self, client: NodeIdentity) -> bool:
        """Whether ``client`` is in the list, and has not left or been dropped."""
        return client in self._list.healthy
