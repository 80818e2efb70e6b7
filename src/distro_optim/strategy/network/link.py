"""What a runtime needs to take part in a run, and where it comes from: hosting, joining, or memory in a test."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ...comm.model_exchange import ModelExchange
from ...comm.signing import SecretKey
from ...comm.swarm import Swarm
from ...coordinator.client.interface import CoordinatorClient
from ...coordinator.types import NodeIdentity
from .coordinating import OpenCoordinator
from .driver import FindPeers
from .keeping import RunKeeper

__all__ = ["RunLink", "RunSource"]


@dataclass(frozen=True, kw_only=True)
class RunLink:
    """Open connections to everything in a run.

    Attributes:
        coordinator: our link to it; joined, but for what :attr:`enter` has still to do.
        swarm: the run's peers.
        models: the same peers, for whole models.
        ticket: what others pass as ``run`` to join.
        enter: asks the coordinator to take us in; None if that has been done.
        find_peers: see :data:`~.driver.FindPeers`.
        here: the run's coordinator, while it is in this process.
        fees: lamports that taking part has cost so far, where it costs something.
        farewell: awaited once the run is over, before :attr:`aclose`: a host waits until everybody has heard of it.
        aclose: leaves the run and closes everything.
        keeper: keeps the run hosted when its host is gone; None if nobody does, as in a run of Psyche's.
    """

    coordinator: CoordinatorClient
    swarm: Swarm
    models: ModelExchange
    ticket: str | None
    aclose: Callable[[], Awaitable[None]]
    enter: Callable[[], Awaitable[None]] | None = None
    find_peers: FindPeers | None = None
    here: Callable[[], OpenCoordinator | None] = lambda: None
    fees: Callable[[], int | None] = lambda: None
    farewell: Callable[[], Awaitable[None]] | None = None
    keeper: RunKeeper | None = None


class RunSource(ABC):
    """A way into a run, not used yet."""

    key: SecretKey
    run_id: str
    is_host: bool
    watches: bool = False
    """We are in no list of the run, and only look at it."""
    on_note: Callable[[str], None] = staticmethod(lambda text: None)
    """Told what people should know, in a sentence, in the network's thread."""

    @property
    def host(self) -> bytes | None:
        """Public key of the run's host; None if we do not know it."""
        return self.key.public if self.is_host else None

    @property
    def identity(self) -> NodeIdentity:
        """Our identity in the run."""
        return NodeIdentity.from_single_key(self.key.public)

    @abstractmethod
    async def open(self) -> RunLink:
        """Opens everything, on the network's loop, and enters the run unless :attr:`RunLink.enter` is to do that.

        After an error or a cancellation there is nothing to clean up.

        Raises:
            CoordinatorLinkError, ProtocolError, ExchangeError, ConfigurationError: see :meth:`.port.RunPort.start`.
        """
