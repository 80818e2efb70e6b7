"""What a runtime needs to be in a run, and where it gets it: by hosting, by joining, or from memory in a test."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from ...comm.model_exchange import ModelExchange
from ...comm.signing import SecretKey
from ...comm.swarm import Swarm
from ...coordinator.client import CoordinatorClient
from ...coordinator.types import NodeIdentity, WitnessMetadata
from .driver import FindPeers

__all__ = ["RunLink", "RunSource"]


@dataclass(frozen=True, kw_only=True)
class RunLink:
    """All the ways to a run, open.

    Attributes:
        coordinator: joined.
        swarm: of the run's peers.
        models: the same peers, for megabytes.
        ticket: what others pass as ``run`` to join.
        find_peers: see :data:`~.driver.FindPeers`.
        reports: what clients last reported, where the coordinator is in this process.
        waiting: how many wait for the next epoch, likewise.
        farewell: awaited once the run is over, before :attr:`aclose`: a host lets everybody hear of it.
        aclose: ends everything, politely.
    """

    coordinator: CoordinatorClient
    swarm: Swarm
    models: ModelExchange
    ticket: str | None
    aclose: Callable[[], Awaitable[None]]
    find_peers: FindPeers | None = None
    reports: Callable[[], Mapping[NodeIdentity, WitnessMetadata]] = dict
    waiting: Callable[[], int | None] = lambda: None
    farewell: Callable[[], Awaitable[None]] | None = None


class RunSource(ABC):
    """A way into a run that nobody has gone yet."""

    key: SecretKey
    run_id: str
    is_host: bool

    @property
    def identity(self) -> NodeIdentity:
        """Who we are to the coordinator."""
        return NodeIdentity.from_single_key(self.key.public)

    @abstractmethod
    async def open(self) -> RunLink:
        """Goes in, on the network's loop. Whoever cancels it, or gets an error, has nothing to clean up.

        Raises:
            CoordinatorLinkError, ProtocolError, ExchangeError, ConfigurationError: see :meth:`.port.RunPort.start`.
        """
