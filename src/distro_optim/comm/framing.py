"""Length-delimited frames, and the link with a challenge that Psyche's TCP servers speak. No I/O.

A frame is a 32-bit big-endian length and that many bytes. Each holds one postcard value (PsycheFoundation/psyche,
``shared/network/src/tcp.rs``)::

    server -> client    Challenge([u8; 32]) | Else(message)
    client -> server    ChallengeResponse(bytes) | Else(message)

The server opens with 32 random bytes; the client answers with them, signed, and has thereby named and proved its key.
No acknowledgement follows: from then on both send messages. The server does not prove who it is.

====================  ====================================  =========================================
state                 server receives                       client receives
====================  ====================================  =========================================
CHALLENGE             ChallengeResponse -> OPEN             Challenge -> answers, OPEN
OPEN                  Else -> a message                     Else -> a message
CLOSED                nothing any more                      nothing any more
====================  ====================================  =========================================

Anything else closes the link and raises :class:`~distro_optim.errors.ProtocolError`. Two ends of ours may agree in the
handshake that the server sends changes (:mod:`.changes`).
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Final, Generic, TypeVar

from typing_extensions import override

from ..errors import ConfigurationError, LimitExceededError, ProtocolError
from . import changes
from .postcard import Bytes32, Codec, Limit, codec
from .signing import SecretKey, SignedMessage

__all__ = [
    "CHALLENGE_SIZE",
    "CLIENT_FRAME_LIMIT",
    "QUESTION_MARK",
    "SERVER_FRAME_LIMIT",
    "Challenge",
    "ChallengeResponse",
    "ClientLink",
    "Else",
    "FrameDecoder",
    "LinkState",
    "SecretKey",
    "ServerLink",
    "SignedMessage",
    "client_envelope",
    "encode_frame",
    "payload_of",
    "server_envelope",
]

SERVER_FRAME_LIMIT: Final = 8 * 1024 * 1024
"""Bytes of a frame that Psyche's server reads or writes (default of tokio-util's ``LengthDelimitedCodec``)."""

CLIENT_FRAME_LIMIT: Final = 64 * 1024 * 1024
"""Bytes of a frame that Psyche's client reads (``shared/network/src/tcp.rs``)."""

CHALLENGE_SIZE: Final = 32
"""Bytes that a server draws for each connection."""

QUESTION_MARK: Final = b"distro-optim/where-are-the-others/0"
"""Between a challenge and a question, in the answer of somebody who does not want to be a client, but to ask."""

_HEADER: Final = struct.Struct(">I")
_MAX_RESPONSE: Final = 1024
"""A response has 129 bytes; chosen so that a stranger cannot make us keep much."""

T = TypeVar("T")


def encode_frame(payload: bytes, *, limit: int = CLIENT_FRAME_LIMIT) -> bytes:
    """A frame around ``payload``.

    Raises:
        ConfigurationError: it is longer than ``limit``.
    """
    if len(payload) > limit:
        raise ConfigurationError(f"a frame of {len(payload)} bytes is above the limit of {limit}", name="payload")
    return _HEADER.pack(len(payload)) + payload


def payload_of(frame: bytes) -> bytes:
    """What is in a frame of :func:`encode_frame`."""
    return frame[_HEADER.size :]


class FrameDecoder:
    """Cuts a stream of bytes, fed in pieces of any size, into frames.

    Args:
        limit: longest payload in bytes. The buffer never holds more than one frame and the piece just fed.
    """

    __slots__ = ("_buffer", "limit")

    def __init__(self, limit: int) -> None:
        self._buffer = bytearray()
        self.limit = limit

    def __len__(self) -> int:
        """Bytes waiting for the rest of their frame."""
        return len(self._buffer)

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[bytes]:
        """Takes ``data`` and yields the payloads that are complete. Iterate it to its end.

        A change of :attr:`limit` counts from the next payload on, also within one call.

        Raises:
            LimitExceededError: a frame announces more than ``limit``. The decoder cannot be used any more.
        """
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while len(buffer) - start >= _HEADER.size:
                (length,) = _HEADER.unpack_from(buffer, start)
                if length > self.limit:
                    raise LimitExceededError(f"a frame of {length} bytes is announced, at most {self.limit} may come")
                stop = start + _HEADER.size + length
                if len(buffer) < stop:
                    break
                payload = bytes(memoryview(buffer)[start + _HEADER.size : stop])
                start = stop
                yield payload
        finally:
            del buffer[:start]


@dataclass(frozen=True)
class Challenge:
    """What a client has to sign."""

    nonce: Bytes32


@dataclass(frozen=True)
class ChallengeResponse:
    """A :class:`~.signing.SignedMessage` that holds the challenge."""

    sealed: Annotated[bytes, Limit(_MAX_RESPONSE)]


@dataclass(frozen=True)
class Else(Generic[T]):
    """Everything after the handshake."""

    message: T


def server_envelope(message: Any) -> Codec:
    """The codec of what a server sends, given the declaration of its messages."""
    return codec(Challenge | Else[message])


def client_envelope(message: Any) -> Codec:
    """The codec of what a client sends, given the declaration of its messages."""
    return codec(ChallengeResponse | Else[message])


class LinkState(enum.Enum):
    """Where a link stands; see the table of the module."""

    CHALLENGE = "the challenge is not answered yet"
    OPEN = "messages flow"
    CLOSED = "closed"


