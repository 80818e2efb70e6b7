"""Who hosts a run, asked of any of its peers: for those that come late, wait outside, or have slept.

The host of a run may change, and with it what a ticket names. So every peer of a run answers whoever knows the run's
name, over a connection for nothing else, each side ended by FIN::

    question    the run's name, at most 32 bytes
    answer      Whereabouts

Addresses are rumours, as everywhere: the peer dialled there has to prove its id. Whether an answer is believed is the
affair of the one who asks; that it is the answer of this peer is proven by the connection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Final

from ...errors import ProtocolError
from .. import postcard
from ..addresses import EndpointAddr
from ..postcard import U64, Limit
from .connection import Connection
from .endpoint import Node
from .one_question import answer_question, ask_question

__all__ = ["MAX_PEERS", "WHEREABOUTS_ALPN", "Whereabouts", "WhereaboutsDesk", "ask_whereabouts"]

WHEREABOUTS_ALPN: Final = b"distro-optim/whereabouts/0"

MAX_PEERS: Final = 4
"""Other peers in an answer, and in a ticket: each takes some 80 characters of it. Chosen arbitrarily."""

MAX_QUESTION: Final = 32
MAX_ANSWER: Final = 16384
"""Bytes: five addresses with all that an address may have."""

SECONDS: Final = 5.0
"""For a question with its answer. Chosen arbitrarily."""


@dataclass(frozen=True)
class Whereabouts:
    """What a peer knows.

    Attributes:
        term: in which the host hosts; 0 if it is the one of the first ticket.
        host: where it is; None while there is none.
        peers: where some other peers are.
    """

    term: U64 = 0
    host: EndpointAddr | None = None
    peers: Annotated[tuple[EndpointAddr, ...], Limit(MAX_PEERS)] = ()


class WhereaboutsDesk:
    """Answers on a node.

    Args:
        node: whose connections are used.
        run_id: the run about which it answers.
        known: what there is to answer.
    """

    def __init__(self, node: Node, run_id: str, known: Callable[[], Whereabouts]) -> None:
        self._node = node
        self._run_id = run_id.encode()
        self._known = known
        node.exempt(WHEREABOUTS_ALPN)  # those who ask are not in the epoch
        node.accept(WHEREABOUTS_ALPN, self._serve)

    def close(self) -> None:
        """Answers no more."""
        self._node.refuse(WHEREABOUTS_ALPN)

    async def _serve(self, connection: Connection) -> None:
        await answer_question(connection, self._answer, max_question=MAX_QUESTION, seconds=SECONDS)

    async def _answer(self, asked: bytes) -> bytes:
        return postcard.encode(self._known() if asked == self._run_id else Whereabouts())


async def ask_whereabouts(node: Node, peer: EndpointAddr, run_id: str) -> Whereabouts:
    """Asks ``peer`` who hosts the run.

    Raises:
        ExchangeError: it cannot be reached, knows no such questions, or does not answer in five seconds.
        ProtocolError: its answer is malformed.
    """
    node.exempt(WHEREABOUTS_ALPN)
    answer = await ask_question(
        node,
        peer,
        WHEREABOUTS_ALPN,
        run_id.encode(),
        max_answer=MAX_ANSWER,
        seconds=SECONDS,
        about="the run's host",
    )
    return read_whereabouts(answer)


def read_whereabouts(answer: bytes) -> Whereabouts:
    """An answer.

    Raises:
        ProtocolError: it is malformed.
    """
    if len(answer) > MAX_ANSWER:
        raise ProtocolError(f"an answer about a run's host has at most {MAX_ANSWER} bytes")
    found: Whereabouts = postcard.decode(Whereabouts, answer)
    return found
