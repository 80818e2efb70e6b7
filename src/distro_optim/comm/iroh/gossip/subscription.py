"""What the application holds of a topic: it sends through it, and reads events from a bounded queue."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from ....errors import ConfigurationError, NodeClosedError, PeerTimeoutError
from ...addresses import EndpointAddr
from .events import Deliver, NeighborDown, NeighborUp, Publish
from .messages import PeerId, TopicId

if TYPE_CHECKING:
    from .net import GossipService

__all__ = ["Lagged", "Topic", "TopicEvent"]


@dataclass(frozen=True, slots=True)
class Lagged:
    """The application read too slowly: the oldest ``count`` events were dropped at this place."""

    count: int


TopicEvent: TypeAlias = Deliver | NeighborUp | NeighborDown | Lagged


class Topic:
    """A topic that was joined. Iterate over it for messages, or over :meth:`events`; one of both, and one reader.

    Attributes:
        id: 32 bytes.
    """

    def __init__(self, service: GossipService, topic: TopicId, capacity: int) -> None:
        self.id = topic
        self._service = service
        self._queue: deque[TopicEvent] = deque()
        self._capacity = capacity
        self._lagged = 0
        self._ready = asyncio.Event()
        self._joined = asyncio.Event()
        self._left = False

    @property
    def neighbors(self) -> tuple[PeerId, ...]:
        """Direct neighbours at this moment."""
        state = self._service.protocol.topics.get(self.id)
        return state.neighbors if state is not None else ()

    async def broadcast(self, content: bytes) -> None:
        """Sends ``content`` to everybody in the topic; waits while a neighbour's connection is congested.

        The same content within the id retention is one message: add a counter where repeats matter. It is not
        delivered to this node itself. Without a neighbour it is kept for the first one, for a while.

        Raises:
            ConfigurationError: it is longer than ``config.max_content_size``.
            NodeClosedError: the topic was left.
        """
        await self._publish(Publish(content))

    async def broadcast_neighbors(self, content: bytes) -> None:
        """Sends ``content`` to direct neighbours only. Raises as :meth:`broadcast`."""
        await self._publish(Publish(content, neighbors_only=True))

    async def joined(self, timeout: float | None = None) -> None:
        """Waits for a neighbour.

        Raises:
            PeerTimeoutError: there is none after ``timeout`` seconds.
        """
        try:
            async with asyncio.timeout(timeout):
                await self._joined.wait()
        except TimeoutError:
            raise PeerTimeoutError(f"no neighbour within {timeout} s") from None

    def add_peers(self, peers: Iterable[PeerId | EndpointAddr]) -> None:
        """Joins through further peers."""
        self._check()
        self._service._join_peers(self.id, peers)

    async def events(self) -> AsyncIterator[TopicEvent]:
        """Messages, neighbours that come and go, and gaps, until the topic is left."""
        while True:
            while not self._queue:
                if self._left:
                    return
                self._ready.clear()
                await self._ready.wait()
            if self._lagged:
                count, self._lagged = self._lagged, 0
                yield Lagged(count)
            yield self._queue.popleft()

    async def __aiter__(self) -> AsyncIterator[Deliver]:
        """Messages only, until the topic is left."""
        async for event in self.events():
            if isinstance(event, Deliver):
                yield event

    async def leave(self) -> None:
        """Says goodbye to the neighbours; readers end after what has arrived. Idempotent."""
        if not self._left:
            self._service._leave(self.id)

    async def _publish(self, event: Publish) -> None:
        self._check()
        limit = self._service.config.max_content_size
        if len(event.content) > limit:
            raise ConfigurationError(
                f"a gossip message has at most {limit} bytes, got {len(event.content)}; put large data in a blob "
                "and announce its ticket",
                name="content",
                value=len(event.content),
            )
        self._service._handle(self.id, event)
        await self._service._uncongested(self)

    def _check(self) -> None:
        if self._left:
            raise NodeClosedError("the topic was left; join it again")

    def _push(self, event: TopicEvent) -> None:
        if isinstance(event, NeighborUp):
            self._joined.set()
        elif isinstance(event, NeighborDown) and not self.neighbors:
            self._joined.clear()
        if len(self._queue) >= self._capacity:
            self._queue.popleft()
            self._lagged += 1
            self._service.stats.lagged += 1
        self._queue.append(event)
        self._ready.set()

    def _end(self) -> None:
        self._left = True
        self._ready.set()
