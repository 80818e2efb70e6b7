"""How a joiner gets the model from its peers: the seam between a client and whatever carries megabytes."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Final

from ..errors import ExchangeError, ProtocolError
from .iroh.sharing.search import Patience
from .iroh.sharing.transfer import Check, Fetch, ModelSharing, SharedModel, download_model
from .swarm import Swarm
from .tickets import BlobTicket

__all__ = ["ModelExchange", "Patience", "SharedModels", "download_patiently"]

# Between two attempts, of which the first came to nothing in the middle of the model.
_PAUSE_SECONDS: Final = 0.25
# So that a search which ends in time can say why.
_SLACK_SECONDS: Final = 0.5
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
        patience: Patience = Patience.ONCE,
        seconds: float = 0.0,
    ) -> SharedModel:
        """Gets the whole model from ``providers``, best first.

        Args:
            providers: public keys.
            max_parameter_bytes: a larger parameter is refused.
            check: see :func:`~.iroh.sharing.download_model`.
            progress: called with parameters done and in all.
            patience: with providers that have nothing to share yet.
            seconds: of patience.

        Raises:
            ExchangeError: nobody gave it.
            ProtocolError: what they gave is no model.
        """


async def download_patiently(
    models: ModelExchange,
    providers: Iterable[bytes],
    *,
    patience: Patience = Patience.LONG,
    seconds: float,
    max_parameter_bytes: int,
    check: Check | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SharedModel:
    """:meth:`ModelExchange.download`, in at most ``seconds``; with long patience again if it came to nothing.

    Raises:
        ExchangeError: nobody gave it in that time; the message holds the last reason.
    """
    providers = tuple(providers)
    if not providers:
        raise ExchangeError("there is no peer to ask for the model")
    reason: Exception | None = None
    began = time.monotonic()
    try:
        async with asyncio.timeout(seconds + _SLACK_SECONDS):
            while (left := began + seconds - time.monotonic()) > 0:
                try:
                    return await models.download(
                        providers,
                        max_parameter_bytes=max_parameter_bytes,
                        check=check,
                        progress=progress,
                        patience=patience,
                        seconds=left,
                    )
                except (ExchangeError, ProtocolError) as error:
                    reason = error
                if patience is not Patience.LONG:
                    break
                await asyncio.sleep(_PAUSE_SECONDS)
    except TimeoutError as error:
        reason = reason or error
    took = time.monotonic() - began
    raise ExchangeError(
        f"none of {len(providers)} peers shared the model in {took:.0f} s: {reason or 'no answer'}"
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
        patience: Patience = Patience.ONCE,
        seconds: float = 0.0,
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
            patience=patience,
            seconds=seconds,
        )

    async def _fetch(self, ticket: BlobTicket, limit: int) -> bytes:
        return await self._swarm.fetch(ticket, max_size=limit)

    def _forget_archives(self) -> None:
        self._swarm.forget(lambda tag: tag.startswith(_TAG_PREFIX))
