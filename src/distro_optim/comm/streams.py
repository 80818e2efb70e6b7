"""Byte streams that a server accepts and a client opens, whatever carries them.

:class:`Stream` and :class:`StreamListener` are the seam between a protocol and a transport: TCP and memory are here,
iroh brings its own. ``tests/comm/stream_contract.py`` says what every implementation promises.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
from abc import ABC, abstractmethod
from collections import deque
from typing import Final

from typing_extensions import override

from ..errors import ConfigurationError

__all__ = [
    "CLOSE_SECONDS",
    "Backlog",
    "MemoryListener",
    "Stream",
    "StreamListener",
    "TcpListener",
    "memory_pipe",
    "open_tcp",
    "place_of",
    "split_address",
]

ACCEPT_BACKLOG: Final = 128
"""Connections that wait to be taken; chosen to outlast a burst of joiners."""

READ_BYTES: Final = 64 * 1024
"""Read from a stream at once by default; most states of a run arrive in one piece."""

CLOSE_SECONDS: Final = 1.0
"""How long a closing stream waits for its peer to read what was written."""

MEMORY_CAPACITY: Final = 64 * 1024
"""Bytes in flight in one direction of a stream in memory; as much as asyncio buffers for a socket."""


_EVERY_INTERFACE: Final = frozenset({"", "0.0.0.0", "::"})
"""Hosts to listen on that name no machine."""


class Stream(ABC):
    """Bytes in both directions, in order, each delivered once or not at all."""

    @property
    @abstractmethod
    def peer(self) -> str:
        """The other end, for logs: ``host:port``, or what the transport has in its place."""

    @property
    def place(self) -> str:
        """Where the other end is in the network, for bounds on what comes from one place."""
        return place_of(self.peer)

    @abstractmethod
    async def read(self, max_bytes: int = READ_BYTES) -> bytes:
        """The next bytes, at least one and at most ``max_bytes``; empty when no more will come.

        Raises:
            ConnectionError: the stream broke.
        """

    @abstractmethod
    async def write(self, data: bytes) -> None:
        """Sends ``data``; returns when there is room for more, so that a slow reader slows its writer down.

        Raises:
            ConnectionError: the stream broke, or is closed.
        """

    @abstractmethod
    async def close(self) -> None:
        """Ends both directions, within :data:`CLOSE_SECONDS`. What was written still arrives if the peer reads until
        then. Calling it again does nothing."""


class StreamListener(ABC):
    """Where streams come from."""

    @property
    @abstractmethod
    def address(self) -> str:
        """What a client needs to connect."""

    @abstractmethod
    async def accept(self) -> Stream:
        """The next stream.

        Raises:
            ConnectionError: the listener is closed.
        """

    @abstractmethod
    async def close(self) -> None:
        """Takes no more streams; those accepted live on. Calling it again does nothing."""


# -- TCP ---------------------------------------------------------------------------------------------------------------


class _TcpStream(Stream):
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        name = writer.get_extra_info("peername")
        self._peer = _joined(name[0], name[1]) if name else "unknown"
        self._closing: asyncio.Task[None] | None = None

    @property
    @override
    def peer(self) -> str:
        return self._peer

    @override
    async def read(self, max_bytes: int = READ_BYTES) -> bytes:
        return await self._reader.read(max_bytes)

    @override
    async def write(self, data: bytes) -> None:
        if self._writer.is_closing():
            raise ConnectionResetError("the stream is closed")
        self._writer.write(data)
        await self._writer.drain()

    @override
    async def close(self) -> None:
        if self._closing is None:
            self._writer.close()
            # A task of its own: the future inside is shared, and a timeout around it would cancel it for all.
            self._closing = asyncio.create_task(self._wait_closed())
        _, late = await asyncio.wait({self._closing}, timeout=CLOSE_SECONDS)
        if late:
            self.abort()
            await asyncio.wait({self._closing})

    async def _wait_closed(self) -> None:
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def abort(self) -> None:
        """Drops the connection with all that waits in it."""
        self._writer.transport.abort()


def place_of(address: str) -> str:
    """The host of ``host:port``; of IPv6 the first 64 bits, which one customer has for himself."""
    host = address.rpartition(":")[0].strip("[]") or address
    try:
        parsed = ipaddress.ip_address(host)
    except ValueError:
        return host
    if parsed.version == 4:
        return host
    return str(parsed.ipv4_mapped or ipaddress.ip_network((int(parsed) >> 64 << 64, 64)))


def split_address(address: str, *, name: str = "address", any_port: bool = False) -> tuple[str, int]:
    """Host and port of ``host:port`` or, for IPv6, ``[host]:port``.

    Args:
        address: the text.
        name: of the argument, for the error.
        any_port: whether port 0 is allowed, as for listening on any free port.

    Raises:
        ConfigurationError: it is neither.
    """
    host, _, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    is_port = port.isascii() and port.isdigit() and (0 if any_port else 1) <= int(port) < 1 << 16
    if not host or not host.isprintable() or not is_port:
        raise ConfigurationError(
            f"an address must be host:port, such as example.org:20000, got {address!r}", name=name, value=address
        )
    return host, int(port)


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Backlog:
    """Streams that have come and wait to be accepted, up to :data:`ACCEPT_BACKLOG`."""

    def __init__(self) -> None:
        self._streams: asyncio.Queue[Stream | None] = asyncio.Queue(ACCEPT_BACKLOG + 1)  # None is the end
        self._closed = False

    def offer(self, stream: Stream) -> bool:
        """Lets a stream wait; False if it cannot, as too many do, or nobody accepts any more."""
        if self._closed or self._streams.qsize() >= ACCEPT_BACKLOG:
            return False
        self._streams.put_nowait(stream)
        return True

    async def take(self) -> Stream:
        """The next stream, as soon as there is one.

        Raises:
            ConnectionAbortedError: there will be none.
        """
        stream = await self._streams.get()
        if stream is None:
            self._streams.put_nowait(None)
            raise ConnectionAbortedError("the listener is closed")
        return stream

    async def close(self) -> None:
        """Closes what waits, and takes no more. May be called again."""
        if self._closed:
            return
        self._closed = True
        waiting = [self._streams.get_nowait() for _ in range(self._streams.qsize())]
        self._streams.put_nowait(None)
        for stream in waiting:
            if stream is not None:
                await stream.close()


class TcpListener(StreamListener):
    """Accepts TCP connections. Made by :meth:`bind`."""

    def __init__(self) -> None:
        self._waiting = Backlog()
        self._server: asyncio.Server | None = None
        self._address = ""
        self._is_reachable = False

    @classmethod
    async def bind(cls, host: str, port: int) -> TcpListener:
        """Listens on ``host``; port 0 takes any free one.

        Raises:
            ConfigurationError: the address is taken, or not one of this machine.
        """
        listener = cls()
        try:
            server = await asyncio.start_server(listener._take, host, port, backlog=ACCEPT_BACKLOG)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigurationError(
                    f"cannot listen on {host}:{port}: another program does; name another port, or 0 for any free one",
                    name="port",
                    value=port,
                ) from None
            raise ConfigurationError(
                f"cannot listen on {host}:{port}: {error.strerror or error}", name="port", value=port
            ) from None
        listener._server = server
        listener._address = _joined(host, server.sockets[0].getsockname()[1])
        listener._is_reachable = host not in _EVERY_INTERFACE
        return listener

    @property
    @override
    def address(self) -> str:
        return self._address

    @property
    def reachable_address(self) -> str | None:
        """What others can dial; None if it listens on every interface, whose addresses it does not know."""
        return self._address if self._is_reachable else None

    @override
    async def accept(self) -> Stream:
        return await self._waiting.take()

    @override
    async def close(self) -> None:
        if self._server is None:
            return
        self._server.close()
        self._server = None
        await self._waiting.close()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = _TcpStream(reader, writer)
        if not self._waiting.offer(stream):
            stream.abort()


async def open_tcp(host: str, port: int, *, seconds: float | None = None) -> Stream:
    """Connects.

    Args:
        host, port: where.
        seconds: to wait for an answer; None waits as long as the system does, which may be minutes.

    Raises:
        OSError: there is no answer.
    """
    try:
        async with asyncio.timeout(seconds):
            return _TcpStream(*await asyncio.open_connection(host, port))
    except TimeoutError:
        if seconds is None:
            raise
        raise ConnectionRefusedError(f"no answer within {seconds:g} s") from None


# -- memory ------------------------------------------------------------------------------------------------------------


class _Pipe:
    """One direction."""

    def __init__(self) -> None:
        self.chunks: deque[bytes] = deque()
        self.size = 0
        self.ended = False
        self.broken = False
        self.changed = asyncio.Condition()


class _MemoryStream(Stream):
    def __init__(self, incoming: _Pipe, outgoing: _Pipe, peer: str) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self._peer = peer
        self._closed = False

    @property
    @override
    def peer(self) -> str:
        return self._peer

    @override
    async def read(self, max_bytes: int = READ_BYTES) -> bytes:
        pipe = self._incoming
        async with pipe.changed:
            await pipe.changed.wait_for(lambda: pipe.chunks or pipe.ended or self._closed)
            if not pipe.chunks or self._closed:
                return b""
            chunk = pipe.chunks.popleft()
            if len(chunk) > max_bytes:
                pipe.chunks.appendleft(chunk[max_bytes:])
                chunk = chunk[:max_bytes]
            pipe.size -= len(chunk)
            pipe.changed.notify_all()
            return chunk

    @override
    async def write(self, data: bytes) -> None:
        pipe = self._outgoing
        async with pipe.changed:
            if self._closed or pipe.broken:
                raise ConnectionResetError("the stream is closed")
            if data:
                pipe.chunks.append(bytes(data))
                pipe.size += len(data)
                pipe.changed.notify_all()
            await pipe.changed.wait_for(lambda: pipe.size <= MEMORY_CAPACITY or self._closed or pipe.broken)
            if self._closed or pipe.broken:
                raise ConnectionResetError("the stream was closed while writing")

    @override
    async def close(self) -> None:
        self._closed = True
        async with self._outgoing.changed:
            self._outgoing.ended = True
            self._outgoing.changed.notify_all()
        async with self._incoming.changed:
            self._incoming.broken = True
            self._incoming.changed.notify_all()


def memory_pipe(near: str = "memory:near", far: str = "memory:far") -> tuple[Stream, Stream]:
    """Two ends of a stream within the process, for tests and for embedding; named as the other end sees them."""
    there, back = _Pipe(), _Pipe()
    return _MemoryStream(back, there, far), _MemoryStream(there, back, near)


class MemoryListener(StreamListener):
    """Accepts streams of its own process; :meth:`connect` is the way in."""

    def __init__(self, name: str = "memory") -> None:
        self._name = name
        self._waiting = Backlog()
        self._count = 0

    @property
    @override
    def address(self) -> str:
        return self._name

    async def connect(self) -> Stream:
        """A new stream to the side that accepts here.

        Raises:
            OSError: the listener is closed, or does not accept streams.
        """
        near, far = memory_pipe(near=f"{self._name}:{self._count + 1}", far=self._name)
        if not self._waiting.offer(far):
            raise ConnectionRefusedError(f"nobody accepts at {self._name}")
        self._count += 1
        return near

    @override
    async def accept(self) -> Stream:
        return await self._waiting.take()

    @override
    async def close(self) -> None:
        await self._waiting.close()
