"""Which peer has the model? All peers are asked at once, and again, until one of them shares it.

Psyche's clients ask one after the other (``shared/client/src/state/init.rs``). Then a peer that is gone, of which
nobody knows yet, costs those who wait for the others several times the seconds that a connection may take.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from ....errors import ExchangeError, NotSharedError, ProtocolError
from ...model_exchange import Patience

__all__ = ["SHORT_SECONDS", "Found", "find_sharers"]

T = TypeVar("T")

SHORT_SECONDS: Final = 5.0
"""How long :attr:`Patience.SHORT` is. A peer that has the weights shares them from the end of the last epoch on; chosen
arbitrarily above the time of a connection."""

GRACE_SECONDS: Final = 1.0
"""For the other peers, once one has answered, since parts are asked of all who have the model. Chosen arbitrarily."""

MAX_USELESS: Final = 5
"""Answers that do not serve, after which a peer is asked no more (``shared/client/src/state/init.rs``)."""

_FIRST_PAUSE_SECONDS: Final = 0.25
_MAX_PAUSE_SECONDS: Final = 2.0
_AT_ONCE: Final = 32


@dataclass(frozen=True)
class Found(Generic[T]):
    """What the first of the peers that share something gave.

    Attributes:
        answer: its own.
        peers: it, and those that gave the same.
        others: all the rest, in the order given.
    """

    answer: T
    peers: tuple[bytes, ...]
    others: tuple[bytes, ...]


class _Search(Generic[T]):
    def __init__(self, ask: Callable[[bytes], Awaitable[T]], peers: tuple[bytes, ...], patience: Patience) -> None:
        self._ask = ask
        self._peers = peers
        self._patience = patience
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._changed = asyncio.Event()
        self._answers: dict[bytes, T] = {}
        self._failed: set[bytes] = set()  # at least once
        self._without: set[bytes] = set()  # said so when last asked
        self._unreachable: set[bytes] = set()  # when last asked
        self._useless: set[bytes] = set()
        self._reason: Exception | None = None
        self._fatal: BaseException | None = None

    async def run(self, seconds: float) -> Found[T]:
        tasks = [asyncio.create_task(self._ask_until_it_shares(peer)) for peer in self._peers]
        try:
            return await self._wait(seconds)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask_until_it_shares(self, peer: bytes) -> None:
        pause = _FIRST_PAUSE_SECONDS
        useless = 0
        while peer not in self._answers and peer not in self._useless:
            try:
                async with self._slots:
                    self._answers[peer] = await self._ask(peer)
            except (ExchangeError, ProtocolError) as error:
                useless += isinstance(error, ProtocolError)
                self._note(peer, error, useless)
            except Exception as error:
                self._fatal = error
            self._changed.set()
            if self._patience is Patience.ONCE:
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, _MAX_PAUSE_SECONDS)

    def _note(self, peer: bytes, error: ExchangeError | ProtocolError, useless: int) -> None:
        self._reason = error
        self._failed.add(peer)
        for told in (self._without, self._unreachable):
            told.discard(peer)
        if isinstance(error, NotSharedError):
            self._without.add(peer)
        elif isinstance(error, ExchangeError):
            self._unreachable.add(peer)
        elif useless >= MAX_USELESS:
            self._useless.add(peer)

    async def _wait(self, seconds: float) -> Found[T]:
        began = time.monotonic()
        found_at: float | None = None
        while True:
            self._changed.clear()
            now = time.monotonic() - began
            if self._fatal is not None:
                raise self._fatal
            if self._answers:
                found_at = now if found_at is None else found_at
                if now >= found_at + GRACE_SECONDS or len(self._answers.keys() | self._failed) == len(self._peers):
                    return self._best()
                next_look = found_at + GRACE_SECONDS
            else:
                if self._is_over(now, seconds):
                    raise ExchangeError(f"no peer shares the model: {self._reason or 'no answer'}") from self._reason
                next_look = SHORT_SECONDS if self._patience is Patience.SHORT and now < SHORT_SECONDS else seconds
            try:
                async with asyncio.timeout(max(0.0, next_look - now) if next_look > now else None):
                    await self._changed.wait()
            except TimeoutError:
                pass

    def _is_over(self, now: float, seconds: float) -> bool:
        most_have_nothing = 2 * len(self._without) > len(self._peers)
        if self._useless and len(self._useless | self._unreachable) == len(self._peers):
            return True
        match self._patience:
            case Patience.ONCE:
                return most_have_nothing or len(self._failed) == len(self._peers)
            case Patience.SHORT:
                return (most_have_nothing and now >= SHORT_SECONDS) or now >= seconds
            case Patience.LONG:
                return now >= seconds

    def _best(self) -> Found[T]:
        best = next(peer for peer in self._peers if peer in self._answers)
        answer = self._answers[best]
        same = tuple(peer for peer in self._peers if peer in self._answers and self._answers[peer] == answer)
        return Found(answer, same, tuple(peer for peer in self._peers if peer not in same))


async def find_sharers(
    ask: Callable[[bytes], Awaitable[T]],
    peers: Iterable[bytes],
    *,
    patience: Patience = Patience.ONCE,
    seconds: float = 0.0,
) -> Found[T]:
    """Asks ``peers`` for what they share.

    Args:
        ask: asks one; raises NotSharedError if it has nothing, another ExchangeError or ProtocolError if it cannot be
            asked or is of no use. Any other error ends the search.
        peers: endpoint ids, best first; of several that share something different, the first counts.
        patience: with those that have nothing, or nothing yet.
        seconds: after which nobody is asked again, whatever the patience.

    Raises:
        ExchangeError: nobody shares anything; the message holds the last reason.
    """
    return await _Search(ask, tuple(dict.fromkeys(peers)), patience).run(seconds)