class _Link:
    """What both ends share: frames in, and the state."""

    def __init__(self, incoming: Codec, outgoing: Codec, limit: int) -> None:
        self.state = LinkState.CHALLENGE
        self._incoming = incoming
        self._outgoing = outgoing
        self._limit = limit
        self._frames = FrameDecoder(_MAX_RESPONSE)

    def encode(self, message: Any) -> bytes:
        """The frame of one message, the same for every link of the kind.

        Raises:
            ConfigurationError: the message does not fit its declaration or the limit.
        """
        return encode_frame(self._outgoing.encode(Else(message)), limit=CLIENT_FRAME_LIMIT)

    def receive(self, data: bytes | bytearray | memoryview, *, max_messages: int | None = None) -> list[Any]:
        """Takes bytes from the peer, in pieces of any size, and returns the messages that are complete.

        Args:
            data: the bytes.
            max_messages: how many may come at once; what is above is not even decoded.

        Raises:
            LimitExceededError: there are more; the link is closed by it.
            ProtocolError: the link is closed by it.
        """
        if self.state is LinkState.CLOSED:
            raise ProtocolError("the link is closed")
        messages: list[Any] = []
        try:
            for payload in self._frames.feed(data):
                if max_messages is not None and len(messages) >= max_messages:
                    raise LimitExceededError(f"more than {max_messages} messages came at once")
                envelope = self._incoming.decode(self._whole(payload))
                if self.state is LinkState.CHALLENGE:
                    self._shake(envelope)
                    self.state = LinkState.OPEN
                    self._frames.limit = self._limit
                elif isinstance(envelope, Else):
                    messages.append(envelope.message)
                else:
                    raise ProtocolError(f"{type(envelope).__name__} came, but the handshake is over")
        except ProtocolError:
            self.close()
            raise
        return messages

    def close(self) -> None:
        """Nothing more is taken, and what was buffered is dropped."""
        self.state = LinkState.CLOSED
        self._frames = FrameDecoder(0)

    def _whole(self, payload: bytes) -> bytes:
        return payload

    def _shake(self, envelope: Any) -> None:
        raise NotImplementedError


class ServerLink(_Link):
    """The server's end of one connection.

    Args:
        challenge: 32 fresh random bytes; never use them twice, or answers can be replayed.
        incoming: codec made by :func:`client_envelope`.
        outgoing: codec made by :func:`server_envelope`.
        limit: longest frame in bytes taken from the client.
        takes_questions: whether the challenge may be answered together with a question.

    Attributes:
        peer: the client's public key once the link is open.
        sends_changes: whether the client wants changes; only where the challenge announced them.
        question: what the peer wants to know in place of being a client; None if it wants to be one.
    """

    def __init__(
        self,
        challenge: bytes,
        incoming: Codec,
        outgoing: Codec,
        *,
        limit: int = SERVER_FRAME_LIMIT,
        takes_questions: bool = False,
    ) -> None:
        super().__init__(incoming, outgoing, limit)
        self._challenge = challenge
        self._takes_questions = takes_questions
        self.peer: bytes | None = None
        self.sends_changes = False
        self.question: bytes | None = None

    def opening(self) -> bytes:
        """The frame to send first."""
        return encode_frame(self._outgoing.encode(Challenge(self._challenge)))

    @override
    def _shake(self, envelope: Any) -> None:
        if not isinstance(envelope, ChallengeResponse):
            raise ProtocolError(f"{type(envelope).__name__} came before the challenge was answered")
        answer = SignedMessage.open(envelope.sealed)
        asks = self._challenge + QUESTION_MARK
        if self._takes_questions and answer.data.startswith(asks):
            self.question = answer.data[len(asks) :]
        elif answer.data == self._challenge + changes.CHANGES_MARK and changes.announces(self._challenge):
            self.sends_changes = True
        elif answer.data != self._challenge:
            raise ProtocolError("another challenge than ours was answered", field="sealed.data")
        self.peer = answer.sender


class ClientLink(_Link):
    """The client's end of one connection.

    Args:
        key: our secret key.
        incoming: codec made by :func:`server_envelope`.
        outgoing: codec made by :func:`client_envelope`.
        limit: longest frame in bytes taken from the server.
        takes_changes: whether we ask for changes, of a server that announces them.
    """

    def __init__(
        self,
        key: SecretKey,
        incoming: Codec,
        outgoing: Codec,
        *,
        limit: int = CLIENT_FRAME_LIMIT,
        takes_changes: bool = False,
    ) -> None:
        super().__init__(incoming, outgoing, limit)
        self._key = key
        self._unsent = b""
        self._takes_changes = takes_changes
        self._before: bytes | None = None  # the latest payload, where changes were agreed on

    @property
    def gets_changes(self) -> bool:
        """Whether changes were agreed on, which a server of Psyche's does not do."""
        return self.state is LinkState.OPEN and self._takes_changes

    def data_to_send(self) -> bytes:
        """What the handshake wants sent; empty when there is nothing. Call it after each :meth:`receive`."""
        unsent, self._unsent = self._unsent, b""
        return unsent

    @override
    def _shake(self, envelope: Any) -> None:
        if not isinstance(envelope, Challenge):
            raise ProtocolError(f"{type(envelope).__name__} came where a challenge was expected")
        self._takes_changes = self._takes_changes and changes.announces(envelope.nonce)
        mark = changes.CHANGES_MARK if self._takes_changes else b""
        sealed = SignedMessage.seal(self._key, envelope.nonce + mark)
        self._unsent = encode_frame(self._outgoing.encode(ChallengeResponse(sealed)))

    @override
    def _whole(self, payload: bytes) -> bytes:
        if self.state is LinkState.OPEN and self._takes_changes:
            self._before = payload = changes.apply(self._before, payload, limit=self._limit)
        return payload
