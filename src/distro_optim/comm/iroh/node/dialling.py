"""By which way a peer is dialled: from the node's first endpoint, or from another beside it; which ways are given up.

The rules for endpoints beside the first one are in :mod:`~distro_optim.comm.iroh.watching.beside`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

from ...addresses import EndpointAddr, SocketAddr
from ..connection import Connection
from ..ffi import load_iroh
from ..stream_ends import translate_errors
from ..watching.beside import EndpointsBeside
from .holding import OpenConnections
from .opening import close_quietly

__all__ = ["Dialler"]

_log = logging.getLogger(__name__)

BESIDE_SWEEP_SECONDS: Final = 5.0
"""Between two looks at endpoints beside the first. Chosen arbitrarily."""

BESIDE_SECONDS: Final = 0.5
"""After which a peer that we are connected to, and that does not answer a dial, is dialled from another endpoint too:
see :mod:`~distro_optim.comm.iroh.watching.beside`. Longer than most handshakes take; short, since what waits for the
dial waits."""

GIVE_UP_SECONDS: Final = 1.0
"""After which the old way to a peer is given up, if it still does not answer, another endpoint does not reach the peer
either, and a relay server would: see :meth:`Dialler.give_up_old_way`. Enough for a handshake around the world."""


class Dialler:
    """Dials for one node, and owns the endpoints beside its first one. All of it belongs to the node's loop.

    Args:
        first: the node's own endpoint; raises if there is none.
        held: the connections that are open.
        open_one: opens another endpoint with the same key.
        has_relay: whether the first endpoint uses relay servers.
    """

    def __init__(
        self,
        first: Callable[[], Any],
        held: OpenConnections,
        open_one: Callable[[], Awaitable[Any]],
        *,
        has_relay: bool,
    ) -> None:
        self._first = first
        self._held = held
        self._has_relay = has_relay
        self.beside: EndpointsBeside[Any] = EndpointsBeside(open_one, time.monotonic)

    async def dial(self, address: EndpointAddr, alpn: bytes) -> tuple[Any, Any]:
        """A raw connection, and the endpoint that it is on.

        Raises:
            ExchangeError: no endpoint reaches the peer; of the last one to fail.
        """
        first = self._first()
        held = self._held.with_peer(address.id)
        address = address.merged(_seen_at(address.id, held))
        if not held or not address.direct:
            return await _dial_from(first, address, alpn)
        dials: set[asyncio.Task[tuple[Any, Any]]] = set()
        try:
            if not any(connection.is_silent for connection in held):
                dials.add(asyncio.ensure_future(_dial_from(first, address, alpn)))
                done, _ = await asyncio.wait(dials, timeout=BESIDE_SECONDS)
                if done:
                    return done.pop().result()
            dials.add(asyncio.ensure_future(self._dial_beside(address, alpn)))
            may_give_up = bool(address.relays) and self._has_relay
            while True:
                timeout = GIVE_UP_SECONDS if may_give_up else None
                done, waiting = await asyncio.wait(dials, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                if not done and (all(one.is_closed for one in held) or self.give_up_old_way(address.id)):
                    may_give_up = False
                    dials.add(asyncio.ensure_future(_dial_from(first, address, alpn)))
                    continue
                for dial in done:
                    if not waiting or dial.exception() is None:
                        return dial.result()
                dials = waiting
        finally:
            for dial in dials:
                dial.cancel()
            await asyncio.gather(*dials, return_exceptions=True)

    def give_up_old_way(self, peer: bytes) -> bool:
        """Closes what the first endpoint has with a peer, if that does not answer: with nothing open, the endpoint
        dials all addresses, and the relay server, at once. False, and nothing is closed, if something was heard since.

        It is the one way to a relay server, as no other endpoint with our key may be there. What was said in vain on
        what is closed is said again on the new connection, as after every silence. A connection that whoever serves it
        keeps for longer (``is_patient``) is not closed: then it is the peer that comes to us.
        """
        first = self._first()
        held = [one for one in self._held.with_peer(peer) if one.endpoint is first]
        since = min((one.unanswered_since for one in held if one.is_silent and one.unanswered_since), default=None)
        if since is None or any(one.is_patient or not one.heard_nothing_since(since) for one in held):
            return False
        _log.debug("the way to %s is given up, for a relay server", peer.hex()[:10])
        for one in held:
            one.close_as_silent()
        return True

    async def sweep(self) -> None:
        """Closes what is beside the first endpoint and is not needed any more, until it is cancelled."""
        while True:
            await asyncio.sleep(BESIDE_SWEEP_SECONDS)
            used = {id(connection.endpoint) for connection in self._held}
            for endpoint in self.beside.idle(lambda endpoint, used=used: id(endpoint) in used):  # type: ignore[misc]
                await close_quietly(endpoint)

    async def _dial_beside(self, address: EndpointAddr, alpn: bytes) -> tuple[Any, Any]:
        def knows_peer(endpoint: Any) -> bool:
            return any(connection.endpoint is endpoint for connection in self._held.with_peer(address.id))

        endpoint = await self.beside.take(knows_peer)
        if endpoint is None:
            return await _dial_from(self._first(), address, alpn)
        try:
            return await _dial_from(endpoint, address, alpn)
        finally:
            self.beside.give_back(endpoint)


def _seen_at(peer: bytes, connections: Iterable[Connection]) -> EndpointAddr:
    """Where ``peer`` is by the connections that answer: it may have moved since somebody told us."""
    places = {place for connection in connections if not connection.is_silent for place in connection.places()}
    return EndpointAddr(peer, (), tuple(map(SocketAddr.parse, places)))


async def _dial_from(endpoint: Any, address: EndpointAddr, alpn: bytes) -> tuple[Any, Any]:
    with translate_errors():
        return await endpoint.connect(_raw_addr(address), alpn), endpoint


def _raw_addr(address: EndpointAddr) -> Any:
    iroh = load_iroh()
    # The package takes one relay server, and nothing at all of an address whose URL it cannot read. Which of several a
    # peer is at now is not known: another dial may try another one.
    readable = [url for url in address.relays if _is_readable(url)]
    relay = random.choice(readable) if readable else None
    with translate_errors():
        peer = iroh.EndpointId.from_bytes(address.id)
        return iroh.EndpointAddr(peer, relay, [str(socket_addr) for socket_addr in address.direct])


def _is_readable(url: str) -> bool:
    iroh = load_iroh()
    try:
        iroh.RelayMode.custom_from_urls([url])
    except iroh.IrohError:
        return False
    return True
