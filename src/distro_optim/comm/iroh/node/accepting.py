"""Connections that others make: how many a node takes, which protocols it serves, and who serves them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

from ....errors import ConfigurationError, DistroError, ExchangeError, ProtocolError
from ..connection import Connection
from ..stream_ends import translate_errors
from .allowing import CLOSE_NOT_ALLOWED, AllowList
from .holding import OpenConnections

__all__ = ["CLOSE_PROTOCOL_ERROR", "Acceptor", "Handler", "NodeLimits"]

Handler = Callable[[Connection], Awaitable[None]]

_log = logging.getLogger(__name__)

CLOSE_PROTOCOL_ERROR: Final = 2
"""Ours; no peer looks at the code."""


@dataclass(frozen=True, kw_only=True)
class NodeLimits:
    """What strangers can make a node hold.

    Attributes:
        connections: all together; Psyche's pool holds as many (``shared/network/src/lib.rs``).
        connections_per_peer: of one peer, whatever the protocols. Chosen: three protocols, twice each while both
            sides dial at once, and room.
        handshakes: at a time. From half of it on, callers must first prove their address (a QUIC retry), so that
            forged packets cannot fill the rest.
        handshake_seconds: after which a half-open connection is dropped.
    """

    connections: int = 1024
    connections_per_peer: int = 16
    handshakes: int = 64
    handshake_seconds: float = 10.0

    def __post_init__(self) -> None:
        for name in ("connections", "connections_per_peer", "handshakes", "handshake_seconds"):
            value = getattr(self, name)
            if value <= 0:
                raise ConfigurationError(f"{name} must be positive, got {value}", name=name, value=value)


class Acceptor:
    """Takes connections for one node and hands them to those who serve their protocols.

    Args:
        limits: bounds against strangers.
        allowed: who may connect.
        held: where connections are held while they are open.
        spawn: runs a coroutine on the node's loop until it ends or the node is closed.
    """

    def __init__(
        self,
        limits: NodeLimits,
        allowed: AllowList,
        held: OpenConnections,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._limits = limits
        self._allowed = allowed
        self._held = held
        self._spawn = spawn
        self._handlers: dict[bytes, Handler] = {}
        self._handshakes = 0

    @property
    def alpns(self) -> list[bytes]:
        """The protocols that are served."""
        return list(self._handlers)

    def serve(self, alpn: bytes, handler: Handler) -> None:
        """Gives each connection for ``alpn`` to ``handler``.

        Raises:
            ConfigurationError: the protocol is served already, or the name is empty.
        """
        if not alpn or len(alpn) > 255:
            raise ConfigurationError(f"an ALPN has 1 to 255 bytes, got {len(alpn)}", name="alpn", value=alpn)
        if alpn in self._handlers:
            raise ConfigurationError(f"{alpn!r} is served already", name="alpn", value=alpn)
        self._handlers[alpn] = handler

    def refuse(self, alpn: bytes) -> None:
        """Serves ``alpn`` no more; open connections go on."""
        self._handlers.pop(alpn, None)

    async def run(self, endpoint: Any) -> None:
        """Takes what comes to an endpoint until it is closed."""
        while True:
            with translate_errors():
                incoming = await endpoint.accept_next()
            if incoming is None:
                return
            try:
                with translate_errors():
                    if self._handshakes >= self._limits.handshakes or len(self._held) >= self._limits.connections:
                        await incoming.refuse()
                        continue
                    if 2 * self._handshakes >= self._limits.handshakes and not await incoming.remote_addr_validated():
                        await incoming.retry()
                        continue
            except ExchangeError as error:
                _log.debug("an incoming connection vanished: %s", error)
                continue
            self._handshakes += 1
            self._spawn(self._take(incoming, endpoint))

    async def _take(self, incoming: Any, endpoint: Any) -> None:
        try:
            async with asyncio.timeout(self._limits.handshake_seconds):
                with translate_errors():
                    accepting = await incoming.accept()
                    raw = await accepting.connect()
        except (TimeoutError, ExchangeError) as error:
            _log.debug("an incoming handshake failed: %s", error)
            return
        finally:
            self._handshakes -= 1
        connection = Connection(raw, dialled=False, endpoint=endpoint)
        peer = connection.remote_id
        handler = self._handlers.get(connection.alpn)
        if self._allowed.turn_away(connection):
            _log.info("%s is not on the allow-list and was turned away", peer.hex()[:10])
            return
        if handler is None or self._held.number_with(peer) >= self._limits.connections_per_peer:
            connection.close(CLOSE_NOT_ALLOWED, b"not served" if handler is None else b"too many connections")
            return
        self._held.add(connection)
        await _serve(connection, handler)


async def _serve(connection: Connection, handler: Handler) -> None:
    peer, code = connection.remote_id, 0
    try:
        await handler(connection)
    except ProtocolError as error:
        code = CLOSE_PROTOCOL_ERROR
        _log.warning("%s broke %s: %s", peer.hex()[:10], connection.alpn.decode(errors="replace"), error)
    except (DistroError, TimeoutError) as error:
        _log.debug("serving %r ended: %s", connection, error)
    except Exception:
        code = CLOSE_PROTOCOL_ERROR
        _log.exception("serving %r failed", connection)
    finally:
        connection.close(code)
