"""Makes of a peer's bytes what they say. No I/O.

A seam: a simulation of hundreds of peers in one process has the same bytes read by each of them, and gives all of them
one reader that does it once.
"""

from __future__ import annotations

from ...comm import postcard
from ...comm.signing import is_signed_by
from ...compress import TilePlan
from ...coordinator.rules.consensus import participants_bank, results_bank
from ...coordinator.types import BatchId, Witness
from ...verify.filter_bank import FilterBank
from .broadcasts import Broadcast, WeightsReport
from .results import ReceivedResult, read_result

__all__ = ["Reader"]


class Reader:
    """Reads bytes that strangers have sent. Its answers depend on the arguments alone, and nobody changes them."""

    def broadcast(self, data: bytes) -> Broadcast:
        """A message of the run; raises ProtocolError."""
        message: Broadcast = postcard.decode(Broadcast, data)
        return message

    def weights(self, data: bytes) -> WeightsReport:
        """A report on weights; raises ProtocolError."""
        report: WeightsReport = postcard.decode(WeightsReport, data)
        return report

    def is_signed_by(self, public: bytes, data: bytes, signature: bytes) -> bool:
        """Whether this is a signature over ``data`` by the owner of ``public``."""
        return is_signed_by(public, data, signature)

    def result(
        self, data: bytes, *, step: int, batch: BatchId, data_hash: bytes, plan: TilePlan, finite: bool
    ) -> ReceivedResult:
        """What :func:`~.results.read_result` says of the same arguments; raises ProtocolError as it does."""
        return read_result(data, step=step, batch=batch, data_hash=data_hash, plan=plan, finite=finite)

    def results_filters(self, witnesses: tuple[Witness, ...]) -> FilterBank:
        """What the reports of a round say of results."""
        return results_bank(witnesses)

    def participants_filters(self, witnesses: tuple[Witness, ...]) -> FilterBank:
        """What they say of clients."""
        return participants_bank(witnesses)
