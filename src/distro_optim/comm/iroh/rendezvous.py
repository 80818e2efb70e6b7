"""Where the others are: peers of a run tell its coordinator's endpoint their addresses, and hear those of the others.

For runs in which nothing else brings peers together: without the public lookup, on one machine or in a local network,
or where the coordinator is not a peer of the gossip. One question a connection, each side ended by FIN::

    question    EndpointAddr of the one who asks
    answer      EndpointAddr of each other member, at most 256

Numbers and lists are postcard's. Addresses are rumours, as everywhere: the peer dialled there has to prove its id.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from ...errors import PeerTimeoutError
from .. import postcard
from ..addresses import EndpointAddr
from ..streams import Stream
from .connection import Connection
from .endpoint import Node
from .meeting_place import MAX_ANSWER, MAX_QUESTION, MeetingPlace, Members, TcpQuestion
from .one_question import answer_question, ask_question

__all__ = ["RENDEZVOUS_ALPN", "Rendezvous", "ask_over_stream", "ask_rendezvous"]

RENDEZVOUS_ALPN: Final = b"distro-optim/rendezvous/0"

SECONDS: Final = 10.0
"""For a question with its answer."""


class Rendezvous:
    """Serves a :class:`~.meeting_place.MeetingPlace` on a node.

    Args:
        node: whose connections are used.
        place: where members meet, or what tells who is one; see :class:`~.meeting_place.MeetingPlace`.
    """

    def __init__(self, node: Node, place: MeetingPlace | Callable[[bytes], bool]) -> None:
        self._node = node
        self._place = place if isinstance(place, MeetingPlace) else MeetingPlace(place)
        node.exempt(RENDEZVOUS_ALPN)
        node.accept(RENDEZVOUS_ALPN, self._serve)

    def visit(self, address: EndpointAddr) -> list[EndpointAddr]:
        """The node itself tells where it is, and hears the others' addresses."""
        return self._place.visit(self._node.endpoint_id, address)

    def close(self) -> None:
        """Serves no more."""
        self._node.refuse(RENDEZVOUS_ALPN)

    async def _serve(self, connection: Connection) -> None:
        async def answer(question: bytes) -> bytes:
            address: EndpointAddr = postcard.decode(EndpointAddr, question)
            return postcard.encode(self._place.visit(connection.remote_id, address), Members)

        await answer_question(connection, answer, max_question=MAX_QUESTION, seconds=SECONDS)


async def ask_over_stream(
    open_stream: Callable[[], Awaitable[Stream]], node: Node, question: bytes | None = None
) -> list[EndpointAddr] | None:
    """The same question as :func:`ask_rendezvous`, put to a coordinator that is reached over TCP.

    Args:
        open_stream: connects to it.
        node: says where we are.
        question: another one, such as :data:`~.meeting_place.WHO_HOSTS`.

    Returns:
        where the other members are, or what was asked for; None if that coordinator does not know such questions, as
        Psyche's does not.

    Raises:
        OSError, ExchangeError: it cannot be reached, or does not answer in ten seconds.
        ProtocolError: its answer is malformed.
    """
    try:
        async with asyncio.timeout(SECONDS):
            stream = await open_stream()
            try:
                asked = TcpQuestion(node.secret_key, node.addr() if question is None else question)
                while asked.answer is None and (data := await stream.read()):
                    await stream.write(asked.receive(data))
            finally:
                await stream.close()
    except TimeoutError:
        raise PeerTimeoutError(f"no answer about the other peers within {SECONDS} s") from None
    return asked.answer


async def ask_rendezvous(node: Node, host: EndpointAddr) -> list[EndpointAddr]:
    """Tells the rendezvous at ``host`` where ``node`` is; returns where the other members of the run are.

    Raises:
        ExchangeError: it cannot be reached, serves none, or does not answer in ten seconds.
        ProtocolError: its answer is malformed.
    """
    node.exempt(RENDEZVOUS_ALPN)
    await node.bind()
    answer = await ask_question(
        node,
        host,
        RENDEZVOUS_ALPN,
        postcard.encode(node.addr()),
        max_answer=MAX_ANSWER,
        seconds=SECONDS,
        about="the other peers",
    )
    members: list[EndpointAddr] = postcard.decode(Members, answer)
    return [member for member in members if member.id != node.endpoint_id]
