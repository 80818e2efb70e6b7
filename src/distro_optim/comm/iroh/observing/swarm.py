"""The peers of a run as one that watches sees them: it hears them through a few of them, and fetches what it likes."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from typing import Any, Final

from typing_extensions import override

from ....errors import DistroError
from ...addresses import EndpointAddr
from ...announcements import Announcement
from ...swarm import Channel, check_announcement
from ..endpoint import Node
from ..gossip.feed import read_feed
from ..swarm import IrohSwarm

__all__ = ["ObservingSwarm"]

FEEDS: Final = 2
"""Members that tell us what they hear, so that one that keeps something to itself does no harm. Chosen arbitrarily."""

TURN_SECONDS: Final = 30.0
"""After which another member tells us in place of the one that told us least that was new: members that keep everything
to themselves would tell us nothing for ever. Chosen arbitrarily."""

FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 5.0
"""Seconds between two attempts to find one more: members turn us away until they have heard that we may watch."""

_log = logging.getLogger(__name__)


class ObservingSwarm(IrohSwarm):
    """See the module. It is in no gossip and announces nothing, whatever it is told to announce.

    Args:
        node, topic, **settings: see :class:`.IrohSwarm`.
    """

    def __init__(self, node: Node, topic: bytes, **settings: Any) -> None:
        super().__init__(node, topic, **settings)
        self._feeds: dict[bytes, asyncio.Task[None]] = {}
        self._left: set[asyncio.Task[None]] = set()
        self._open: set[bytes] = set()
        self._told_first: Counter[bytes] = Counter()
        """Announcements of this turn that a member told us first."""
        self._turn_ends = asyncio.get_running_loop().time() + TURN_SECONDS
        self._known: dict[bytes, None] = {}
        self._met_some = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None

    @property
    @override
    def neighbors(self) -> tuple[bytes, ...]:
        return tuple(sorted(self._open))

    @override
    async def announce(self, data: bytes, *, channel: Channel = Channel.RUN, carrying: bytes | None = None) -> None:
        self._check_open()
        check_announcement(data)

    @override
    async def announcements(self, channel: Channel = Channel.RUN) -> AsyncIterator[Announcement]:
        async for announcement in self._streams[channel]:
            yield announcement

    @override
    async def join(self, peers: Iterable[EndpointAddr]) -> None:
        self._check_open()
        others = [peer for peer in peers if peer.id != self.peer_id]
        self.node.addresses.add(peer for peer in others if not peer.is_empty)
        self._known.update(dict.fromkeys(peer.id for peer in others))
        self._met_some.set()
        if self._keeping is None:
            loop = asyncio.get_running_loop()
            self._tasks.append(loop.create_task(self._watch_traffic()))
            self._keeping = loop.create_task(self._keep_fed())
            self._tasks.append(self._keeping)

    @override
    async def aclose(self) -> None:
        # First of all what would look for others in place of those that end.
        keeping = () if self._keeping is None else (self._keeping,)
        ending = [*keeping, *self._feeds.values(), *self._left]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        await super().aclose()

    # -- inside --------------------------------------------------------------------------------------------------------

    async def _keep_fed(self) -> None:
        """Sees to it that some members tell us what they hear."""
        pause = FIRST_PAUSE
        while True:
            allowed = self.node.allowed
            for peer in [peer for peer, feed in self._feeds.items() if feed.done()]:
                del self._feeds[peer]
            self._known = {peer: None for peer in self._known if allowed is None or peer in allowed}
            if asyncio.get_running_loop().time() >= self._turn_ends:
                self._take_turns()
            missing = FEEDS - len(self._feeds)
            free = [peer for peer in self._known if peer not in self._feeds]
            for peer in self._rng.sample(free, min(len(free), max(0, missing))):
                self._feeds[peer] = asyncio.get_running_loop().create_task(self._read(peer))
            pause = FIRST_PAUSE if len(self._open) >= FEEDS else min(2 * pause, LONGEST_PAUSE)
            self._met_some.clear()
            try:
                async with asyncio.timeout(pause):
                    await self._met_some.wait()
                pause = FIRST_PAUSE
            except TimeoutError:
                pass

    def _take_turns(self) -> None:
        """Leaves the member that was of least use, if there is another one that could do better."""
        self._turn_ends = asyncio.get_running_loop().time() + TURN_SECONDS
        others = [peer for peer in self._known if peer not in self._feeds]
        if others and len(self._feeds) >= FEEDS:
            least = min(self._feeds, key=lambda peer: self._told_first[peer])
            left = self._feeds.pop(least)
            self._left.add(left)
            left.add_done_callback(self._left.discard)
            left.cancel()
            peer = self._rng.choice(others)
            self._feeds[peer] = asyncio.get_running_loop().create_task(self._read(peer))
        self._told_first.clear()

    async def _read(self, peer: bytes) -> None:
        try:
            async for channel, sealed in read_feed(self.node, peer, lambda: self._open.add(peer)):
                if self._deliver(channel, sealed):
                    self._told_first[peer] += 1
        except DistroError as error:
            _log.debug("%s does not tell us what it hears: %s", peer.hex()[:10], error)
        finally:
            self._open.discard(peer)
