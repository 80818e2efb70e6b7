"""Byte streams over iroh: what :mod:`distro_optim.comm.streams` asks of a transport, through NATs and relays.

One connection carries one stream. The side that was dialled opens it and sends :data:`GREETING`, because in QUIC a
stream shows only once something is sent on it; after that the bytes are those of the protocol. A node lives on a loop
of its own; streams are used from the loop in which they were taken.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from typing_extensions import override

from ...errors import ExchangeError, TruncatedError
from ..addresses import EndpointAddr
from ..serving.watched_clock import SLEEP_SECONDS
from ..streams import READ_BYTES, Backlog, Stream, StreamListener, place_of
from ..tickets import EndpointTicket
from .connection import Connection, RecvStream, SendStream
from .endpoint import Node

__all__ = ["COORDINATOR_ALPN", "IrohListener", "open_iroh"]

T = TypeVar("T")

COORDINATOR_ALPN: Final = b"distro-optim/coordinator/0"
"""The protocol of :mod:`distro_optim.coordinator.server.server`, frame for frame that of Psyche's TCP server."""

GREETING: Final = b"\x00"
"""One byte ahead of everything else."""

OPEN_SECONDS: Final = 10.0
"""From the handshake to the greeting; chosen to outlast a slow relay."""

LINGER_SECONDS: Final = 2.0
"""How long a connection stays after its stream was closed, for the peer to read what was written."""

SILENCE_SECONDS: Final = 10.0
"""A listener gives up a connection on which nothing came for so long, not even an acknowledgement. A killed peer
says no goodbye, and the transport itself waits for 30 seconds. For servers that send something every second."""

_LOOK_SECONDS: Final = 2.0
_LOOKS_FOR_PATH: Final = 10
_PATH_SECONDS: Final = 0.02
_CLOSE_CODE: Final = 0


class _IrohStream(Stream):
    def __init__(self, node: Node, connection: Connection, send: SendStream, recv: RecvStream) -> None:
        self._node = node
        self._connection = connection
        self._place = ""
        self._send = send
        self._recv = recv
        self._under_way: set[asyncio.Future[Any]] = set()
        self._closed = False
        self._ended = False  # the peer has closed its side, and we have read all of it
        self._cut_short = False  # a write was given up half-way

    @property
    @override
    def peer(self) -> str:
        return self._connection.remote_id.hex()

    @property
    @override
    def place(self) -> str:
        return self._place or self.peer

    async def find_place(self) -> None:
        """On the node's loop: looks where the peer is, for which the connection may need a moment.

        Behind a relay nobody's address shows, and thousands may share it: there each key is a place.
        """
        for _ in range(_LOOKS_FOR_PATH):
            way = self._connection.stats().way
            if way.path != "none":
                self._place = place_of(way.remote_addr) if way.path == "direct" else ""
                return
            await asyncio.sleep(_PATH_SECONDS)

    @override
    async def read(self, max_bytes: int = READ_BYTES) -> bytes:
        if self._closed or self._ended:
            return b""
        data = await self._on_node(self._recv.read(max_bytes))
        self._ended = not data
        return data or b""

    @override
    async def write(self, data: bytes) -> None:
        if self._closed:
            raise ConnectionResetError("the stream is closed")
        try:
            done = await self._on_node(self._send.write(data))
        except asyncio.CancelledError:
            self._cut_short = True
            raise
        if done is _GIVEN_UP:
            self._cut_short = True
            raise ConnectionResetError("the stream was closed while writing")

    @override
    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for call in self._under_way:
            call.cancel()
        if self._node.is_closed:
            return
        try:
            self._node.loop.submit(self._say_goodbye())
        except ExchangeError:
            pass  # the node was closed meanwhile, and with it the connection

    async def _on_node(self, work: Coroutine[Any, Any, T]) -> Any:
        """Runs ``work`` on the node's loop; gives :data:`_GIVEN_UP` if :meth:`close` came first."""
        try:
            call = asyncio.wrap_future(self._node.loop.submit(work))
        except ExchangeError as error:
            raise ConnectionResetError(str(error)) from None
        self._under_way.add(call)
        try:
            return await call
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed and call.cancelled() and not (task and task.cancelling()):
                return _GIVEN_UP
            raise
        except (ExchangeError, TruncatedError) as error:
            raise ConnectionResetError(str(error)) from None
        finally:
            self._under_way.discard(call)

    async def _say_goodbye(self) -> None:
        """On the node's loop: ends both directions and, once the peer has had time to read, the connection."""
        try:
            if self._cut_short:
                await self._send.reset(_CLOSE_CODE)
            else:
                await self._send.finish()
            await self._recv.stop(_CLOSE_CODE)
            if not (self._ended or self._cut_short):
                # Closing the connection at once would take from the peer what it has not read yet.
                async with asyncio.timeout(LINGER_SECONDS):
                    await self._connection.closed()
        except (ExchangeError, TimeoutError):
            pass
        finally:
            self._connection.close(_CLOSE_CODE)


