"""A relay server for tests: passes datagrams between iroh endpoints that cannot, or shall not, reach each other.

iroh's relay protocol (iroh 1.x: ``iroh-relay/src/protos/{handshake,relay,common}.rs``) over plain HTTP, which endpoints
accept for ``http://`` addresses. It has no TLS, no limits and no QUIC address discovery, and is for one machine only::

    async with RelayServer() as relay:
        node = await Node.open(relay=relay.url, ...)

A frame is one binary WebSocket message: a type byte and a body. The server sends a challenge of 16 bytes, the client
answers with its public key and a signature, the server confirms. From then on the frames are

====================  ====  =====================================================================
client to relay       4, 5  key of the receiver (32 bytes), and the datagram, or several, with their ECN bits
relay to client       6, 7  key of the sender (32 bytes), and the same bytes
the sender is gone    8     its key (32 bytes)
ping, pong            9,10  8 bytes that are sent back
====================  ====  =====================================================================
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from aiohttp import WSMsgType, web
from blake3 import blake3

from ..comm.signing import is_signed_by

__all__ = ["RelayServer"]

PROTOCOLS: Final = ("iroh-relay-v2", "iroh-relay-v1")
"""WebSocket sub-protocols, the best first. They differ in messages that this server never sends."""

_CHALLENGE, _AUTH, _CONFIRMED, _DENIED = b"\x00", 1, b"\x02", b"\x03"
_TO_RELAY: Final = {4: b"\x06", 5: b"\x07"}
"""Types of datagrams from a client, and those under which its peer gets them."""
_GONE, _PING, _PONG = b"\x08", 9, b"\x0a"

_KEY_SIZE: Final = 32
_AUTH_SIZE: Final = 1 + _KEY_SIZE + 1 + 64  # the signature follows its length
_MAX_FRAME: Final = 1024 * 1024
_CONTEXT: Final = "iroh-relay handshake v1 challenge signature"


class RelayServer:
    """A relay server on a port of this machine, from entering the block to leaving it.

    Args:
        host: address to listen at.
        port: 0 takes a free one.

    Attributes:
        relayed: datagram frames that went through, by the key of their sender.
        may_pass: asked for each frame, with sender and receiver; what it refuses is lost.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self.relayed: dict[bytes, int] = {}
        self.may_pass: Callable[[bytes, bytes], bool] = lambda sender, receiver: True
        self._host, self._port = host, port
        self._clients: dict[bytes, web.WebSocketResponse] = {}
        self._talked_to: dict[bytes, set[bytes]] = {}
        app = web.Application()
        app.add_routes([web.get("/relay", self._relay), web.get("/ping", self._probe)])
        app.add_routes([web.get("/generate_204", self._no_portal)])
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)

    @property
    def url(self) -> str:
        """What endpoints are told."""
        return f"http://{self._host}:{self._port}/"

    @property
    def clients(self) -> frozenset[bytes]:
        """Public keys of the endpoints that are connected."""
        return frozenset(self._clients)

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port)
        await site.start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        for client in list(self._clients.values()):
            await client.close()
        await self._runner.cleanup()

    async def _probe(self, request: web.Request) -> web.Response:
        return web.Response(headers={"Access-Control-Allow-Origin": "*"})

    async def _no_portal(self, request: web.Request) -> web.Response:
        """Tells a client that nothing between it and us answers in our place."""
        asked = request.headers.get("X-Iroh-Challenge")
        return web.Response(status=204, headers={} if asked is None else {"X-Iroh-Response": f"response {asked}"})

    async def _relay(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(protocols=PROTOCOLS, max_msg_size=_MAX_FRAME, autoping=True)
        await socket.prepare(request)
        key = await self._admit(socket)
        if key is None:
            return socket
        before, self._clients[key] = self._clients.get(key), socket
        if before is not None:
            await before.close()
        try:
            async for message in socket:
                if message.type is WSMsgType.BINARY:
                    await self._frame(key, socket, message.data)
        finally:
            if self._clients.get(key) is socket:
                del self._clients[key]
                await self._say_gone(key)
        return socket

    async def _admit(self, socket: web.WebSocketResponse) -> bytes | None:
        """The key that a client has proved to have; None if it has not."""
        challenge = secrets.token_bytes(16)
        await socket.send_bytes(_CHALLENGE + challenge)
        answer = await socket.receive_bytes()
        if len(answer) != _AUTH_SIZE or answer[0] != _AUTH:
            await socket.close()
            return None
        key, signature = answer[1 : 1 + _KEY_SIZE], answer[-64:]
        if not is_signed_by(key, blake3(challenge, derive_key_context=_CONTEXT).digest(), signature):
            await socket.send_bytes(_DENIED + b"\x0dbad signature")
            await socket.close()
            return None
        await socket.send_bytes(_CONFIRMED)
        return key

    async def _frame(self, sender: bytes, socket: web.WebSocketResponse, frame: bytes) -> None:
        if frame[:1] == bytes([_PING]):
            await socket.send_bytes(_PONG + frame[1:])
            return
        kind = _TO_RELAY.get(frame[0]) if frame else None
        receiver = frame[1 : 1 + _KEY_SIZE]
        peer = self._clients.get(receiver)
        if kind is None or peer is None or not self.may_pass(sender, receiver):
            return
        self.relayed[sender] = self.relayed.get(sender, 0) + 1
        self._talked_to.setdefault(sender, set()).add(receiver)
        try:
            await peer.send_bytes(kind + sender + frame[1 + _KEY_SIZE :])
        except ConnectionError:
            pass  # the receiver is going

    async def _say_gone(self, key: bytes) -> None:
        for other in self._talked_to.pop(key, ()):
            peer = self._clients.get(other)
            if peer is not None:
                try:
                    await asyncio.wait_for(peer.send_bytes(_GONE + key), 1.0)
                except (ConnectionError, TimeoutError):
                    pass
