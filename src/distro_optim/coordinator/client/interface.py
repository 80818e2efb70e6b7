"""What a participant can do with the coordinator of its run, whatever lies between.

A coordinator does not answer. It sends its whole state again and again, and a client looks there to see whether its
message was taken. So the methods that send return as soon as the message is on its way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence

from ..messages import ClientToServerMessage, HealthCheckMessage, WarmupStep, WitnessMessage, WitnessStep
from ..types import CommitteeProof, Coordinator, NodeIdentity, Witness, WitnessMetadata

__all__ = ["CoordinatorClient"]


class CoordinatorClient(ABC):
    """One participant's link to the coordinator of a run.

    ``join`` comes first and once, ``close`` last; the rest may be called in between from one task or several. Before
    ``join`` may come ``look``, for those who want to see the run before they are in it.
    """

    run_id: str
    identity: NodeIdentity

    @property
    @abstractmethod
    def state(self) -> Coordinator | None:
        """The newest state; None before :meth:`look` and :meth:`join`."""

    @property
    def connected(self) -> bool:
        """Whether there is a link at the moment. Without one, messages wait for the next link."""
        return self.state is not None

    @property
    def gives_up_after(self) -> float | None:
        """Seconds without a link after which :meth:`states` fails; None if it never does."""
        return None

    @abstractmethod
    async def look(self) -> Coordinator:
        """Returns the state of the run without asking to be in it. :attr:`state` is kept up to date from then on.

        Raises:
            JoinRefusedError: the coordinator hosts another run, or refuses our key.
            CoordinatorLinkError, ProtocolError: as :meth:`join`.
        """

    @abstractmethod
    async def join(self) -> Coordinator:
        """Asks to be in every epoch from now on, and returns the state of the run at that time.

        Raises:
            JoinRefusedError: the coordinator hosts another run, or refuses us.
            CoordinatorLinkError: it could not be reached or did not answer in time.
            ProtocolError: what answers is not a coordinator.
        """

    @abstractmethod
    def states(self) -> AsyncIterator[Coordinator]:
        """Every new state, from that of :meth:`join` on; equal states in a row come once. Ends at :meth:`close`.

        A reader that falls far behind misses the oldest ones. There is only one such stream: two readers share it.

        Raises:
            JoinRefusedError, CoordinatorLinkError: the link is gone for good.
        """

    @abstractmethod
    async def send(self, message: ClientToServerMessage) -> None:
        """Sends a message, or keeps it until there is a link again.

        Raises:
            CoordinatorLinkError: not joined, or closed.
        """

    @abstractmethod
    async def close(self) -> None:
        """Leaves the run. May be called twice."""

    async def witness(self, report: Witness, metadata: WitnessMetadata) -> None:
        """Reports on a round, as an elected witness."""
        await self.send(WitnessMessage(WitnessStep(report, metadata)))

    async def warmup_witness(self, report: Witness) -> None:
        """Says that this client and its peers are ready for training."""
        await self.send(WitnessMessage(WarmupStep(report)))

    async def health_check(self, checks: Sequence[tuple[NodeIdentity, CommitteeProof]]) -> None:
        """Names clients that did no work."""
        await self.send(HealthCheckMessage(tuple(checks)))

    async def __aenter__(self) -> CoordinatorClient:
        await self.join()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
