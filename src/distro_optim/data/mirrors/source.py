"""One of several places of the same data: opened beside the reading, and dropped when it is stuck."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Protocol

from ...errors import DataUnavailableError
from ..provider import TokenProvider

__all__ = ["Closable", "Opener", "Source"]


class Closable(Protocol):
    """Which ends what is under way when it is closed."""

    def close(self) -> None:
        """Ends it."""


Opener = Callable[[Callable[[Closable], None]], TokenProvider]
"""Opens a place. What has to be closed to end that early is given to the argument."""


class Source:
    """A place.

    Args:
        name: as people know it.
        opener: opens it, in another thread.
    """

    def __init__(self, name: str, opener: Opener) -> None:
        self.name = name
        self.provider: TokenProvider | None = None
        self.opening: Future[TokenProvider] | None = None
        self._opener = opener
        self._turn = 0
        self._closables: list[Closable] = []

    def begin_opening(self, threads: Executor) -> Future[TokenProvider]:
        """Opens it in one of ``threads``, unless that is under way."""
        if self.opening is None:
            self.opening = threads.submit(self._open, self._turn)
        return self.opening

    def drop(self, threads: Executor) -> None:
        """Ends all that is under way there, in one of ``threads``, so that nobody waits for it."""
        self._turn += 1
        provider, self.provider, self.opening = self.provider, None, None
        closables, self._closables = self._closables, []
        for one in (*closables, *([] if provider is None else [provider])):
            threads.submit(one.close)

    def close(self) -> None:
        """Ends all that is under way there, and gives nothing afterwards."""
        self._turn += 1
        for one in list(self._closables):
            one.close()
        if self.provider is not None:
            self.provider.close()

    def _open(self, turn: int) -> TokenProvider:
        closables: list[Closable] = []
        self._closables = closables
        provider = self._opener(closables.append)
        self.provider = provider
        # It was dropped or closed meanwhile: whoever did that may not have seen the provider yet.
        if turn != self._turn:
            if self.provider is provider:
                self.provider = None
            provider.close()
            raise DataUnavailableError("it was opened too late")
        return provider
