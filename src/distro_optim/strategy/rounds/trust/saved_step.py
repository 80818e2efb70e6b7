"""Where a run goes on that was saved, and who was in it then. No I/O."""

from __future__ import annotations

from dataclasses import dataclass

from ....coordinator.rules.probation import on_probation
from ....coordinator.types import Coordinator, CoordinatorProgress

__all__ = ["SavedStep", "with_standing"]


@dataclass(frozen=True)
class SavedStep:
    """What a checkpoint of a run says of it.

    Attributes:
        run_id: the run.
        epoch, step, data_index: where it goes on.
        standing: public keys of the clients of its epoch that were not on probation.
    """

    run_id: str
    epoch: int
    step: int
    data_index: int
    standing: frozenset[bytes] = frozenset()

    @property
    def progress(self) -> CoordinatorProgress:
        """Where the run goes on."""
        return CoordinatorProgress(epoch=self.epoch, step=self.step, epoch_start_data_index=self.data_index)


def with_standing(state: Coordinator) -> frozenset[bytes]:
    """Public keys of the clients in a state's epoch that are not on probation."""
    newcomers = on_probation(state)
    clients = enumerate(state.epoch_state.clients)
    return frozenset(client.id.p2p_identity for place, client in clients if place not in newcomers)
