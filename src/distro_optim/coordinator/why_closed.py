"""Why a coordinator has closed a client's connection: the client asks, and the coordinator answers. No I/O.

A coordinator of Psyche's tells a client that it does not want by closing its connection, and so do ours, since their
messages have no word for it. A client of ours that was turned away asks in a connection of its own
(:mod:`~distro_optim.comm.question`): :data:`WHY_CLOSED` is the question, a :class:`WhyClosed` the answer. Whoever asks
proves its key, and is told about that key alone.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Annotated, Final

from ..comm.postcard import Limit, encode
from ..comm.question import Question
from ..comm.signing import SecretKey
from ..comm.streams import Stream
from ..words import shown

__all__ = ["MAX_REASON", "WHY_CLOSED", "Reasons", "WhyClosed", "ask_why"]

WHY_CLOSED: Final = b"why"
"""A question; one with an address is longer."""

MAX_REASON: Final = 200
"""Characters of a reason. Ours have up to eighty."""

MAX_REASON_BYTES: Final = 4 * MAX_REASON
MAX_KEPT: Final = 1024
"""Reasons that a coordinator remembers, the latest: four times the clients of an epoch."""

_MAX_ANSWER: Final = MAX_REASON_BYTES + 16
_READ: Final = 4096


@dataclass(frozen=True)
class WhyClosed:
    """An answer.

    Attributes:
        reason: in words; empty where nothing is known.
        may_return: whether the client may come again.
    """

    reason: Annotated[str, Limit(MAX_REASON_BYTES)]
    may_return: bool

    def encode(self) -> bytes:
        """As postcard has it."""
        return encode(self)


class Reasons:
    """What a coordinator remembers of those that it has taken out."""

    def __init__(self) -> None:
        self._reasons: OrderedDict[bytes, str] = OrderedDict()

    def note(self, peer: bytes, reason: str) -> None:
        """The owner of a key was taken out, or turned away."""
        self._reasons.pop(peer, None)
        self._reasons[peer] = shown(reason, MAX_REASON)
        if len(self._reasons) > MAX_KEPT:
            self._reasons.popitem(last=False)

    def answer(self, peer: bytes, *, is_allowed: bool, is_banned: bool) -> WhyClosed:
        """To the owner of a key. One that may come again is told once: what comes later has another reason."""
        reason = self._reasons.pop(peer, "") if is_allowed else self._reasons.get(peer, "")
        if not reason and not is_allowed:
            reason = "the key is banned" if is_banned else "the key is not on the list of this run"
        return WhyClosed(reason, is_allowed)


async def ask_why(stream: Stream, key: SecretKey) -> WhyClosed | None:
    """Asks over a stream that was opened for it; None if there is no answer, or nothing is known.

    Raises:
        OSError, ExchangeError: the stream breaks.
        ProtocolError: the answer is malformed.
    """
    question: Question[WhyClosed] = Question(key, WHY_CLOSED, WhyClosed, _MAX_ANSWER)
    while question.answer is None and (data := await stream.read(_READ)):
        if to_send := question.receive(data):
            await stream.write(to_send)
    answer = question.answer
    if answer is None or not answer.reason:
        return None
    return WhyClosed(shown(answer.reason, MAX_REASON), answer.may_return)
