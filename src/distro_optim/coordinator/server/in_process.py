"""Participants in the coordinator's own process: no bytes, but the same rules and the same interface. No I/O.

A state is a frozen dataclass, so a participant here gets the very object that the host keeps. Two coordinators take
such participants: an :class:`~.embedded.EmbeddedCoordinator`, which has no others, and a
:class:`~.server.CoordinatorServer`, with which a host joins its own run.

What protects a server from strangers does not apply to them: they need not prove a key, and no limit on their messages
drops them. What keeps the run sound does: each join and each message goes through the :class:`~.host.RunHost`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable

from typing_extensions import override

from ...errors import ConfigurationError, CoordinatorLinkError, JoinRefusedError
from ..client.interface import CoordinatorClient
from ..client.state_feed import StateFeed
from ..messages import ClientToServerMessage, Join
from ..types import Coordinator, NodeIdentity, RunState
from .host import Event, PhaseChanged, Refused, RunHost

__all__ = ["InProcessClient", "InProcessCoordinator", "LocalParticipants"]


class InProcessCoordinator(ABC):
    """A coordinator as a participant in its process sees it. Call it on the coordinator's own event loop."""

    @property
    @abstractmethod
    def state(self) -> Coordinator:
        """The present state of the run."""

    @abstractmethod
    def join(self, identity: NodeIdentity, run_id: str, feed: StateFeed) -> Coordinator:
        """Takes a participant in; returns the present state, which is also the first one in ``feed``.

        Raises:
            JoinRefusedError: another run is hosted here, or the run does not want this participant.
            ConfigurationError: it is in already.
        """

    @abstractmethod
    async def receive(self, identity: NodeIdentity, message: ClientToServerMessage) -> None:
        """Takes a message of a participant and then lets other tasks run, so that no sender can hold them up."""

    @abstractmethod
    def leave(self, identity: NodeIdentity) -> None:
        """Lets a participant go. Calling it again does nothing."""


class LocalParticipants:
    """The participants of this process, each with the feed that it reads the states from.

    Args:
        host: the run that they are in.
    """

    def __init__(self, host: RunHost) -> None:
        self._host = host
        self._feeds: dict[NodeIdentity, StateFeed] = {}

    def __contains__(self, identity: object) -> bool:
        return identity in self._feeds

    def join(self, identity: NodeIdentity, run_id: str, feed: StateFeed, now: int, seed: int) -> list[Event]:
        """Takes a participant in and gives it the present state; ``now`` in Unix seconds.

        Raises:
            JoinRefusedError: the host refuses it.
            ConfigurationError: it is in already.
        """
        if identity in self._feeds:
            raise ConfigurationError(f"client {identity} is in this run already", name="identity", value=identity)
        events = self._host.receive(identity, Join(run_id), now, seed)
        for event in events:
            if isinstance(event, Refused):
                hosted = self._host.state.run_id
                raise JoinRefusedError(
                    f"{event.reason} (asked for {run_id!r})",
                    wanted=run_id,
                    hosted=hosted if hosted != run_id else None,
                )
        self._host.trust(identity)
        self._feeds[identity] = feed
        feed.put(self._host.state)
        return events

    def leave(self, identity: NodeIdentity) -> list[Event]:
        """Lets a participant go."""
        return self._host.disconnect(identity) if self._feeds.pop(identity, None) is not None else []

    def rejoin(self, events: Iterable[Event], now: int) -> list[Event]:
        """If these events say that the run waits for members again, all ask to be in it, as a remote client does.

        A participant that the run has dropped would stay outside otherwise.
        """
        if not any(isinstance(e, PhaseChanged) and e.after is RunState.WAITING_FOR_MEMBERS for e in events):
            return []
        join = Join(self._host.state.run_id)
        return [event for identity in self._feeds for event in self._host.receive(identity, join, now, 0)]

    def publish(self) -> None:
        """Gives the present state to all."""
        for feed in self._feeds.values():
            feed.put(self._host.state)

    def end(self, error: Exception | None = None) -> None:
        """No state will follow; readers get ``error``, if there is one."""
        for feed in self._feeds.values():
            feed.end(error)


class InProcessClient(CoordinatorClient):
    """A participant in the coordinator's own process.

    Args:
        coordinator: of the run.
        identity: of the participant.
        run_id: the run to join.
        feed: where states go; a new one if None.
    """

    def __init__(
        self, coordinator: InProcessCoordinator, identity: NodeIdentity, run_id: str, *, feed: StateFeed | None = None
    ) -> None:
        self.run_id = run_id
        self.identity = identity
        self._coordinator = coordinator
        self._feed = feed or StateFeed()
        self._looks = False
        self._joined = False
        self._closed = False

    @property
    @override
    def state(self) -> Coordinator | None:
        return self._coordinator.state if self._looks and not self._joined else self._feed.latest

    @override
    async def look(self) -> Coordinator:
        if self._looks or self._joined or self._closed:
            raise ConfigurationError("look() is called once, before join() and close()")
        state = self._coordinator.state
        if state.run_id != self.run_id:
            raise JoinRefusedError(
                f"this process hosts the run {state.run_id!r}, not {self.run_id!r}",
                wanted=self.run_id,
                hosted=state.run_id,
            )
        self._looks = True
        return state

    @override
    async def join(self) -> Coordinator:
        if self._joined or self._closed:
            raise ConfigurationError("join() is called once, before close()")
        state = self._coordinator.join(self.identity, self.run_id, self._feed)
        self._joined = True
        return state

    @override
    def states(self) -> AsyncIterator[Coordinator]:
        return self._feed.read()

    @override
    async def send(self, message: ClientToServerMessage) -> None:
        if not self._joined or self._closed:
            raise CoordinatorLinkError(
                "no message can go to the coordinator: " + ("closed" if self._closed else "not joined")
            )
        await self._coordinator.receive(self.identity, message)

    @override
    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._feed.end()
        if self._joined:
            self._coordinator.leave(self.identity)
