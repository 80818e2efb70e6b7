"""The connections to one peer, as gossip uses them: frames go out in order, frames come in from everywhere.

Rules of n0-computer/iroh-gossip ``src/net.rs``: each side sends on one-way streams, one per topic, on the connection
that *it* came to know last; when both dialled at once there are two, and messages arrive on both.

Where we differ: there the end of the connection used for sending is the end of the link, even if another is open;
here that of the last one is. And a connection that does not answer is left as soon as there is another, an older one or
one that the owner dials for that; what was sent on it unanswered is sent again, and gossip drops what comes twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from ....errors import DistroError, ExchangeError, PeerTimeoutError, ProtocolError, StreamStoppedError
from ..connection import Connection, RecvStream, SendStream
from ..endpoint import CLOSE_PROTOCOL_ERROR
from .frames import FrameReader, encode_header
from .messages import PeerId, TopicId

__all__ = ["LinkLimits", "LinkOwner", "PeerLink"]

_log = logging.getLogger(__name__)

_READ_SIZE: Final = 64 << 10
"""One read asks for this much at most: some sixty messages of a kilobyte, a few milliseconds of work between two turns
of the event loop."""

_FIRST_READ: Final = 8 << 10
"""And for this much as long as no more comes: the package zeroes as much memory as a read asks for, which drives out of
the processor's cache what comes next. Twice the longest message."""

_WRITE_SIZE: Final = 256 << 10
"""One write carries at most this much, so that its time limit means a rate."""

_RECENT_SECONDS: Final = 5.0
_RECENT_BYTES: Final = 64 << 10
"""What was sent is kept for so long, and so much of it, in case that the connection was not answered any more: it is
left after two seconds of silence. Chosen with room to spare; with all links together 16 MiB."""

_MARGIN_SECONDS: Final = 1.0
"""A connection's silence is noticed between two looks at it; what was sent so long before may be lost, too."""

_CLOSE_OK: Final = 0
"""Close code of iroh-gossip, which gives it no meaning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkLimits:
    """What one peer may cost us. All chosen by us; iroh-gossip has no such bounds.

    Attributes:
        outbox: bytes that wait to be sent to a neighbour; one that lets them grow beyond is cut off.
        stranger_outbox: the same for a peer that is not a neighbour, which has no business with payloads.
        stall_seconds: time for one write of at most 256 KiB.
        header_seconds: time for a new stream to say its topic.
        streams: streams of the peer at a time; a peer needs one per topic.
        stream_rate: new streams a second, in the long run.
        stream_burst: new streams at once, with a new connection too. An honest peer opens a new one when it talks to us
            again after one of us was nobody's neighbour any more, which is at the start, when all look for neighbours:
            28 at the most, of 16 that each ask eight others ten times a second for four seconds, and nine if each asks
            once (``tests/gossip/test_streams_of_honest_peers.py``). Four times that, since peers on a busy machine
            answer late and are taken for gone.
    """

    outbox: int = 8 << 20
    stranger_outbox: int = 256 << 10
    stall_seconds: float = 15.0
    header_seconds: float = 10.0
    streams: int = 64
    stream_rate: float = 10.0
    stream_burst: float = 128.0


class LinkOwner(Protocol):
    """What a link tells the service it belongs to. Called on the event loop."""

    def on_frame(self, link: PeerLink, topic: TopicId, frame: memoryview) -> None:
        """A frame arrived; raises ProtocolError if it is not a message."""

    def on_lost(self, link: PeerLink) -> None:
        """The last connection has ended."""

    def on_silence(self, link: PeerLink) -> None:
        """The connection used for sending does not answer, and there is no other one that does."""

    def on_offence(self, link: PeerLink, reason: str) -> None:
        """The peer broke a rule or a limit; the owner closes the link."""

    def is_neighbor(self, peer: PeerId) -> bool:
        """Whether any topic wants a connection to ``peer``."""


@dataclass(slots=True, eq=False)
class _Channel:
    """One connection: our streams on it by topic, and the peer's tokens for opening streams."""

    connection: Connection
    streams: dict[TopicId, SendStream]
    tokens: float
    refilled: float
    open_streams: int = 0


