"""What the witnesses of a round agree on: which clients took part, and which result of a batch counts.

Rules: PsycheFoundation/psyche, ``shared/coordinator/src/coordinator.rs``. A witness sends its report in the round after
the one that it is about, because clients exchange results while the next round computes. So at height h the report
stored in round h-1 says who trained in round h-2, and nothing can be said before height 2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ...errors import CoordinatorError, CoordinatorErrorCode
from ...verify.commitment import Commitment
from ...verify.filter_bank import FilterBank
from ..types import Committee, CommitteeProof, Coordinator, NodeIdentity, Round, Witness
from .committee import CommitteeSelection

__all__ = [
    "check_worker",
    "is_healthy",
    "participant_item",
    "participants_bank",
    "results_bank",
    "select_commitment",
    "select_seen",
    "trainer_score",
    "trainer_scores",
    "witness_quorum",
]

WITNESS_QUORUM_RATIO: Final = 2.0 / 3.0
_SMALL_QUORUMS: Final = {1: 1, 2: 2, 3: 2}
"""Below four witnesses two thirds would be one; a single witness must not decide."""


def witness_quorum(witness_nodes: int, num_witnesses: int) -> int:
    """Reports that must agree.

    Args:
        witness_nodes: the run's setting. At 0 everybody may witness, and the quorum is one of the reports that arrived.
        num_witnesses: reports that arrived.

    Raises:
        CoordinatorError: NO_ACTIVE_ROUND, there are no witnesses and so no quorum (Psyche panics).
    """
    count = witness_nodes or num_witnesses
    if count == 0:
        raise CoordinatorError(CoordinatorErrorCode.NO_ACTIVE_ROUND, "a round without witnesses has no quorum")
    return _SMALL_QUORUMS.get(count) or max(1, int(count * WITNESS_QUORUM_RATIO))


def trainer_scores(clients: Iterable[NodeIdentity], witnesses: Sequence[Witness]) -> list[int]:
    """How many of the reports say that each of ``clients`` took part; one pass for all of them."""
    return participants_bank(witnesses).count([participant_item(client) for client in clients])


def trainer_score(client: NodeIdentity, witnesses: Sequence[Witness]) -> int:
    """How many of the reports say that ``client`` took part."""
    return trainer_scores([client], witnesses)[0]


def participant_item(client: NodeIdentity) -> bytes:
    """What a report's filter of participants holds of a client, 32 bytes."""
    return hashlib.sha256(client.signer).digest()


def is_healthy(state: Coordinator, client: NodeIdentity, proof: CommitteeProof) -> bool:
    """Whether a quorum of the previous round's witnesses saw ``client`` do its work.

    Raises:
        CoordinatorError: NO_ACTIVE_ROUND, there was no previous round, or it has no witnesses; INVALID_COMMITTEE_PROOF,
            see :func:`check_worker`.
    """
    round_ = check_worker(state, client, proof)
    quorum = witness_quorum(state.config.witness_nodes, len(round_.witnesses))
    return trainer_score(client, round_.witnesses) >= quorum


def check_worker(state: Coordinator, client: NodeIdentity, proof: CommitteeProof) -> Round:
    """The previous round, in which ``client`` had work if its proof is true.

    Raises:
        CoordinatorError: NO_ACTIVE_ROUND, there was no previous round; INVALID_COMMITTEE_PROOF, the proof is not that
            of ``client`` in that round, or is of a committee without defined work (Psyche panics).
    """
    round_ = state.previous_round
    if round_ is None:
        raise CoordinatorError(CoordinatorErrorCode.NO_ACTIVE_ROUND, "there is no previous round", state.run_state)
    if proof.index >= round_.clients_len:
        raise CoordinatorError(
            CoordinatorErrorCode.INVALID_COMMITTEE_PROOF,
            f"index {proof.index} of {round_.clients_len} clients",
            state.run_state,
        )
    selection = CommitteeSelection.for_round(state, round_)
    # The list may have lost clients since, and then an index may mean another client: the identity must match too.
    if not selection.verify_committee(client, proof, state.epoch_state.clients):
        raise CoordinatorError(
            CoordinatorErrorCode.INVALID_COMMITTEE_PROOF,
            f"client {client} is not {proof.committee.name} at index {proof.index}, position {proof.position}",
            state.run_state,
        )
    if proof.committee is not Committee.TRAINER:
        raise CoordinatorError(
            CoordinatorErrorCode.INVALID_COMMITTEE_PROOF, f"{proof.committee.name} has no defined work", state.run_state
        )
    return round_


def select_commitment(commitments: Sequence[Commitment], witnesses: Sequence[Witness], quorum: int) -> int | None:
    """Index of the commitment that counts for a batch, or None without agreement.

    Each witness votes for the first commitment, in the given order, whose hash is in its broadcast filter. Among
    those that reach the quorum the most votes win, and of equals the last.
    """
    return select_seen(results_bank(witnesses).ask([commitment.data_hash for commitment in commitments]), quorum)


def results_bank(witnesses: Iterable[Witness]) -> FilterBank:
    """The filters in which the reports say which results came."""
    return FilterBank((w.broadcast_bloom.keys, w.broadcast_bloom.words) for w in witnesses)


def participants_bank(witnesses: Iterable[Witness]) -> FilterBank:
    """The filters in which the reports say which clients took part; they hold :func:`participant_item`."""
    return FilterBank((w.participant_bloom.keys, w.participant_bloom.words) for w in witnesses)


def select_seen(seen: NDArray[np.bool_], quorum: int) -> int | None:
    """As :func:`select_commitment`, of ``(witnesses, commitments) bool``: which of them each report has seen."""
    if seen.shape[1] == 0:
        return None
    first = seen.argmax(axis=1)[seen.any(axis=1)]
    best = None
    votes = np.bincount(first, minlength=seen.shape[1]).tolist()
    for index, count in enumerate(votes):
        if count >= quorum and (best is None or count >= votes[best]):
            best = index
    return best
