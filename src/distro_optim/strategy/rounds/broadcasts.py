"""What clients tell each other by gossip. Declarations only.

:class:`Broadcast` is Psyche's (PsycheFoundation/psyche, ``shared/client/src/protocol.rs``) and travels inside a signed
message. :class:`WeightsReport` is not part of Psyche's protocol and travels where Psyche's clients do not listen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final

from ...comm.postcard import U16, U32, Bytes32, Limit, Via
from ...comm.tickets import BlobTicket
from ...coordinator.types import BatchId, CommitteeProof, MerkleRoot
from ...verify.commitment import COMMITMENT_SIZE, Commitment

__all__ = ["MARK_SIZE", "MAX_MARKS", "Broadcast", "BroadcastType", "Finished", "TrainingResult", "WeightsReport"]

CommitmentBytes = Annotated[
    Commitment, Via(Annotated[bytes, Limit(COMMITMENT_SIZE)], Commitment.to_bytes, Commitment.from_bytes)
]


@dataclass(frozen=True)
class TrainingResult:
    """The sender has trained ``batch_id``; the ticket leads to the result."""

    batch_id: BatchId
    ticket: BlobTicket


@dataclass(frozen=True)
class Finished:
    """The sender has nothing more to do in this round, and has everything of the one before.

    Attributes:
        broadcast_merkle: root over the hashes of the messages of the round before, in order of arrival.
        warmup: the message is of warm-up, and says that the model is loaded.
    """

    broadcast_merkle: MerkleRoot
    warmup: bool


BroadcastType = TrainingResult | Finished


@dataclass(frozen=True)
class Broadcast:
    """One message about one round.

    Attributes:
        step: of the coordinator; 0 in warm-up.
        proof: the sender's claim to its role in the round.
        commitment: the hash of what is announced, with a signature of its own.
        nonce: counts repetitions, so that gossip takes each for a new message.
    """

    step: U32
    proof: CommitteeProof
    commitment: CommitmentBytes
    nonce: U32
    data: BroadcastType


MAX_MARKS: Final = 512
"""Groups of tensors that a report can tell apart."""

MARK_SIZE: Final = 6
"""Bytes of a mark. With 512 of them a report fits in one announcement. Different groups have equal marks once in
2**48."""


@dataclass(frozen=True)
class WeightsReport:
    """Which weights the sender has at the start of a step, before it trains.

    Attributes:
        epoch, step: of the coordinator.
        root: Merkle root over the hashes of all tensors.
        marks: the first bytes of the hash of each tensor, or of each group of neighbours in a model of more than
            :data:`MAX_MARKS` tensors: where roots differ, they say where.
        nonce: counts repetitions.
    """

    epoch: U16
    step: U32
    root: Bytes32
    marks: Annotated[bytes, Limit(MAX_MARKS * MARK_SIZE)]
    nonce: U32
