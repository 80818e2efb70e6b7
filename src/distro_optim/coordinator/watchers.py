"""Who may watch a run without being in it: its host names their keys, and its members ask for them. No I/O.

A member asks the coordinator in a connection of its own (:mod:`~distro_optim.comm.question`): :data:`WHO_WATCHES` is
the question, a list of public keys the answer. So does one that wants to watch, and finds its own key there. The state
of the run knows nothing of them, and neither do Psyche's programs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Final

from ..comm.postcard import Bytes32, Limit, encode
from ..comm.question import Question
from ..comm.signing import PUBLIC_KEY_SIZE, SecretKey, public_keys
from ..comm.streams import Stream
from ..errors import ConfigurationError

__all__ = ["MAX_WATCHERS", "WHO_WATCHES", "ask_who_watches", "encode_watchers", "watcher_keys"]

WHO_WATCHES: Final = b"who watches"
"""A question; one with an address is longer."""

MAX_WATCHERS: Final = 8
"""Of a run. Each fetches every result once, as a member does, and gives nothing for it. Chosen arbitrarily."""

Keys = Annotated[list[Bytes32], Limit(MAX_WATCHERS)]
"""The answer, as postcard has it."""

_MAX_ANSWER: Final = MAX_WATCHERS * PUBLIC_KEY_SIZE + 8
_READ: Final = 4096


def watcher_keys(given: Iterable[bytes | str], *, name: str = "observers") -> frozenset[bytes]:
    """Public keys, as users write them: 32 bytes, or 64 hexadecimal digits.

    Raises:
        ConfigurationError: one is no key, or there are too many.
    """
    keys = public_keys(given, name=name, hint=", as distro-optim verify TICKET prints it")
    if len(keys) > MAX_WATCHERS:
        raise ConfigurationError(
            f"{name} has {len(keys)} keys, and at most {MAX_WATCHERS} may watch a run", name=name, value=len(keys)
        )
    return keys


def encode_watchers(keys: Iterable[bytes]) -> bytes:
    """The answer to :data:`WHO_WATCHES`."""
    return encode(sorted(keys), Keys)


async def ask_who_watches(stream: Stream, key: SecretKey) -> frozenset[bytes] | None:
    """Asks over a stream that was opened for it; None if there is no answer: whoever is no member and may not watch is
    given none.

    Raises:
        OSError, ExchangeError: the stream breaks.
        ProtocolError: the answer is malformed.
    """
    question: Question[list[bytes]] = Question(key, WHO_WATCHES, Keys, _MAX_ANSWER)
    while question.answer is None and (data := await stream.read(_READ)):
        if to_send := question.receive(data):
            await stream.write(to_send)
    return None if question.answer is None else frozenset(question.answer)
