"""What a member of a run hears by gossip, told to those that may watch, over a connection for nothing else.

They are in no gossip: no message of theirs is passed on, nobody's tree of messages leads through them, and none of them
takes a member's place among the neighbours of another. One stream a connection::

    watching   -> u8 0                                        the version
    member     <- u8 channel, u32 length, sealed message      each announcement, for as long as both like
                     0 the run's, 1 of our own kind

Numbers are big-endian. What is told are the announcements of members, sealed as they came, and the member's own. One
that reads too slowly misses the oldest.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Final

from ....errors import LimitExceededError, PeerRefusedError, ProtocolError
from ...announcements import MAX_ANNOUNCEMENT
from ...carrying import MAX_CARRYING
from ...signing import SignedMessage
from ...swarm import Channel
from ..connection import Connection
from ..endpoint import Node

__all__ = ["FEED_ALPN", "MAX_UNTOLD", "FeedDesk", "read_feed"]

FEED_ALPN: Final = b"distro-optim/feed/0"

MAX_UNTOLD: Final = 1 << 20
"""Bytes that wait for one that watches. Some minutes of a run of a hundred peers. Chosen arbitrarily."""

SECONDS: Final = 10.0
"""For the first byte, and for a piece to be taken. Chosen arbitrarily."""

_VERSION: Final = b"\0"
_HEADER: Final = struct.Struct(">BI")
_CHANNELS: Final = (Channel.RUN, Channel.OWN_KIND)
_MAX_SEALED: Final = {
    Channel.RUN: SignedMessage.size_with(MAX_ANNOUNCEMENT),
    Channel.OWN_KIND: SignedMessage.size_with(MAX_CARRYING),
}


class FeedDesk:
    """Tells on a node.

    Args:
        node: who connects to it has to be let in by :meth:`.Node.set_watchers`.

    Attributes:
        watchers: public keys of those that are told; others that the node lets in are turned away.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._listeners: dict[bytes, _Listener] = {}
        self.watchers: frozenset[bytes] = frozenset()
        node.accept(FEED_ALPN, self._serve)

    @property
    def listeners(self) -> frozenset[bytes]:
        """Public keys of those that listen."""
        return frozenset(self._listeners)

    def tell(self, channel: Channel, sealed: bytes | memoryview) -> None:
        """An announcement was heard, or made."""
        if self._listeners:
            frame = _HEADER.pack(_CHANNELS.index(channel), len(sealed)) + bytes(sealed)
            for listener in self._listeners.values():
                listener.put(frame)

    def close(self) -> None:
        """Tells nobody any more."""
        self._node.refuse(FEED_ALPN)
        for listener in self._listeners.values():
            listener.end()

    async def _serve(self, connection: Connection) -> None:
        peer = connection.remote_id
        if peer not in self.watchers:
            raise PeerRefusedError(f"{peer.hex()[:10]} is not among those that watch")
        connection.limit_streams(uni=0, bi=1)
        send, recv = await connection.accept_bi(timeout=SECONDS)
        if await recv.read_exact(1, timeout=SECONDS) != _VERSION:
            raise ProtocolError("it wants another version of the feed")
        listener = _Listener()
        if (older := self._listeners.get(peer)) is not None:
            older.end()
        self._listeners[peer] = listener
        ending = asyncio.ensure_future(_end_with(connection, listener))
        try:
            while frames := await listener.take():
                await send.write(frames, timeout=SECONDS)
        finally:
            ending.cancel()
            if self._listeners.get(peer) is listener:
                del self._listeners[peer]


async def _end_with(connection: Connection, listener: _Listener) -> None:
    """While nobody says anything, nothing is written that would show that the connection is closed."""
    await connection.closed()
    listener.end()


class _Listener:
    """What waits for one that watches."""

    def __init__(self) -> None:
        self._frames: deque[bytes] = deque()
        self._size = 0
        self._ended = False
        self._news = asyncio.Event()

    def put(self, frame: bytes) -> None:
        """One more; the oldest go where there are too many."""
        self._frames.append(frame)
        self._size += len(frame)
        while self._size > MAX_UNTOLD:
            self._size -= len(self._frames.popleft())
        self._news.set()

    def end(self) -> None:
        """There is nobody to tell any more."""
        self._ended = True
        self._news.set()

    async def take(self) -> bytes:
        """All that waits, once there is something; nothing once it has ended."""
        await self._news.wait()
        if self._ended:
            return b""
        self._news.clear()
        frames = b"".join(self._frames)
        self._frames.clear()
        self._size = 0
        return frames


async def read_feed(node: Node, peer: bytes, on_open: Callable[[], None]) -> AsyncIterator[tuple[Channel, bytes]]:
    """What ``peer`` hears: sealed messages, which nobody has checked. Goes on until the connection ends.

    Args:
        node: connects.
        peer: public key of a member.
        on_open: called once it tells us.

    Raises:
        ExchangeError: it cannot be reached, turns us away, or the connection breaks.
        ProtocolError: what it says makes no sense.
    """
    connection = await node.connect(peer, FEED_ALPN)
    try:
        send, recv = await connection.open_bi(timeout=SECONDS)
        await send.write(_VERSION, timeout=SECONDS)
        on_open()
        while True:
            number, size = _HEADER.unpack(await recv.read_exact(_HEADER.size))
            if number >= len(_CHANNELS):
                raise ProtocolError(f"there is no channel {number}", field="channel")
            channel = _CHANNELS[number]
            if size > _MAX_SEALED[channel]:
                raise LimitExceededError(f"a message of {size} bytes, at most {_MAX_SEALED[channel]} may come")
            yield channel, await recv.read_exact(size)
    finally:
        connection.close()
