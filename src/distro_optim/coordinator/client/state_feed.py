"""Between a link and who reads its states: the newest few."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Final

from ..types import Coordinator

__all__ = ["StateFeed"]

MAX_UNREAD_STATES: Final = 64
"""States kept for a busy reader. A state holds all that matters of the last four rounds, so older ones may go."""


class StateFeed:
    """What :meth:`CoordinatorClient.states` reads from: states go in, each reader takes the next."""

    def __init__(self) -> None:
        self.latest: Coordinator | None = None
        self._unread: deque[Coordinator] = deque(maxlen=MAX_UNREAD_STATES)
        self._news = asyncio.Event()
        self._ended = False
        self._error: Exception | None = None

    def put(self, state: Coordinator) -> None:
        """Adds a state, unless it equals the one before."""
        if self._ended or state is self.latest or state == self.latest:
            return
        self.latest = state
        self._unread.append(state)
        self._news.set()

    @property
    def error(self) -> Exception | None:
        """With which it has ended; None if it goes on, or has ended well."""
        return self._error

    def skip(self) -> None:
        """Forgets the states that nobody has read, but for the newest."""
        while len(self._unread) > 1:
            self._unread.popleft()

    def end(self, error: Exception | None = None) -> None:
        """No state will follow; readers get ``error``, if there is one, once they have read what is there."""
        if not self._ended:
            self._ended, self._error = True, error
            self._news.set()

    async def read(self) -> AsyncIterator[Coordinator]:
        """Yields the states until :meth:`end`; raises the error that was given there."""
        while True:
            while self._unread:
                yield self._unread.popleft()
            if self._ended:
                if self._error is not None:
                    raise self._error
                return
            self._news.clear()
            await self._news.wait()