class _GivenUp:
    """Stands for the result of a call that :meth:`_IrohStream.close` ended."""

    def __bool__(self) -> bool:
        return False


_GIVEN_UP: Final = _GivenUp()


class IrohListener(StreamListener):
    """Accepts streams of one protocol on a node. To be made and used in one event loop, not the node's own.

    Args:
        node: a node that is started.
        alpn: the protocol.
        silence: seconds after which a connection counts as dead, see :data:`SILENCE_SECONDS`.

    Raises:
        ConfigurationError: the node serves this protocol already.
    """

    def __init__(self, node: Node, alpn: bytes = COORDINATOR_ALPN, *, silence: float = SILENCE_SECONDS) -> None:
        self._node = node
        self._silence = silence
        self._alpn = alpn
        self._loop = asyncio.get_running_loop()
        self._waiting = Backlog()
        self._closed = False
        node.accept(alpn, self._take)

    @property
    @override
    def address(self) -> str:
        """An endpoint ticket with the addresses known at this moment."""
        return str(EndpointTicket(self._node.addr()))

    @override
    async def accept(self) -> Stream:
        return await self._waiting.take()

    @override
    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._node.refuse(self._alpn)
        await self._waiting.close()

    async def _take(self, connection: Connection) -> None:
        """On the node's loop."""
        connection.limit_streams(uni=0, bi=0)  # the one stream is ours to open
        connection.is_patient = True  # see _until_dead
        send, recv = await connection.open_bi()
        await send.write(GREETING, timeout=OPEN_SECONDS)
        stream = _IrohStream(self._node, connection, send, recv)
        await stream.find_place()
        self._loop.call_soon_threadsafe(self._offer, stream)
        await self._until_dead(connection)

    async def _until_dead(self, connection: Connection) -> None:
        """Returns when the connection is closed, or nothing has come on it for too long."""
        loop = asyncio.get_running_loop()
        received, since = -1, loop.time()
        looked = since
        while True:
            try:
                async with asyncio.timeout(min(_LOOK_SECONDS, self._silence)):
                    await connection.closed()
                return
            except TimeoutError:
                pass
            # Bytes of the transport: a peer whose program is busy still acknowledges.
            _, count = connection.traffic()
            now = loop.time()
            if now - looked > SLEEP_SECONDS:
                since = now  # it is we who were silent
            looked = now
            if count != received:
                received, since = count, now
            elif now - since >= self._silence:
                return

    def _offer(self, stream: Stream) -> None:
        if not self._waiting.offer(stream):
            self._closing = asyncio.ensure_future(stream.close())


async def open_iroh(node: Node, peer: EndpointAddr, alpn: bytes = COORDINATOR_ALPN) -> Stream:
    """Connects to an :class:`IrohListener`.

    Raises:
        OSError: nobody answers there, or it does not serve the protocol.
    """

    async def dial() -> _IrohStream:
        connection = await node.connect(peer, alpn)
        try:
            send, recv = await connection.accept_bi(timeout=OPEN_SECONDS)
            if await recv.read_exact(len(GREETING), timeout=OPEN_SECONDS) != GREETING:
                raise ExchangeError("it answers, but not with a stream of bytes")
        except BaseException:
            connection.close(_CLOSE_CODE)
            raise
        connection.awaiting = 1  # a coordinator says something all the time
        return _IrohStream(node, connection, send, recv)

    try:
        future: concurrent.futures.Future[_IrohStream] = node.submit(dial())
        return await asyncio.wrap_future(future)
    except (ExchangeError, TruncatedError) as error:
        raise ConnectionRefusedError(str(error)) from None
