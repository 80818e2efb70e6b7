"""One connection to a coordinator: a stream of bytes, and Psyche's protocol on it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from ...comm.framing import ClientLink, Else, SecretKey, encode_frame
from ...comm.streams import Stream, open_tcp
from ..messages import CLIENT_TO_SERVER, SERVER_TO_CLIENT, ClientToServerMessage, CoordinatorMessage
from ..remembering_codec import RememberingCodec
from ..types import Coordinator

__all__ = ["Connection", "Connector", "StreamEnded", "encode", "tcp_connector"]

Connector = Callable[[], Awaitable[Stream]]
"""Opens a new stream to the same coordinator each time; raises OSError or ExchangeError if it cannot."""

READ_BYTES: Final = 64 * 1024
"""Read from the stream at once; chosen so that most states come in one piece."""


def tcp_connector(host: str, port: int) -> Connector:
    """Opens plain TCP connections, as Psyche's coordinator takes them."""
    return lambda: open_tcp(host, port)


def encode(message: ClientToServerMessage) -> bytes:
    return encode_frame(CLIENT_TO_SERVER.encode(Else(message)))


class StreamEnded(ConnectionError):
    """The peer ended the stream properly."""


class Connection:
    """One connection: a stream and the protocol on it.

    Attributes:
        asked: whether we have asked over it to be in the run.
        is_closed: whether :meth:`close` was called.
    """

    def __init__(self, stream: Stream, key: SecretKey) -> None:
        self.link = ClientLink(key, RememberingCodec.of(SERVER_TO_CLIENT), CLIENT_TO_SERVER, takes_changes=True)
        self.asked = self.is_closed = False
        self._stream = stream
        self._writing = asyncio.Lock()

    async def receive(self) -> list[Coordinator]:
        """The states in the next bytes, perhaps none. Answers the challenge on the way.

        Raises:
            OSError: the link is gone.
            ProtocolError: the bytes make no sense.
        """
        data = await self._stream.read(READ_BYTES)
        if not data:
            raise StreamEnded("the coordinator closed the connection")
        messages: list[CoordinatorMessage] = self.link.receive(data)
        answer = self.link.data_to_send()
        if answer:
            await self.write(answer)
        return [message.state for message in messages]

    async def write(self, frame: bytes) -> None:
        """Sends a frame; raises OSError if the link is gone."""
        async with self._writing:
            await self._stream.write(frame)

    async def close(self) -> None:
        self.is_closed = True
        self.link.close()
        await self._stream.close()
