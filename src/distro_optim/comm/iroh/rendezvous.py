"""Where the others are: peers of a run tell its coordinator's endpoint their addresses, and hear those of the others.

For runs in which nothing else brings peers together: without the public lookup, on one machine or in a local network,
or where the coordinator is not a peer of the gossip. One question a connection, each side ended by FIN::

    question    EndpointAddr of the one who asks
    answer      EndpointAddr of each other member, at most 256

Numbers and lists are postcard's. Addresses are rumours, as everywhere: the peer dialled there has to prove its id.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Final

from ...errors import PeerRefusedError, PeerTimeoutError, ProtocolError
from .. import postcard
from ..addresses import EndpointAddr
from ..postcard import Limit
from .connection import Connection
from .endpoint import Node

__all__ = ["RENDEZVOUS_ALPN", "MeetingPlace", "Rendezvous", "ask_rendezvous"]

RENDEZVOUS_ALPN: Final = b"distro-optim/rendezvous/0"

MAX_MEMBERS: Final = 256
"""Clients of an epoch."""

MAX_PLACES: Final = 8
"""Relays, and addresses, kept of one member: a machine has a few interfaces. Chosen arbitrarily."""

MAX_QUESTION: Final = 16 * 1024
MAX_ANSWER: Final = MAX_MEMBERS * 5 * 1024
"""Eight relay URLs of half a kilobyte are the most that a member takes."""

SECONDS: Final = 10.0
"""For a question with its answer."""

_Members = Annotated[list[EndpointAddr], Limit(MAX_MEMBERS)]


class MeetingPlace:
    """What is known of the members of a run. No I/O.

    Args:
        is_member: whether a public key takes part in the run at present; others are told nothing.
    """

    def __init__(self, is_member: Callable[[bytes], bool]) -> None:
        self._is_member = is_member
        self._places: dict[bytes, EndpointAddr] = {}

    def visit(self, peer: bytes, address: EndpointAddr) -> list[EndpointAddr]:
        """``peer``, whose identity is proven, says where it is; returns where the other members are.

        Raises:
            ProtocolError: it speaks for somebody else.
            PeerRefusedError: it is not a member.
        """
        if address.id != peer:
            raise ProtocolError("it tells where another peer is")
        if not self._is_member(peer):
            raise PeerRefusedError("it is not in this run")
        self._places = {member: place for member, place in self._places.items() if self._is_member(member)}
        self._places.pop(peer, None)
        # Public ones first: they are of use to everybody, and a machine can have many private ones.
        dialable = (place for place in address.direct if place.is_dialable)
        direct = sorted(dialable, key=lambda place: place.ip.is_private)
        known = EndpointAddr(peer, address.relays[:MAX_PLACES], tuple(direct[:MAX_PLACES]))
        others = list(self._places.values())[-(MAX_MEMBERS - 1) :]
        self._places[peer] = known
        while len(self._places) > MAX_MEMBERS:
            del self._places[next(iter(self._places))]
        return others


class Rendezvous:
    """Serves a :class:`MeetingPlace` on a node.

    Args:
        node: whose connections are used.
        is_member: see :class:`MeetingPlace`.
    """

    def __init__(self, node: Node, is_member: Callable[[bytes], bool]) -> None:
        self._node = node
        self._place = MeetingPlace(is_member)
        node.exempt(RENDEZVOUS_ALPN)
        node.accept(RENDEZVOUS_ALPN, self._serve)

    def visit(self, address: EndpointAddr) -> list[EndpointAddr]:
        """The node itself tells where it is, and hears the others' addresses."""
        return self._place.visit(self._node.endpoint_id, address)

    def close(self) -> None:
        """Serves no more."""
        self._node.refuse(RENDEZVOUS_ALPN)

    async def _serve(self, connection: Connection) -> None:
        send, recv = await connection.accept_bi(timeout=SECONDS)
        question = await recv.read_to_end(MAX_QUESTION, timeout=SECONDS)
        address: EndpointAddr = postcard.decode(EndpointAddr, question)
        others = self._place.visit(connection.remote_id, address)
        await send.write(postcard.encode(others, _Members), timeout=SECONDS)
        await send.finish()
        try:
            await asyncio.wait_for(connection.closed(), SECONDS)
        except TimeoutError:
            pass


async def ask_rendezvous(node: Node, host: EndpointAddr) -> list[EndpointAddr]:
    """Tells the rendezvous at ``host`` where ``node`` is; returns where the other members of the run are.

    Raises:
        ExchangeError: it cannot be reached, serves none, or does not answer in ten seconds.
        ProtocolError: its answer is malformed.
    """
    node.exempt(RENDEZVOUS_ALPN)
    try:
        async with asyncio.timeout(SECONDS):
            connection = await node.connect(host, RENDEZVOUS_ALPN)
            try:
                send, recv = await connection.open_bi()
                await send.write(postcard.encode(node.addr()))
                await send.finish()
                members: list[EndpointAddr] = postcard.decode(_Members, await recv.read_to_end(MAX_ANSWER))
            finally:
                connection.close()
    except PeerTimeoutError:
        raise
    except TimeoutError:
        raise PeerTimeoutError(f"no answer about the other peers within {SECONDS} s") from None
    return [member for member in members if member.id != node.endpoint_id]
