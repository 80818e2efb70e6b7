"""What the witnesses of a round agree on: which clients took part, and which result of a batch counts.

Rules: PsycheFoundation/psyche, ``shared/coordinator/src/coordinator.rs``. A witness sends its report in the round after
the one that it is about, because clients exchange results while the next round computes. So at height h the report
stored in round h-1 says who trained in round h-2, and nothing can be said before height 2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

from ...errors import CoordinatorError, CoordinatorErrorCode
from ...verify.bloom import BloomFilter, count_containing
from ...verify.commitment import Commitment
from ..types import Committee, CommitteeProof, Coordinator, NodeIdentity, Witness
from .committee import CommitteeSelection

__all__ = ["is_healthy", "select_commitment", "trainer_score", "witness_quorum"]

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


def trainer_score(client: NodeIdentity, witnesses: Sequence[Witness]) -> int:
    """How many of the reports say that ``client`` took part."""
    item = hashlib.sha256(client.signer).digest()
    return count_containing([(w.participant_bloom.keys, w.participant_bloom.words) for w in witnesses], item)


def is_healthy(state: Coordinator, client: NodeIdentity, proof: CommitteeProof) -> bool:
    """Whether a quorum of the previous round's witnesses saw ``client`` do its work.

    Raises:
        CoordinatorError: NO_ACTIVE_ROUND, there was no previous round, or it has no witnesses;
            INVALID_COMMITTEE_PROOF, the proof is not that of ``client`` in that round, or is of a committee without
            defined work (Psyche panics).
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
    quorum = witness_quorum(state.config.witness_nodes, len(round_.witnesses))
    return trainer_score(client, round_.witnesses) >= quorum


def select_commitment(commitments: Sequence[Commitment], witnesses: Sequence[Witness], quorum: int) -> int | None:
    """Index of the commitment that counts for a batch, or None without agreement.

    Each witness votes for the first commitment, in the given order, whose hash is in its broadcast filter. Among
    those that reach the quorum the most votes win, and of equals the last.
    """
    votes = [0] * len(commitments)
    hashes = [commitment.data_hash for commitment in commitments]
    for witness in witnesses if hashes else ():
        seen = BloomFilter(witness.broadcast_bloom.keys, witness.broadcast_bloom.words).contains_many(hashes)
        if seen.any():
            votes[int(seen.argmax())] += 1
    best = None
    for index, count in enumerate(votes):
        if count >= quorum and (best is None or count >= votes[best]):
            best = index
    return best
