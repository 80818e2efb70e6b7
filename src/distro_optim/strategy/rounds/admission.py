"""Is a broadcast taken? The checks of a message about a round, from cheap to dear.

Rules: PsycheFoundation/psyche, ``shared/client/src/client.rs`` and ``state/steps.rs``.
"""

from __future__ import annotations

from ...comm.signing import is_signed_by
from ...comm.tickets import BlobFormat
from ...coordinator.types import Committee, NodeIdentity
from ...errors import CoordinatorError
from ...verify.commitment import finished_hash
from .actions import DropReason
from .broadcasts import Broadcast, Finished, TrainingResult
from .round_state import MAX_CLAIMS, MAX_SPARE_CLAIMS, Claim, RoundState

__all__ = ["NotAdmitted", "check_broadcast", "check_commitment"]


class NotAdmitted(Exception):
    """A message is not taken. An answer rather than an error: it never leaves this package.

    Attributes:
        reason: why.
    """

    def __init__(self, reason: DropReason, detail: str = "") -> None:
        super().__init__(detail or reason.value)
        self.reason = reason
        self.detail = detail


def check_commitment(broadcast: Broadcast, sender: NodeIdentity) -> None:
    """Raises NotAdmitted unless the commitment is the sender's, and a "finished" commits to its own root."""
    commitment, data = broadcast.commitment, broadcast.data
    if isinstance(data, Finished) and commitment.data_hash != finished_hash(data.broadcast_merkle.inner):
        raise NotAdmitted(DropReason.WRONG_HASH, "the commitment is not to the root")
    if not is_signed_by(sender.p2p_identity, commitment.data_hash, commitment.signature):
        raise NotAdmitted(DropReason.BAD_SIGNATURE)


def check_broadcast(broadcast: Broadcast, sender: NodeIdentity, round_: RoundState) -> None:
    """Raises NotAdmitted unless ``sender`` may say this about ``round_``, to which the step belongs."""
    proof = broadcast.proof
    if proof.index >= len(round_.clients) or round_.clients[proof.index] != sender:
        raise NotAdmitted(DropReason.WRONG_PROOF, f"it is not at index {proof.index} of the round")
    try:
        true_proof = round_.selection.get_committee(proof.index)
    except CoordinatorError as error:
        raise NotAdmitted(DropReason.WRONG_PROOF, str(error)) from error
    if proof != true_proof or proof.committee is not Committee.TRAINER:
        raise NotAdmitted(DropReason.WRONG_PROOF, f"it is {true_proof.committee.name} at {true_proof.position}")
    match broadcast.data:
        case TrainingResult(batch, ticket):
            _check_result(Claim(sender, batch, broadcast.commitment, ticket), round_)
        case Finished(warmup=True):
            raise NotAdmitted(DropReason.WRONG_STEP, "the warm-up is over")
        case Finished():
            if sender in round_.finished:
                raise NotAdmitted(DropReason.DUPLICATE)
    check_commitment(broadcast, sender)


def _check_result(claim: Claim, round_: RoundState) -> None:
    batch, ticket = claim.batch, claim.ticket
    if round_.assignments.get(batch) != claim.sender:
        raise NotAdmitted(DropReason.NOT_ASSIGNED, f"{batch} is not its batch")
    if ticket.format is not BlobFormat.RAW:
        raise NotAdmitted(DropReason.NOT_A_BLOB)
    # Psyche takes no blob twice in a round: whoever announces another's blob first, as its own, silences the other.
    if any(other.ticket.hash == ticket.hash for other in round_.claims.get(batch, ())):
        raise NotAdmitted(DropReason.DUPLICATE)
    if not round_.has_room_for(claim):
        raise NotAdmitted(DropReason.TOO_MANY, f"{MAX_CLAIMS + MAX_SPARE_CLAIMS} results for {batch} already")
