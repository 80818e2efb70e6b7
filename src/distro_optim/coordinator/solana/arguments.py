"""The instructions of Psyche's programs: their names and what each of them takes, declared once.

PsycheFoundation/psyche, ``architectures/decentralized``. The data of an instruction are 8 bytes that name it and then
its arguments in borsh. A builder encodes them and a program decodes them from the same declaration. Three instructions
take more, under the same name, where accounts of runs have version 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeVar

from ...comm.postcard import U64, Bytes32
from ...errors import ProtocolError
from ..formats import borsh
from ..formats.account import RunMetadata
from ..model import Checkpoint, Model
from ..types import (
    Committee,
    CoordinatorConfig,
    CoordinatorProgress,
    MerkleRoot,
    NodeIdentity,
    Witness,
    WitnessBloom,
    WitnessMetadata,
    WitnessProof,
)
from .programs import FIRST_WITH_CLAIMERS, instruction_discriminator

__all__ = [
    "AUTHORIZER_INSTRUCTIONS",
    "COORDINATOR_INSTRUCTIONS",
    "TREASURER_INSTRUCTIONS",
    "Arguments",
    "AuthorizationClose",
    "AuthorizationCreate",
    "AuthorizationGranteeUpdate",
    "AuthorizationGrantorUpdate",
    "CheckpointUploaded",
    "FreeCoordinator",
    "HealthCheck",
    "InitCoordinator",
    "JoinRun",
    "JoinRunV2",
    "ParticipantClaim",
    "ParticipantClaimV2",
    "ParticipantCreate",
    "ParticipantCreateV2",
    "RunCreate",
    "RunUpdate",
    "SetFutureEpochRates",
    "SetPaused",
    "Tick",
    "Update",
    "UpdateClientVersion",
    "WarmupWitness",
    "WitnessRound",
    "coordinator_instructions",
    "decode_arguments",
    "discriminator_of",
    "encode_arguments",
    "treasurer_instructions",
]

T = TypeVar("T")


# -- the coordinator ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InitCoordinator:
    """Makes a run of an account of zeros."""

    main_authority: Bytes32
    join_authority: Bytes32
    run_id: str
    client_version: str


@dataclass(frozen=True)
class FreeCoordinator:
    """Closes a halted run; its lamports come back."""


@dataclass(frozen=True)
class Update:
    """Changes what is given of a halted run; the metadata of any run that is not finished."""

    metadata: RunMetadata | None
    config: CoordinatorConfig | None
    model: Model | None
    progress: CoordinatorProgress | None


@dataclass(frozen=True)
class UpdateClientVersion:
    """Says which client the run is for."""

    new_version: str


@dataclass(frozen=True)
class SetFutureEpochRates:
    """Points from the next epoch on."""

    earning_rate_total_shared: U64 | None
    slashing_rate_per_client: U64 | None


@dataclass(frozen=True)
class SetPaused:
    """Stops a run, or lets it go on."""

    paused: bool


@dataclass(frozen=True)
class JoinRun:
    """Wants to be in the next epoch."""

    client_id: NodeIdentity


@dataclass(frozen=True)
class JoinRunV2:
    """The same in version 2. Who has joined before keeps the claimer named then."""

    client_id: NodeIdentity
    claimer: Bytes32


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True)
class WarmupWitness:
    """The sender is ready for training."""

    proof: WitnessProof
    participant_bloom: WitnessBloom
    broadcast_bloom: WitnessBloom
    broadcast_merkle: MerkleRoot

    @classmethod
    def of(cls, report: Witness) -> WarmupWitness:
        """What travels of a report."""
        return cls(report.proof, report.participant_bloom, report.broadcast_bloom, report.broadcast_merkle)

    @property
    def report(self) -> Witness:
        """The report that it is."""
        return Witness(self.proof, self.participant_bloom, self.broadcast_bloom, self.broadcast_merkle)


@dataclass(frozen=True)
class WitnessRound:
    """The report on a round, and what people may want to know about it."""

    proof: WitnessProof
    participant_bloom: WitnessBloom
    broadcast_bloom: WitnessBloom
    broadcast_merkle: MerkleRoot
    metadata: WitnessMetadata

    @classmethod
    def of(cls, report: Witness, metadata: WitnessMetadata) -> WitnessRound:
        """What travels of a report."""
        return cls(report.proof, report.participant_bloom, report.broadcast_bloom, report.broadcast_merkle, metadata)

    @property
    def report(self) -> Witness:
        """The report that it is."""
        return Witness(self.proof, self.participant_bloom, self.broadcast_bloom, self.broadcast_merkle)


@dataclass(frozen=True)
class HealthCheck:
    """One client did no work."""

    id: NodeIdentity
    committee: Committee
    position: U64
    index: U64


@dataclass(frozen=True)
class CheckpointUploaded:
    """The sender has uploaded the model."""

    repo: Checkpoint


# -- the authorizer ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AuthorizationCreate:
    """Makes an authorization that is not active yet."""

    grantee: Bytes32
    scope: bytes


@dataclass(frozen=True)
class AuthorizationGrantorUpdate:
    """Turns it on or off."""

    active: bool


@dataclass(frozen=True)
class AuthorizationGranteeUpdate:
    """Lets other keys in: first forgets those that were, if asked to, then adds."""

    delegates_clear: bool
    delegates_added: tuple[Bytes32, ...]


@dataclass(frozen=True)
class AuthorizationClose:
    """Removes it; its lamports come back."""


# -- the treasurer -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunCreate:
    """Makes a run whose points are paid."""

    index: U64
    run_id: str
    client_version: str
    main_authority: Bytes32
    join_authority: Bytes32


@dataclass(frozen=True)
class RunUpdate:
    """Everything that an operator may change of a run, passed on to the coordinator in this order."""

    metadata: RunMetadata | None = None
    config: CoordinatorConfig | None = None
    model: Model | None = None
    progress: CoordinatorProgress | None = None
    epoch_earning_rate_total_shared: U64 | None = None
    epoch_slashing_rate_per_client: U64 | None = None
    paused: bool | None = None
    client_version: str | None = None


@dataclass(frozen=True)
class ParticipantCreate:
    """Makes the account that remembers what a wallet has been paid."""


@dataclass(frozen=True)
class ParticipantCreateV2:
    """The same in version 2, where the wallet itself need not sign."""

    user: Bytes32


@dataclass(frozen=True)
class ParticipantClaim:
    """Turns points into tokens."""

    claim_earned_points: U64


@dataclass(frozen=True)
class ParticipantClaimV2:
    """The same in version 2, where the claimer signs for the wallet that has earned them."""

    user: Bytes32
    claim_earned_points: U64


COORDINATOR_INSTRUCTIONS: Final[dict[str, type]] = {
    "init_coordinator": InitCoordinator,
    "free_coordinator": FreeCoordinator,
    "update": Update,
    "update_client_version": UpdateClientVersion,
    "set_future_epoch_rates": SetFutureEpochRates,
    "set_paused": SetPaused,
    "join_run": JoinRun,
    "tick": Tick,
    "witness": WitnessRound,
    "warmup_witness": WarmupWitness,
    "health_check": HealthCheck,
    "checkpoint": CheckpointUploaded,
}

AUTHORIZER_INSTRUCTIONS: Final[dict[str, type]] = {
    "authorization_create": AuthorizationCreate,
    "authorization_grantor_update": AuthorizationGrantorUpdate,
    "authorization_grantee_update": AuthorizationGranteeUpdate,
    "authorization_close": AuthorizationClose,
}

TREASURER_INSTRUCTIONS: Final[dict[str, type]] = {
    "run_create": RunCreate,
    "run_update": RunUpdate,
    "participant_create": ParticipantCreate,
    "participant_claim": ParticipantClaim,
}

_COORDINATOR_V2: Final = {**COORDINATOR_INSTRUCTIONS, "join_run": JoinRunV2}
_TREASURER_V2: Final = {
    **TREASURER_INSTRUCTIONS,
    "participant_create": ParticipantCreateV2,
    "participant_claim": ParticipantClaimV2,
}


def coordinator_instructions(account_version: int) -> dict[str, type]:
    """The instructions of the coordinator, where the accounts of runs have this version."""
    return COORDINATOR_INSTRUCTIONS if account_version < FIRST_WITH_CLAIMERS else _COORDINATOR_V2


def treasurer_instructions(account_version: int) -> dict[str, type]:
    """Likewise of the treasurer."""
    return TREASURER_INSTRUCTIONS if account_version < FIRST_WITH_CLAIMERS else _TREASURER_V2


Arguments = object
"""An instance of one of the classes above."""

_TABLES: Final = (
    COORDINATOR_INSTRUCTIONS,
    AUTHORIZER_INSTRUCTIONS,
    TREASURER_INSTRUCTIONS,
    _COORDINATOR_V2,
    _TREASURER_V2,
)
_NAMES: Final[dict[type, str]] = {declared: name for table in _TABLES for name, declared in table.items()}
_DISCRIMINATORS: Final[dict[type, bytes]] = {kind: instruction_discriminator(name) for kind, name in _NAMES.items()}
_BY_TABLE: Final[dict[int, dict[bytes, str]]] = {
    id(table): {instruction_discriminator(name): name for name in table} for table in _TABLES
}


def encode_arguments(arguments: Arguments) -> bytes:
    """The data of an instruction.

    Raises:
        ConfigurationError: an argument does not fit its declaration.
    """
    return _DISCRIMINATORS[type(arguments)] + borsh.encode(arguments)


def discriminator_of(kind: type) -> bytes:
    """The 8 bytes that name an instruction."""
    return _DISCRIMINATORS[kind]


def decode_arguments(table: dict[str, type], data: bytes) -> tuple[str, Arguments | None]:
    """The name of an instruction of a program and its arguments, None if those cannot be decoded.

    Args:
        table: the program's instructions, one of the tables above, or what the functions beside them return.
        data: the data of the instruction. What follows the arguments is ignored, as by the programs.

    Raises:
        ProtocolError: the program has no such instruction.
    """
    name = _BY_TABLE[id(table)].get(data[:8])
    if name is None:
        raise ProtocolError("the program has no such instruction", offset=0)
    try:
        return name, borsh.decode(table[name], data[8:], allow_trailing=True)
    except ProtocolError:
        return name, None