class PeerLink:
    """Everything we send to and receive from one peer.

    Args:
        max_message_size, sizes: see :class:`~.frames.FrameReader`.

    Attributes:
        peer: its id.
        last_used: loop time of the last frame in either direction.
        queued: bytes waiting to be sent.
    """

    def __init__(
        self, peer: PeerId, owner: LinkOwner, limits: LinkLimits, max_message_size: int, sizes: Mapping[TopicId, int]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.peer = peer
        self.last_used = self._loop.time()
        self.queued = 0
        self._owner = owner
        self._limits = limits
        self._max_message_size, self._sizes = max_message_size, sizes
        self._outbox: deque[tuple[TopicId, bytes | None]] = deque()
        self._channels: list[_Channel] = []
        self._recent: deque[tuple[float, TopicId, bytes]] = deque()
        self._recent_bytes = 0
        self._is_held = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._work = asyncio.Event()
        self._connected = asyncio.Event()
        self._drained = asyncio.Event()
        self._drained.set()
        # That of a stranger until more is needed, so that not every frame asks whether the peer is a neighbour.
        self._allowance = limits.stranger_outbox
        self._closed = False
        self._spawn(self._write_loop())

    @property
    def is_connected(self) -> bool:
        """Whether a connection to the peer is open."""
        return bool(self._channels)

    @property
    def is_silent(self) -> bool:
        """Whether the connection used for sending is open and does not answer."""
        return bool(self._channels) and self._channels[-1].connection.is_silent

    # -- sending -------------------------------------------------------------------------------------------------------

    def send(self, topic: TopicId, frame: bytes) -> None:
        """Queues a frame. Too many of them waiting is an offence of the peer, which does not read."""
        self._outbox.append((topic, frame))
        self.queued += len(frame)
        self._drained.clear()
        self._work.set()
        if self.queued > self._allowance:
            if self._owner.is_neighbor(self.peer):
                self._allowance = self._limits.outbox
            if self.queued > self._allowance:
                self._offend(f"does not read: {self.queued} bytes wait for it")

    def finish(self, topic: TopicId) -> None:
        """Ends the stream of ``topic`` once what was queued before is out."""
        self._outbox.append((topic, None))
        self._drained.clear()
        self._work.set()

    async def drain(self) -> None:
        """Waits until nothing is queued, or the link is closed."""
        await self._drained.wait()

    # -- connections ---------------------------------------------------------------------------------------------------

    def add(self, connection: Connection) -> None:
        """Takes a new connection, and sends on it from now on."""
        connection.limit_streams(uni=self._limits.streams)
        channel = _Channel(connection, {}, self._limits.stream_burst, self._loop.time())
        left = self._leave_silent()
        if self._channels:
            self._channels[-1].connection.awaiting = 0
        connection.awaiting = 1
        self._channels.append(channel)
        if left is not None:
            left.connection.close_as_silent()
        connection.on_silence(lambda: self._on_silence(channel))
        self._connected.set()
        self._work.set()
        self._spawn(self._accept_loop(channel))
        self._spawn(self._watch(channel))

    def hold(self, held: bool) -> None:
        """While the owner dials for a link, it is not lost if its last connection ends; what is to be sent waits."""
        self._is_held = held

    def close(self, code: int = _CLOSE_OK, reason: bytes = b"") -> None:
        """Ends everything at once."""
        if self._closed:
            return
        self._closed = True
        for channel in self._channels:
            channel.connection.close(code, reason)
        for task in self._tasks:
            task.cancel()
        self._outbox.clear()
        self.queued = 0
        self._drained.set()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _on_silence(self, channel: _Channel) -> None:
        if self._closed or not self._channels or self._channels[-1] is not channel:
            return
        others = [other for other in self._channels if not other.connection.is_silent]
        if not others:
            self._owner.on_silence(self)
            return
        self._leave_silent()
        self._channels.remove(others[-1])
        self._channels.append(others[-1])
        others[-1].connection.awaiting = 1
        # At once: a write may hang in it.
        channel.connection.close_as_silent()
        self._work.set()

    def _leave_silent(self) -> _Channel | None:
        """If the connection used so far does not answer, what it was sent in vain goes out once more, before all else.

        Returns:
            its channel, to be closed as soon as there is another one; None if it answers, or there is none.
        """
        if not self.is_silent:
            return None
        channel = self._channels[-1]
        since = channel.connection.unanswered_since or self._loop.time()
        lost = [(topic, frame) for sent, topic, frame in self._recent if sent >= since - _MARGIN_SECONDS]
        self._recent.clear()
        self._recent_bytes = 0
        self._outbox.extendleft(reversed(lost))
        self.queued += sum(len(frame) for _, frame in lost)
        if lost:
            self._drained.clear()
        return channel

    def _remember(self, topic: TopicId, frames: list[bytes]) -> None:
        now = self._loop.time()
        for frame in frames:
            self._recent.append((now, topic, frame))
            self._recent_bytes += len(frame)
        while self._recent and (self._recent_bytes > _RECENT_BYTES or now - self._recent[0][0] > _RECENT_SECONDS):
            self._recent_bytes -= len(self._recent.popleft()[2])

    def _offend(self, reason: str) -> None:
        if not self._closed:
            self._owner.on_offence(self, reason)

    async def _write_loop(self) -> None:
        while True:
            for older in self._channels[:-1]:
                await self._finish_streams(older)
            if not self._outbox:
                self._allowance = self._limits.stranger_outbox
                self._drained.set()
                self._work.clear()
                await self._work.wait()
                continue
            await self._connected.wait()
            topic, frames, end = self._next_batch()
            while not await self._write_batch(self._channels[-1], topic, frames, end):
                pass

    async def _write_batch(self, channel: _Channel, topic: TopicId, frames: list[bytes], end: bool) -> bool:
        """Writes what goes to one stream. False if it has to be written again, on a newer connection."""
        try:
            if frames:
                await self._write(channel, topic, frames)
            if end and (stream := channel.streams.pop(topic, None)) is not None:
                await stream.finish()
        except StreamStoppedError:
            # The peer wants no more on this stream; a later message opens another.
            channel.streams.pop(topic, None)
        except ExchangeError as error:
            if not self._channels or channel is not self._channels[-1]:
                # A peer that was restarted dials us while its old connection hangs.
                await self._connected.wait()
                return False
            if isinstance(error, PeerTimeoutError):
                self._offend(f"does not read: a write took more than {self._limits.stall_seconds} s")
                return True
            # The watcher of the connection has the last word: it ends this task, or goes on with another one.
            _log.debug("writing to %s: %s", self.peer.hex()[:10], error)
            await channel.connection.closed()
        return True

    def _next_batch(self) -> tuple[TopicId, list[bytes], bool]:
        """The frames at the head of the queue that are for one topic, and whether its stream ends after them."""
        topic = self._outbox[0][0]
        frames: list[bytes] = []
        size = 0
        while self._outbox and self._outbox[0][0] == topic and size < _WRITE_SIZE:
            frame = self._outbox.popleft()[1]
            if frame is None:
                self.queued -= size
                return topic, frames, True
            frames.append(frame)
            size += len(frame)
        self.queued -= size
        return topic, frames, False

    async def _write(self, channel: _Channel, topic: TopicId, frames: list[bytes]) -> None:
        timeout = self._limits.stall_seconds
        self._remember(topic, frames)
        stream = channel.streams.get(topic)
        if stream is None:
            stream = await channel.connection.open_uni(timeout=timeout)
            channel.streams[topic] = stream
            # In one write with the first messages: the peer reads nothing else while a header is missing.
            frames = [encode_header(topic), *frames]
        await stream.write(b"".join(frames), timeout=timeout)
        self.last_used = self._loop.time()

    async def _finish_streams(self, channel: _Channel) -> None:
        streams, channel.streams = list(channel.streams.values()), {}
        for stream in streams:
            try:
                await stream.finish()
            except ExchangeError as error:
                _log.debug("finishing a stream to %s: %s", self.peer.hex()[:10], error)

    async def _watch(self, channel: _Channel) -> None:
        await channel.connection.closed()
        if self._closed:
            return
        if self._channels[-1] is channel:
            self._leave_silent()
        self._channels.remove(channel)
        if self._channels:
            self._channels[-1].connection.awaiting = 1
            self._work.set()
            return
        self._connected.clear()
        if not self._is_held:
            self._owner.on_lost(self)

    async def _accept_loop(self, channel: _Channel) -> None:
        while True:
            try:
                stream = await channel.connection.accept_uni()
            except ExchangeError:
                return
            now = self._loop.time()
            channel.tokens += (now - channel.refilled) * self._limits.stream_rate
            channel.tokens = min(channel.tokens, self._limits.stream_burst) - 1
            channel.refilled = now
            if channel.tokens < 0:
                most, rate = self._limits.stream_burst, self._limits.stream_rate
                self._offend(f"opens too many streams: more than {most:g}, and then {rate:g} a second")
                return
            if channel.open_streams >= 2 * self._limits.streams:
                self._offend(f"has {channel.open_streams} streams open, and opens another")
                return
            channel.open_streams += 1
            self._spawn(self._read(channel, stream))

    async def _read(self, channel: _Channel, stream: RecvStream) -> None:
        reader = FrameReader(self._max_message_size, self._sizes)
        deadline = self._loop.time() + self._limits.header_seconds
        size = _FIRST_READ
        try:
            while True:
                timeout = max(deadline - self._loop.time(), 0.001) if reader.topic is None else None
                data = await stream.read(size, timeout=timeout)
                if not data:
                    return
                size = _READ_SIZE if len(data) == size else _FIRST_READ
                channel.connection.has_spoken()
                frames = reader.feed(data)
                if reader.topic is not None and frames:
                    self.last_used = self._loop.time()
                    for frame in frames:
                        if self._closed:
                            return
                        self._owner.on_frame(self, reader.topic, frame)
        except ProtocolError as error:
            self._offend(str(error))
        except PeerTimeoutError:
            self._offend("opens a stream and does not say for which topic")
        except DistroError as error:
            _log.debug("a stream of %s ended: %s", self.peer.hex()[:10], error)
        finally:
            channel.open_streams -= 1


def close_offender(link: PeerLink, reason: str) -> None:
    """Closes a link whose peer broke a rule, saying why."""
    link.close(CLOSE_PROTOCOL_ERROR, reason.encode()[:100])
