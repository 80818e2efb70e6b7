"""Which version a peer is of: told to the host of a run before it is asked to let one in. One question a connection.

::

    question    Speaks of the one who asks, in JSON
    answer      Speaks of the host

In a run of Psyche's nobody asks. A host of before this protocol does not know it, which is an answer, too:
:data:`~distro_optim.protocol.SILENT`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from ...errors import ExchangeError, PeerUnreachableError, ProtocolError
from ...protocol import MAX_BYTES, OURS, SILENT, Speaks, why_apart
from ..addresses import EndpointAddr
from .connection import Connection
from .endpoint import Node
from .one_question import answer_question, ask_question

__all__ = ["INTRODUCTION_ALPN", "Introductions", "VersionDesk", "introduce"]

INTRODUCTION_ALPN: Final = b"distro-optim/version/0"

MAX_PEERS: Final = 4096
"""Whose introduction is remembered; the oldest are forgotten. Chosen arbitrarily, above what a run has clients."""

SECONDS: Final = 10.0
"""For a question with its answer."""

DIAL_SECONDS: Final = 5.0
"""A host that was reached over TCP a moment ago may be out of reach over UDP. Chosen arbitrarily."""

_UNKNOWN_PROTOCOL: Final = "error 120"
"""In what iroh says if the other side has no such protocol: TLS's no_application_protocol (RFC 7301)."""


class VersionDesk:
    """What a host knows of the versions of its peers. No I/O.

    Args:
        tell: told, once for each peer, of another version than ours, in a sentence.
        ours: what we speak.
    """

    def __init__(self, tell: Callable[[str], None], ours: Speaks = OURS) -> None:
        self.ours = ours
        self._tell = tell
        self._said: OrderedDict[bytes, Speaks] = OrderedDict()
        self._told: set[tuple[bytes, Speaks]] = set()

    def hear(self, peer: bytes, speaks: Speaks) -> None:
        """``peer``, whose identity is proven, introduces itself."""
        self._said[peer] = speaks
        self._said.move_to_end(peer)
        while len(self._said) > MAX_PEERS:
            self._said.popitem(last=False)
        if speaks.version != self.ours.version and self.why_not(peer) is None:
            self._tell_once(peer, speaks, f"{_name(peer)} has {speaks}, here is {self.ours}: they train together")

    def why_not(self, peer: bytes) -> str | None:
        """Why ``peer`` cannot be in the run; None if it can. One that has said nothing is of before introductions."""
        speaks = self._said.get(peer, SILENT)
        reason = why_apart(self.ours, speaks, us="this host", them=_name(peer))
        if reason is not None:
            self._tell_once(peer, speaks, reason)
        return reason

    def _tell_once(self, peer: bytes, speaks: Speaks, text: str) -> None:
        if (peer, speaks) not in self._told and len(self._told) < MAX_PEERS:
            self._told.add((peer, speaks))
            self._tell(text)


class Introductions:
    """Serves a :class:`VersionDesk` on a node.

    Args:
        node: whose connections are used.
        desk: hears and answers.
    """

    def __init__(self, node: Node, desk: VersionDesk) -> None:
        self._node = node
        self._desk = desk
        node.exempt(INTRODUCTION_ALPN)  # nobody who introduces himself is in the run yet
        node.accept(INTRODUCTION_ALPN, self._serve)

    def close(self) -> None:
        """Serves no more."""
        self._node.refuse(INTRODUCTION_ALPN)

    async def _serve(self, connection: Connection) -> None:
        async def answer(said: bytes) -> bytes:
            self._desk.hear(connection.remote_id, Speaks.decode(said))
            return self._desk.ours.encode()

        await answer_question(connection, answer, max_question=MAX_BYTES, seconds=SECONDS)


async def introduce(node: Node, host: EndpointAddr, ours: Speaks = OURS) -> Speaks | None:
    """Says to the host of a run what we speak, and hears what it does; None if it cannot be asked now."""
    node.exempt(INTRODUCTION_ALPN)
    try:
        answer = await ask_question(
            node,
            host,
            INTRODUCTION_ALPN,
            ours.encode(),
            max_answer=MAX_BYTES,
            seconds=SECONDS,
            about="the host's version",
            dial_seconds=DIAL_SECONDS,
        )
        return Speaks.decode(answer)
    except PeerUnreachableError as error:
        return SILENT if _UNKNOWN_PROTOCOL in str(error) else None
    except (ExchangeError, ProtocolError):
        return None


def _name(peer: bytes) -> str:
    return f"peer {peer.hex()[:8]}"
