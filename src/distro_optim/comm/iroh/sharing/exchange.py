"""The model over iroh: what a client asks of :class:`~distro_optim.comm.model_exchange.ModelExchange`, carried out."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from typing_extensions import override

from ...live_weights import FetchedTensors, LiveWeights, WantedTensors, fetch_differing
from ...model_exchange import Check, ModelExchange, Patience, SharedModel
from ...swarm import Swarm
from ...tickets import BlobTicket
from .live import LiveSharing
from .transfer import TAG_PREFIX, Fetch, ModelSharing, download_model

__all__ = ["SharedModels"]


class SharedModels(ModelExchange):
    """Over iroh, with the protocol of Psyche's clients; archives lie in the swarm's own blob store.

    Args:
        sharing: asks and answers.
        swarm: publishes and fetches.
        live: asks and answers about the model in training; None leaves that out.
    """

    def __init__(self, sharing: ModelSharing, swarm: Swarm, live: LiveSharing | None = None) -> None:
        self._sharing = sharing
        self._swarm = swarm
        self._live = live

    @override
    def offer(self, model: SharedModel) -> None:
        self._forget_archives()
        self._sharing.offer(model)

    @override
    def withdraw(self) -> None:
        self._sharing.withdraw()
        self._forget_archives()

    @override
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

    @override
    def offer_live(self, live: LiveWeights | None) -> None:
        if self._live is not None:
            self._live.offer(live)

    @override
    async def download_tensors(self, providers: Iterable[bytes], wanted: WantedTensors) -> FetchedTensors:
        if self._live is None:
            return await super().download_tensors(providers, wanted)
        return await fetch_differing(self._live, providers, wanted)

    async def _fetch(self, ticket: BlobTicket, limit: int) -> bytes:
        return await self._swarm.fetch(ticket, max_size=limit)

    def _forget_archives(self) -> None:
        self._swarm.forget(lambda tag: tag.startswith(TAG_PREFIX))
