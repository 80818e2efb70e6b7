"""Where the members of a run are, as its coordinator knows: asked over iroh (:mod:`.rendezvous`), or over TCP. No I/O.

Over TCP the question is asked in a connection of its own (:mod:`~distro_optim.comm.question`): it is the EndpointAddr
of the one who asks, and the answer a count and the EndpointAddr of each other member.

With :data:`WHO_HOSTS` in place of the address the answer is the address of the peer that hosts, or none: of
``distro-optim serve``, which is no peer. Whoever was given ``host:port/run-id`` learns its key by that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Final

from ...errors import PeerRefusedError, ProtocolError
from ..addresses import EndpointAddr
from ..framing import encode_frame
from ..postcard import Limit, decode, encode
from ..question import Question
from ..signing import SecretKey

__all__ = ["MAX_ANSWER", "MAX_QUESTION", "WHO_HOSTS", "MeetingPlace", "Members", "TcpQuestion"]

WHO_HOSTS: Final = b"host"
"""A question; an address is longer."""

MAX_MEMBERS: Final = 256
"""Clients of an epoch."""

MAX_PLACES: Final = 8
"""Relays, and addresses, kept of one member: a machine has a few interfaces. Chosen arbitrarily."""

MAX_QUESTION: Final = 16 * 1024
MAX_ANSWER: Final = MAX_MEMBERS * 5 * 1024
"""Eight relay URLs of half a kilobyte are the most that a member takes."""

Members = Annotated[list[EndpointAddr], Limit(MAX_MEMBERS)]
"""The answer, as postcard has it."""


class MeetingPlace:
    """What is known of the members of a run.

    Args:
        is_member: whether a public key takes part in the run at present; others are told nothing.

    Attributes:
        host: where the peer is that hosts the run; None if no peer does.
        watchers: public keys that may watch the run: they are told where the members are, and nobody is told of them.
    """

    def __init__(self, is_member: Callable[[bytes], bool]) -> None:
        self.host: Callable[[], EndpointAddr] | None = None
        self.watchers: frozenset[bytes] = frozenset()
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
        if not self._is_member(peer) and peer not in self.watchers:
            raise PeerRefusedError("it is not in this run")
        self._places = {member: place for member, place in self._places.items() if self._is_member(member)}
        self._places.pop(peer, None)
        # Public ones first: they are of use to everybody, and a machine can have many private ones.
        dialable = (place for place in address.direct if place.is_dialable)
        direct = sorted(dialable, key=lambda place: place.ip.is_private)
        known = EndpointAddr(peer, address.relays[:MAX_PLACES], tuple(direct[:MAX_PLACES]))
        others = list(self._places.values())[-(MAX_MEMBERS - 1) :]
        if peer in self.watchers:
            return others
        self._places[peer] = known
        while len(self._places) > MAX_MEMBERS:
            del self._places[next(iter(self._places))]
        return others

    def place_of(self, peer: bytes) -> EndpointAddr | None:
        """Where a member said that it is; None if it has not said so."""
        return self._places.get(peer)

    def answer(self, peer: bytes, question: bytes) -> bytes:
        """The frame that answers ``question``, as it came over TCP from ``peer``, whose identity is proven.

        Raises:
            ProtocolError: it is malformed.
            PeerRefusedError: ``peer`` is not a member.
        """
        if question == WHO_HOSTS:
            if not self._is_member(peer):
                raise PeerRefusedError("it is not in this run")
            return encode_frame(encode([] if self.host is None else [self.host()], Members))
        address: EndpointAddr = decode(EndpointAddr, question)
        return encode_frame(encode(self.visit(peer, address), Members))


class TcpQuestion(Question[list[EndpointAddr]]):
    """Our side of a question over TCP.

    Args:
        key: our secret key.
        question: where we are, for the addresses of the other members; or :data:`WHO_HOSTS`.
    """

    def __init__(self, key: SecretKey, question: EndpointAddr | bytes) -> None:
        if isinstance(question, EndpointAddr):  # a response is short
            few = EndpointAddr(question.id, question.relays[:1], question.direct[:MAX_PLACES])
            question = encode(few)
        super().__init__(key, question, Members, MAX_ANSWER)
