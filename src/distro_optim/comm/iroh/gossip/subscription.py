"""What the application holds of a topic: it sends through it, and reads events from a bounded queue."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from ....errors import ConfigurationError, NodeClosedError, PeerTimeoutError
from ...addresses import EndpointAddr
from .events import Deliver, NeighborDown, NeighborUp, Publish
from .messages import PeerId, TopicId

__all__ = ["Lagged", "Topic", "TopicEvent", "TopicOwner"]


@dataclass(frozen=True, slots=True)
class Lagged:
    """The application read too slowly: the oldest ``count`` events were dropped at this place."""

    count: int


TopicEvent: TypeAlias = Deliver | NeighborUp | NeighborDown | Lagged


class TopicOwner(Protocol):
    """What a topic needs of the service it belongs to. Called on the event loop."""

    def max_content_of(self, topic: TopicId) -> int:
        """Bytes of a message's content in ``topic``, at most."""

    def neighbors_of(self, topic: TopicId) -> tuple[PeerId, ...]:
        """Direct neighbours in ``topic`` at this moment; none if it was left."""

    def on_join_peers(self, topic: TopicId, peers: Iterable[PeerId | EndpointAddr]) -> None:
        """The application knows further peers of ``topic``."""

    def on_publish(self, topic: TopicId, event: Publish) -> None:
        """The application sends something in ``topic``."""

    def on_leave(self, topic: TopicId) -> None:
        """The application leaves ``topic``; the owner ends its events."""

    async def uncongested(self, topic: TopicId) -> None:
        """Returns once the connections of at most half of the neighbours in ``topic`` are congested."""


class Topic:
    """A topic that was joined. Iterate over it for messages, or over :meth:`events`; one of both, and one reader.

    Attributes:
        id: 32 bytes.
    """

    def __init__(self, owner: TopicOwner, topic: TopicId, capacity: int) -> None:
        self.id = topic
        self._owner = owner
        self._queue: deque[TopicEvent] = deque()
        self._capacity = capacity
        self._lagged = 0
        self._ready = asyncio.Event()
        self._joined = asyncio.Event()
        self._left = False

    @property
    def neighbors(self) -> tuple[PeerId, ...]:
        """Direct neighbours at this moment."""
        return self._owner.neighbors_of(self.id)

    async def broadcast(self, content: bytes) -> None:
        """Sends ``content`` to everybody in the topic; waits while most neighbours' connections are congested.

        The same content within the id retention is one message: add a counter where repeats matter. It is not
        delivered to this node itself. Without a neighbour it is kept for the first one, for a while.

        Raises:
            ConfigurationError: it is longer than messages of the topic may be (``config.max_content_size``).
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
        self._owner.on_join_peers(self.id, peers)

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
            self._owner.on_leave(self.id)

    async def _publish(self, event: Publish) -> None:
        self._check()
        limit = self._owner.max_content_of(self.id)
        if len(event.content) > limit:
            raise ConfigurationError(
                f"a gossip message has at most {limit} bytes, got {len(event.content)}; put large data in a blob "
                "and announce its ticket",
                name="content",
                value=len(event.content),
            )
        self._owner.on_publish(self.id, event)
        await self._owner.uncongested(self.id)

    def _check(self) -> None:
        if self._left:
            raise NodeClosedError("the topic was left; join it again")

    def on_event(self, event: TopicEvent) -> None:
        """The owner has something for the reader; the oldest events make room."""
        if isinstance(event, NeighborUp):
            self._joined.set()
        elif isinstance(event, NeighborDown) and not self.neighbors:
            self._joined.clear()
        if len(self._queue) >= self._capacity:
            self._queue.popleft()
            self._lagged += 1
        self._queue.append(event)
        self._ready.set()

    def on_end(self) -> None:
        """Nothing comes any more."""
        self._left = True
        self._ready.set()
