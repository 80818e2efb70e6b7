"""The messages between a coordinator and its clients, and between a data server and its clients.

PsycheFoundation/psyche, ``architectures/centralized/shared/src/protocol.rs``, ``shared/watcher/src`` and
``shared/data-provider/src/remote``. The envelopes around them are those of :mod:`distro_optim.comm.framing`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Annotated, Final

from ..comm.framing import client_envelope, server_envelope
from ..comm.postcard import I32, Limit, OnlyVariant
from .types import MAX_NUM_CLIENTS, BatchId, Checkpoint, CommitteeProof, Coordinator, NodeIdentity, WitnessMetadata
from .types import Witness as WitnessReport

__all__ = [
    "CLIENT_TO_DATA_SERVER",
    "CLIENT_TO_SERVER",
    "DATA_SERVER_TO_CLIENT",
    "SERVER_TO_CLIENT",
    "CheckpointMessage",
    "CoordinatorMessage",
    "HealthCheckMessage",
    "HealthChecks",
    "Join",
    "OpportunisticData",
    "RejectionReason",
    "RequestRejected",
    "RequestTrainingData",
    "TokenizedData",
    "TrainingData",
    "WarmupStep",
    "WitnessMessage",
    "WitnessStep",
]


MAX_RUN_ID_SENT: Final = 1024
"""Bytes of a run's name in a join. Longer than any name, so that a message with a wrong name is not malformed."""


@dataclass(frozen=True)
class WitnessStep:
    """The report on a round."""

    witness: WitnessReport
    metadata: WitnessMetadata


@dataclass(frozen=True)
class WarmupStep:
    """A client says that it has the model and that its peers are ready."""

    witness: WitnessReport


OpportunisticData = WitnessStep | WarmupStep

# One check for each client is all that can make sense.
HealthChecks = Annotated[tuple[tuple[NodeIdentity, CommitteeProof], ...], Limit(MAX_NUM_CLIENTS)]


@dataclass(frozen=True)
class Join:
    """A client wants to be in every epoch from now on. Never answered: the lists in the states show it."""

    run_id: Annotated[str, Limit(MAX_RUN_ID_SENT)]


@dataclass(frozen=True)
class WitnessMessage:
    """A report of a witness, or that a client is ready."""

    data: OpportunisticData


@dataclass(frozen=True)
class HealthCheckMessage:
    """Clients that did no work, each with its place in the round."""

    checks: HealthChecks


@dataclass(frozen=True)
class CheckpointMessage:
    """Where a client has uploaded the model."""

    checkpoint: Checkpoint


@dataclass(frozen=True)
class CoordinatorMessage:
    """The whole state, on every tick and after every change."""

    state: Coordinator


ClientToServerMessage = Join | WitnessMessage | HealthCheckMessage | CheckpointMessage
ServerToClientMessage = Annotated[CoordinatorMessage, OnlyVariant()]

CLIENT_TO_SERVER: Final = client_envelope(ClientToServerMessage)
SERVER_TO_CLIENT: Final = server_envelope(ServerToClientMessage)


# -- training data -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenizedData:
    """One sequence."""

    input_ids: tuple[I32, ...]
    labels: tuple[I32, ...] | None = None
    position_ids: tuple[I32, ...] | None = None
    sequence_lengths: tuple[I32, ...] | None = None


@dataclass(frozen=True)
class RequestTrainingData:
    """Asks a data server for the sequences of an interval."""

    data_ids: BatchId


class RejectionReason(enum.Enum):
    """Why a data server sends no sequences."""

    NOT_IN_THIS_ROUND = "NotInThisRound"
    WRONG_DATA_ID_FOR_STEP = "WrongDataIdForStep"


@dataclass(frozen=True)
class TrainingData:
    """The sequences of an interval, in order."""

    data_ids: BatchId
    raw_data: tuple[TokenizedData, ...]


@dataclass(frozen=True)
class RequestRejected:
    """The data server sends no sequences for this interval."""

    data_ids: BatchId
    reason: RejectionReason


CLIENT_TO_DATA_SERVER: Final = client_envelope(Annotated[RequestTrainingData, OnlyVariant()])
DATA_SERVER_TO_CLIENT: Final = server_envelope(TrainingData | RequestRejected)
