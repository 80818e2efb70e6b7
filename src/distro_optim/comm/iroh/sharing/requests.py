"""One question about a model and its answer: ``Ok(BlobTicket) | Err(SharingError variant)``, see :mod:`..one_question`.

(PsycheFoundation/psyche ``shared/network/src/p2p_model_sharing.rs``)
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from ....errors import ExchangeError
from ...tickets import BlobTicket
from ..connection import Connection
from ..endpoint import Node
from ..one_question import answer_question, ask_question
from .asking import AskBudget
from .messages import MAX_ANSWER, MAX_REQUEST, decode_answer, encode_answer

__all__ = ["REQUEST_SECONDS", "answer_request", "send_request"]

REQUEST_SECONDS: Final = 10.0
"""One request with its answer (``shared/client/src/state/init.rs``)."""


async def send_request(node: Node, peer: bytes, alpn: bytes, request: bytes, *, about: str) -> BlobTicket:
    """Asks ``peer``, and waits for its answer.

    Args:
        node: connects.
        peer: whose endpoint it is.
        alpn: the protocol.
        request: encoded.
        about: what is asked about, for messages.

    Raises:
        NotSharedError: it has nothing to share.
        ExchangeError: it cannot be reached, or does not answer in 10 seconds.
        ProtocolError: its answer is malformed.
    """
    answer = await ask_question(node, peer, alpn, request, max_answer=MAX_ANSWER, seconds=REQUEST_SECONDS, about=about)
    return decode_answer(answer)


async def answer_request(connection: Connection, budget: AskBudget, answer: Callable[[bytes], Awaitable[Any]]) -> None:
    """Serves the one request of a connection.

    Args:
        connection: that was accepted.
        budget: of the peer; where it is used up nothing is read, and the connection ends.
        answer: gives what is to be said to an encoded request; raises ProtocolError if that is malformed.

    Raises:
        ExchangeError: the peer has asked too often.
    """
    if not budget.take(connection.remote_id, time.monotonic()):
        raise ExchangeError("it has asked too often")

    async def encoded(request: bytes) -> bytes:
        return encode_answer(await answer(request))

    await answer_question(connection, encoded, max_question=MAX_REQUEST, seconds=REQUEST_SECONDS)
