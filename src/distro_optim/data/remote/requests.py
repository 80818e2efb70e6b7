"""A client of a TCP data server but for its socket: requests out, checked answers in. No I/O.

Protocol: PsycheFoundation/psyche, ``shared/data-provider/src/remote``. One request is under way at a time, and the
answer names the interval it is for. The server serves members of the present epoch only, and says no more than "not in
this round" to anybody else, and to who asks for what it does not have.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from ...comm.framing import CLIENT_FRAME_LIMIT, SERVER_FRAME_LIMIT, ClientLink, LinkState
from ...comm.signing import SecretKey
from ...coordinator.messages import (
    CLIENT_TO_DATA_SERVER,
    DATA_SERVER_TO_CLIENT,
    RequestRejected,
    RequestTrainingData,
    TokenizedData,
)
from ...coordinator.types import BatchId
from ...errors import DataUnavailableError, InvalidDataError, ProtocolError
from ..provider import IntArray, TokenSequence
from .service import MAX_TOKEN_BYTES

__all__ = ["DataRequests", "RequestRefusedError", "cut_batch"]

_OVERHEAD: Final = 1024
"""Bytes of an answer beside its tokens, with room to spare."""

_LISTS: Final = 4
"""Of numbers that a sequence may have: tokens, labels, position ids, lengths."""


class RequestRefusedError(DataUnavailableError):
    """The server answers, and gives nothing. It may later, once the coordinator has told it of us."""


def cut_batch(batch: BatchId, seq_len: int) -> list[BatchId]:
    """``batch`` in pieces whose answers fit the frames that Psyche's server can write."""
    most = max(1, (SERVER_FRAME_LIMIT - _OVERHEAD) // _sequence_bytes(seq_len))
    return [BatchId(start, min(start + most - 1, batch.end)) for start in range(batch.start, batch.end + 1, most)]


class DataRequests:
    """One connection.

    Args:
        key: who we are.
        seq_len: tokens of the sequences, which bounds how long an answer may be.
    """

    def __init__(self, key: SecretKey, seq_len: int) -> None:
        # No answer is longer than the largest one with all of its lists.
        limit = min(CLIENT_FRAME_LIMIT, _LISTS * max(SERVER_FRAME_LIMIT, _sequence_bytes(seq_len)))
        self._link = ClientLink(key, DATA_SERVER_TO_CLIENT, CLIENT_TO_DATA_SERVER, limit=limit)
        self._asked: BatchId | None = None

    @property
    def is_open(self) -> bool:
        """Whether the handshake is done, so that requests can go out."""
        return self._link.state is LinkState.OPEN

    def data_to_send(self) -> bytes:
        """What the handshake wants sent; to be asked after each :meth:`receive`."""
        return self._link.data_to_send()

    def request(self, batch: BatchId) -> bytes:
        """The frame that asks for ``batch``; nothing else is asked until the answer is there."""
        assert self.is_open
        assert self._asked is None
        self._asked = batch
        return self._link.encode(RequestTrainingData(batch))

    def receive(self, data: bytes) -> list[TokenSequence] | None:
        """Takes bytes from the server, in pieces of any size; the answer once it is complete.

        Raises:
            RequestRefusedError: the server gives nothing.
            InvalidDataError: what it gives is not what was asked for, or makes no sense.
        """
        try:
            messages = self._link.receive(data, max_messages=1)
        except ProtocolError as error:
            raise InvalidDataError(f"it does not speak the protocol of a data server: {error}") from error
        if not messages:
            return None
        asked, self._asked = self._asked, None
        if asked is None:
            raise InvalidDataError("it answers, though nothing was asked")
        (message,) = messages
        if message.data_ids != asked:
            raise InvalidDataError(f"it was asked for {asked} and answers for {message.data_ids}")
        if isinstance(message, RequestRejected):
            raise RequestRefusedError(
                f"it gives no data for {asked} ({message.reason.value}): we are not in the present epoch as it knows "
                "it, or it has no such data"
            )
        if len(message.raw_data) != len(asked):
            raise InvalidDataError(f"it gives {len(message.raw_data)} sequences for {asked}, which has {len(asked)}")
        return [_sequence(one) for one in message.raw_data]


def _sequence_bytes(seq_len: int) -> int:
    """The most that a sequence of tokens alone takes in an answer: their count, and three lists that are not there."""
    return MAX_TOKEN_BYTES * (seq_len + 1) + (_LISTS - 1)


def _sequence(data: TokenizedData) -> TokenSequence:
    return TokenSequence(
        np.array(data.input_ids, np.int32),
        _array(data.labels),
        _array(data.position_ids),
        _array(data.sequence_lengths),
    )


def _array(values: tuple[int, ...] | None) -> IntArray | None:
    return None if values is None else np.array(values, np.int32)
