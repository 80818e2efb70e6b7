"""What the numbers of errors mean that Psyche's programs and Anchor answer with.

PsycheFoundation/psyche, ``program_error.rs`` of each program; Anchor 0.30.1, ``ErrorCode``. The numbers of the
coordinator have shifted once, so that an older deployment counts one further from number 3 on: names come from the
program's logs where there are any, and from the number otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from ...errors import CoordinatorErrorCode

__all__ = [
    "ANCHOR_ERRORS",
    "AUTHORIZER_ERRORS",
    "COORDINATOR_ERRORS",
    "FIRST_CUSTOM",
    "TREASURER_ERRORS",
    "TREASURER_ERRORS_V2",
    "advice",
    "coordinator_error_number",
    "error_name",
    "name_in_logs",
    "refusal_name",
]

FIRST_CUSTOM: Final = 6000
"""Where Anchor lets the errors of a program itself begin."""

COORDINATOR_ERRORS: Final = (
    "UpdateConfigFinished",
    "UpdateConfigNotHalted",
    "CoordinatorAccountIncorrectSize",
    "ClientsFull",
    "ConfigSanityCheckFailed",
    "ModelSanityCheckFailed",
    "ProgressSanityCheckFailed",
    "SignerNotAClient",
    "SignerMismatch",
    "CloseCoordinatorNotHalted",
    "CoordinatorErrorNoActiveRound",
    "CoordinatorErrorInvalidWitness",
    "CoordinatorErrorInvalidRunState",
    "CoordinatorErrorDuplicateWitness",
    "CoordinatorErrorInvalidHealthCheck",
    "CoordinatorErrorHalted",
    "CoordinatorErrorInvalidCheckpoint",
    "CoordinatorErrorWitnessesFull",
    "CoordinatorErrorCannotResume",
    "CoordinatorErrorInvalidWithdraw",
    "CoordinatorErrorInvalidCommitteeSelection",
    "CoordinatorErrorInvalidCommitteeProof",
    "MoreClientsThanBatches",
    "RunIdInvalidLength",
)

AUTHORIZER_ERRORS: Final = ("AuthorizationActiveIsTrue", "AuthorizationClosingConditionsNotReachedYet")

TREASURER_ERRORS: Final = ("InvalidParameter", "RunIdInvalidLength")

TREASURER_ERRORS_V2: Final = (
    "RunIdInvalidLength",
    "ParticipantClientNotFound",
    "ClaimerSignerMismatch",
    "ClaimedPointsExceedEarnedPoints",
)
"""Where accounts of runs have version 2."""

ANCHOR_ERRORS: Final = {
    101: "InstructionFallbackNotFound",
    102: "InstructionDidNotDeserialize",
    2000: "ConstraintMut",
    2003: "ConstraintRaw",
    2004: "ConstraintOwner",
    2006: "ConstraintSeeds",
    2009: "ConstraintAssociated",
    2015: "ConstraintTokenOwner",
    3000: "AccountDiscriminatorAlreadySet",
    3001: "AccountDiscriminatorNotFound",
    3002: "AccountDiscriminatorMismatch",
    3003: "AccountDidNotDeserialize",
    3005: "AccountNotEnoughKeys",
    3007: "AccountOwnedByWrongProgram",
    3008: "InvalidProgramId",
    3010: "AccountNotSigner",
    3011: "AccountNotSystemOwned",
    3012: "AccountNotInitialized",
    4100: "DeclaredProgramIdMismatch",
}

_ADVICE: Final = {
    "UpdateConfigFinished": "the run is finished and cannot be changed any more",
    "UpdateConfigNotHalted": "pause the run first; it cannot be changed while it trains",
    "CoordinatorAccountIncorrectSize": "the program keeps runs in accounts of another size: it is of another version",
    "ClientsFull": "the run has had 256 wallets, and no other can ever join: use one that has joined before",
    "ConfigSanityCheckFailed": "the run's settings contradict each other, or its cold start is longer than an epoch",
    "ModelSanityCheckFailed": "the model or the progress of the run is incomplete",
    "ProgressSanityCheckFailed": "the run's step must be at least 1",
    "SignerNotAClient": "this wallet has not joined the run, or is not in its present epoch",
    "SignerMismatch": "the wallet that signs is not the client that is to join",
    "CloseCoordinatorNotHalted": "pause the run before it is closed",
    "CoordinatorErrorNoActiveRound": "the run has no round yet",
    "CoordinatorErrorInvalidWitness": "the round was over, or this client is not elected in it",
    "CoordinatorErrorInvalidRunState": "the run was in another phase already",
    "CoordinatorErrorDuplicateWitness": "the report had arrived before",
    "CoordinatorErrorInvalidHealthCheck": "the client works, or the epoch is too young to tell",
    "CoordinatorErrorHalted": "the run is paused or finished",
    "CoordinatorErrorWitnessesFull": "the round has as many reports as it can hold",
    "CoordinatorErrorCannotResume": "the run is not paused",
    "CoordinatorErrorInvalidCommitteeSelection": "the run has more witnesses than clients",
    "CoordinatorErrorInvalidCommitteeProof": "the list of clients has changed meanwhile",
    "MoreClientsThanBatches": "as many wallets have joined as a batch has sequences: ask for larger batches",
    "RunIdInvalidLength": "the name of a run has at most 32 bytes",
    "AuthorizationActiveIsTrue": "deactivate the authorization before it is closed",
    "AuthorizationClosingConditionsNotReachedYet": "an authorization with delegates can be closed 30 days after its "
    "grantor last changed it; without delegates at once",
    "InvalidParameter": "more points are claimed than are there",
    "ClaimedPointsExceedEarnedPoints": "more points are claimed than are there",
    "ParticipantClientNotFound": "the wallet whose points are claimed has never joined the run",
    "ClaimerSignerMismatch": "the points are paid to another wallet, which was named when theirs first joined the run",
    "InstructionDidNotDeserialize": "the program is of another version",
    "InstructionFallbackNotFound": "the program is of another version",
    "ConstraintRaw": "this wallet has not the right to do that: a join needs an authorization that is active and for "
    "this wallet, a change of a run its operator's key",
    "ConstraintAssociated": "the token account is not the owner's associated one",
    "AccountNotInitialized": "an account that is needed does not exist; for a join that is the authorization: ask the "
    "run's operator to authorize this wallet",
    "AccountOwnedByWrongProgram": "an account belongs to another program: are these the programs of this cluster?",
    "AccountDiscriminatorMismatch": "an account is of another kind: are these the programs of this cluster?",
    "DeclaredProgramIdMismatch": "the program was deployed under another id than it was built for",
}

_NAME_IN_LOGS: Final = re.compile(r"Error Code: (\w+)\. Error Number: \d+\.")


def coordinator_error_number(name: str) -> int:
    """The number of an error of the coordinator."""
    return FIRST_CUSTOM + COORDINATOR_ERRORS.index(name)


def error_name(number: int, errors: tuple[str, ...] = COORDINATOR_ERRORS) -> str | None:
    """The name of an error by its number; None if it is not known.

    Args:
        number: as the program gave it.
        errors: the table of the program.
    """
    if FIRST_CUSTOM <= number < FIRST_CUSTOM + len(errors):
        return errors[number - FIRST_CUSTOM]
    return ANCHOR_ERRORS.get(number)


def name_in_logs(logs: Iterable[str]) -> str | None:
    """The name of the error that the logs of a transaction tell of, which holds whatever the program's version."""
    found = None
    for line in logs:
        match = _NAME_IN_LOGS.search(line)
        if match:
            found = match.group(1)
    return found


def advice(name: str) -> str:
    """One sentence on what an error means, without a full stop."""
    return _ADVICE.get(name, f"the program answered {name}")


def refusal_name(code: CoordinatorErrorCode) -> str:
    """The program's name for a refusal of the coordinator's rules."""
    return f"CoordinatorError{code.value}"
