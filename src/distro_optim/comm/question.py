"""Our side of a question to a coordinator, in a connection of its own. No I/O.

Where a client would prove its key, the one who asks signs the challenge together with the question, and with it, its
right to ask::

    server -> client    Challenge                     as in :mod:`.framing`
    client -> server    ChallengeResponse             signed: challenge, QUESTION_MARK, the question
    server -> client    the answer                    in a frame, and the end

A coordinator of Psyche's closes the connection: the challenge is not answered as it knows it.
"""

from __future__ import annotations

from typing import Any, Final, Generic, TypeVar

from ..errors import ProtocolError
from .framing import (
    QUESTION_MARK,
    Challenge,
    ChallengeResponse,
    FrameDecoder,
    client_envelope,
    encode_frame,
    server_envelope,
)
from .postcard import Bytes32, decode
from .signing import SecretKey, SignedMessage

__all__ = ["Question"]

_FROM_SERVER: Final = server_envelope(Bytes32)
_FROM_CLIENT: Final = client_envelope(Bytes32)
"""Of the handshake; what would come after it does not matter."""

T = TypeVar("T")


class Question(Generic[T]):
    """See the module.

    Args:
        key: our secret key.
        question: as it is sent.
        answer_type: of the answer, as postcard has it.
        max_answer: bytes of the answer at most.

    Attributes:
        answer: what was asked for; None until it is known.
    """

    def __init__(self, key: SecretKey, question: bytes, answer_type: Any, max_answer: int) -> None:
        self.answer: T | None = None
        self._key = key
        self._question = question
        self._type = answer_type
        self._frames = FrameDecoder(max_answer)
        self._asked = False

    def receive(self, data: bytes) -> bytes:
        """Takes bytes of the coordinator; returns those to send.

        Raises:
            ProtocolError: they make no sense.
        """
        to_send = b""
        for payload in self._frames.feed(data):
            if self._asked:
                self.answer = decode(self._type, payload)
                continue
            challenge = _FROM_SERVER.decode(payload)
            if not isinstance(challenge, Challenge):
                raise ProtocolError("no challenge came")
            sealed = SignedMessage.seal(self._key, challenge.nonce + QUESTION_MARK + self._question)
            to_send += encode_frame(_FROM_CLIENT.encode(ChallengeResponse(sealed)))
            self._asked = True
        return to_send
