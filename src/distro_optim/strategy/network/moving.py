"""The link of a host's own peer to the coordinator: in this process at first, and to another host once one is there."""

from __future__ import annotations

from collections.abc import AsyncIterator

from typing_extensions import override

from ...coordinator.client.interface import CoordinatorClient
from ...coordinator.client.remote import RemoteCoordinator
from ...coordinator.client.state_feed import StateFeed
from ...coordinator.messages import ClientToServerMessage
from ...coordinator.server.in_process import InProcessClient, InProcessCoordinator
from ...coordinator.types import Coordinator, NodeIdentity

__all__ = ["MovingCoordinator"]


class MovingCoordinator(CoordinatorClient):
    """A participant whose coordinator may move out of this process. Its states come from one feed all the time.

    Args:
        coordinator: of this process.
        identity: of the participant.
        run_id: the run to join.

    Attributes:
        feed: where the states go.
    """

    def __init__(self, coordinator: InProcessCoordinator, identity: NodeIdentity, run_id: str) -> None:
        self.run_id = run_id
        self.identity = identity
        self.feed = StateFeed()
        self._coordinator = coordinator
        self._link: CoordinatorClient = InProcessClient(coordinator, identity, run_id, feed=self.feed)

    def move(self, link: RemoteCoordinator) -> None:
        """From now on the coordinator is elsewhere; ``link`` has :attr:`feed`, and was not used yet."""
        self._coordinator.leave(self.identity)  # without its feed this coordinator ends it no more
        self._link = link
        link.follow()

    @property
    @override
    def state(self) -> Coordinator | None:
        return self._link.state

    @property
    @override
    def connected(self) -> bool:
        return self._link.connected

    @property
    @override
    def gives_up_after(self) -> float | None:
        return self._link.gives_up_after

    @override
    async def look(self) -> Coordinator:
        return await self._link.look()

    @override
    async def join(self) -> Coordinator:
        return await self._link.join()

    @override
    def states(self) -> AsyncIterator[Coordinator]:
        return self.feed.read()

    @override
    async def send(self, message: ClientToServerMessage) -> None:
        await self._link.send(message)

    @override
    async def close(self) -> None:
        await self._link.close()
