"""One question and its answer, over a connection for nothing else.

::

    asking     -> the question, then the end of the stream
    answering  <- the answer, then the end of the stream
    asking        closes the connection, when it has read

Psyche's clients ask each other about the model in this way (``shared/network/src/p2p_model_sharing.rs``), and peers of
our own kind ask everything so that is not said all the time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from ...errors import PeerTimeoutError
from ..addresses import EndpointAddr
from .connection import Connection
from .endpoint import DIAL_SECONDS, Node

__all__ = ["answer_question", "ask_question"]


async def ask_question(
    node: Node,
    peer: bytes | EndpointAddr,
    alpn: bytes,
    question: bytes,
    *,
    max_answer: int,
    seconds: float,
    about: str,
    dial_seconds: float = DIAL_SECONDS,
) -> bytes:
    """Asks ``peer``, and waits for its answer.

    Args:
        node: connects.
        peer: whom to ask.
        alpn: the protocol.
        question: encoded.
        max_answer: bytes of the answer at most.
        seconds: for all of it.
        about: what is asked about, for messages.
        dial_seconds: for the dial.

    Raises:
        ExchangeError: it cannot be reached, knows no such questions, says more, or does not answer in time.
    """
    try:
        async with asyncio.timeout(seconds):
            connection = await node.connect(peer, alpn, timeout=dial_seconds)
            try:
                with connection.awaited():
                    send, recv = await connection.open_bi()
                    await send.write(question)
                    await send.finish()
                    return await recv.read_to_end(max_answer)
            finally:
                connection.close()
    except PeerTimeoutError:
        raise
    except TimeoutError:
        raise PeerTimeoutError(f"no answer about {about} within {seconds:g} s") from None


async def answer_question(
    connection: Connection, answer: Callable[[bytes], Awaitable[bytes]], *, max_question: int, seconds: float
) -> None:
    """Answers the one question of a connection.

    Args:
        connection: that was accepted.
        answer: gives the encoded answer to an encoded question; raises ProtocolError if that is malformed.
        max_question: bytes of the question at most.
        seconds: for each step: the question, taking the answer, and closing.

    Raises:
        ExchangeError: the question does not come in time, is too long, or the answer is not taken.
    """
    send, recv = await connection.accept_bi(timeout=seconds)
    said = await answer(await recv.read_to_end(max_question, timeout=seconds))
    await send.write(said, timeout=seconds)
    await send.finish()
    # The one who asks closes when it has read; if we did, the answer could be lost.
    try:
        await asyncio.wait_for(connection.closed(), seconds)
    except TimeoutError:
        pass
