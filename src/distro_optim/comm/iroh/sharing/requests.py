"""One question about a model and its answer: a connection for each, as Psyche's peers do it.

::

    requester  -> a request, then the end of the stream
    responder  <- Ok(BlobTicket) | Err(SharingError variant), then the end of the stream
    requester     closes the connection, when it has read

(``shared/network/src/p2p_model_sharing.rs``)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from ....errors import ExchangeError, PeerTimeoutError
from ...tickets import BlobTicket
from ..connection import Connection
from ..endpoint import Node
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
    try:
        async with asyncio.timeout(REQUEST_SECONDS):
            connection = await node.connect(peer, alpn)
            try:
                send, recv = await connection.open_bi()
                await send.write(request)
                await send.finish()
                return decode_answer(await recv.read_to_end(MAX_ANSWER))
            finally:
                connection.close()
    except PeerTimeoutError:
        raise
    except TimeoutError:
        raise PeerTimeoutError(f"no answer about {about} within {REQUEST_SECONDS} s") from None


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
    send, recv = await connection.accept_bi(timeout=REQUEST_SECONDS)
    said = await answer(await recv.read_to_end(MAX_REQUEST, timeout=REQUEST_SECONDS))
    await send.write(encode_answer(said), timeout=REQUEST_SECONDS)
    await send.finish()
    # The requester closes when it has read; if we did, the answer could be lost.
    try:
        await asyncio.wait_for(connection.closed(), REQUEST_SECONDS)
    except TimeoutError:
        pass
