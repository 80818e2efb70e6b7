"""How a joiner gets the model from its peers: the seam between a client and whatever carries megabytes."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Final

from ..errors import ExchangeError, ProtocolError
from .iroh.sharing import Check, Fetch, ModelSharing, SharedModel, download_model
from .iroh.tickets import BlobTicket
from .swarm import Swarm

__all__ = ["ModelExchange", "SharedModels", "download_patiently"]

# Between two rounds of asking those who had nothing to share; they may be loading themselves.
_FIRST_PAUSE_SECONDS: Final = 0.25
_MAX_PAUSE_SECONDS: Final = 2.0
_TAG_PREFIX: Final = "model-"


class ModelExchange(ABC):
    """Offers a model, and gets one. All methods belong to one event loop."""

    @abstractmethod
    def offer(self, model: SharedModel) -> None:
        """Shares ``model`` from now on, in place of what was shared before. It must not change any more."""

    @abstractmethod
    def withdraw(self) -> None:
        """Shares nothing any more."""

    @abstractmethod
    async def download(
        self,
        providers: Iterable[bytes],
        *,
        max_parameter_bytes: int,
        check: Check | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> SharedModel:
        """Gets the whole model from ``providers``, each asked a few times at most.

        Raises:
            ExchangeError: nobody gave it.
            ProtocolError: what they gave is no model.
        """


async def download_patiently(
    models: ModelExchange,
    providers: Iterable[bytes],
    *,
    seconds: float,
    max_parameter_bytes: int,
    check: Check | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SharedModel:
    """:meth:`ModelExchange.download`, again and again for ``seconds``: peers may have nothing to share *yet*.

    Raises:
        ExchangeError: nobody gave it in that time; the message holds the last reason.
    """
    providers = tuple(providers)
    if not providers:
        raise ExchangeError("there is no peer to ask for the model")
    reason: Exception | None = None
    pause = _FIRST_PAUSE_SECONDS
    try:
        async with asyncio.timeout(seconds):
            while True:
                try:
                    return await models.download(
                        providers, max_parameter_bytes=max_parameter_bytes, check=check, progress=progress
                    )
                except (ExchangeError, ProtocolError) as error:
                    reason = error
                await asyncio.sleep(pause)
                pause = min(2 * pause, _MAX_PAUSE_SECONDS)
    except TimeoutError:
        raise ExchangeError(
            f"none of {len(providers)} peers shared the model within {seconds:.0f} s: {reason or 'no answer'}"
        ) from reason


class SharedModels(ModelExchange):
    """Over iroh, with the protocol of Psyche's clients; archives lie in the swarm's own blob store.

    Args:
        sharing: asks and answers.
        swarm: publishes and fetches.
    """

    def __init__(self, sharing: ModelSharing, swarm: Swarm) -> None:
        self._sharing = sharing
        self._swarm = swarm

    def offer(self, model: SharedModel) -> None:
        self._forget_archives()
        self._sharing.offer(model)

    def withdraw(self) -> None:
        self._sharing.withdraw()
        self._forget_archives()

    async def download(
        self,
        providers: Iterable[bytes],
        *,
        max_parameter_bytes: int,
        check: Check | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> SharedModel:
        fetch: Fetch = self._fetch
        latencies = {peer.id: peer.rtt for peer in self._swarm.peers() if peer.rtt is not None}
        return await download_model(
            self._sharing,
            providers,
            fetch,
            max_parameter_bytes=max_parameter_bytes,
            latencies=latencies,
            check=check,
            progress=progress,
        )

    async def _fetch(self, ticket: BlobTicket, limit: int) -> bytes:
        return await self._swarm.fetch(ticket, max_size=limit)

    def _forget_archives(self) -> None:
        self._swarm.forget(lambda tag: tag.startswith(_TAG_PREFIX))
