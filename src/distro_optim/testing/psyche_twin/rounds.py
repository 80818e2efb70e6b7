"""What the twin keeps of a round, and what follows from it: what is to be trained, applied and reported. No I/O.

PsycheFoundation/psyche, ``shared/client/src/state/{train,witness}.rs``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from ...comm.tickets import BlobTicket
from ...compress import CompressedUpdate, TilePlan
from ...compress.wire import decode_download
from ...coordinator.rules.assignment import assign_data
from ...coordinator.rules.committee import CommitteeSelection
from ...coordinator.rules.consensus import is_healthy, select_commitment, witness_quorum
from ...coordinator.types import (
    BatchId,
    Committee,
    CommitteeProof,
    Coordinator,
    MerkleRoot,
    NodeIdentity,
    Witness,
    WitnessBloom,
    WitnessProof,
)
from ...errors import CoordinatorError
from ...strategy.rounds.results import commitment_hash
from ...strategy.rounds.round_state import BLOOM_ENTROPY
from ...verify.bloom import BloomFilter
from ...verify.commitment import Commitment
from ...verify.merkle import EMPTY_ROOT, merkle_root

__all__ = ["NOBODY", "Announced", "TwinRound", "UnknownCommitmentError"]

NOBODY: Final = CommitteeProof(Committee.TIE_BREAKER, 0, 0)
"""Who has no role."""


class UnknownCommitmentError(Exception):
    """A result that counts is not here, which ends Psyche's client."""


@dataclass
class Announced:
    """A result that was announced; ``update`` is there once it was downloaded and kept its commitment."""

    sender: NodeIdentity
    commitment: Commitment
    ticket: BlobTicket
    update: CompressedUpdate | None = None
    nonce: int = 0
    retry_at: float | None = None


@dataclass
class TwinRound:
    """``RoundState``; a default one has neither roles nor filters."""

    height: int = 0
    step: int = 0
    selection: CommitteeSelection | None = None
    proof: CommitteeProof = NOBODY
    witness: WitnessProof | None = None
    assignments: dict[BatchId, NodeIdentity] = field(default_factory=dict)
    missing: set[BatchId] = field(default_factory=set)
    filters: tuple[BloomFilter, BloomFilter] | None = None
    results: dict[BatchId, list[Announced]] = field(default_factory=dict)
    finished: set[NodeIdentity] = field(default_factory=set)
    broadcasts: list[bytes] = field(default_factory=list)
    own: object = None
    trained: bool = False
    sent_finished: bool = False
    sent_witness: bool = False

    def of_blob(self, blob: bytes) -> tuple[BatchId, Announced] | None:
        """What was announced under this hash."""
        for batch, announced in self.results.items():
            for one in announced:
                if one.ticket.hash == blob:
                    return batch, one
        return None

    @property
    def is_complete(self) -> bool:
        """Whether all that was announced, and all that was assigned, is here."""
        return not self.missing and all(one.update is not None for each in self.results.values() for one in each)

    @classmethod
    def begin(cls, state: Coordinator, me: NodeIdentity, draw: Callable[[int], bytes]) -> TwinRound:
        """The current round of ``state``, in whose list we are."""
        round_ = state.current_round
        selection = CommitteeSelection.for_round(state, round_)
        index = [client.id for client in state.epoch_state.clients].index(me)
        assignments = {} if state.epoch_state.last_step else assign_data(state, selection)
        return cls(
            height=round_.height,
            step=state.progress.step,
            selection=selection,
            proof=selection.get_committee(index),
            witness=selection.get_witness(index),
            assignments=assignments,
            missing=set(assignments),
            filters=(BloomFilter.from_entropy(draw(BLOOM_ENTROPY)), BloomFilter.from_entropy(draw(BLOOM_ENTROPY))),
        )

    def keep(self, blob: bytes, data: bytes, plan: TilePlan) -> None:
        """``apply_distro_result``: the commitment of a download is compared, and nothing else."""
        found = self.of_blob(blob)
        if found is None:
            return
        batch, announced = found
        result = decode_download(data, max_results=max(1, len(plan)))
        if announced.update is not None or commitment_hash(result) != announced.commitment.data_hash:
            return
        if self.missing and self.filters is not None:
            took_part, seen = self.filters
            took_part.add(hashlib.sha256(announced.sender.signer).digest())
            if batch in self.missing:
                seen.add(announced.commitment.data_hash)
            self.missing.discard(batch)
        announced.update = result.to_update(plan, finite=False)
        announced.nonce = result.trainer_nonce

    def batch_of(self, client: NodeIdentity) -> BatchId | None:
        """What this client is to train; None if nothing."""
        return next((batch for batch, owner in self.assignments.items() if owner == client), None)

    def updates_that_count(self, state: Coordinator) -> tuple[CompressedUpdate, ...]:
        """Those of this round, when ``state`` is of the second round after it; of equal candidates the last.

        Raises:
            UnknownCommitmentError: one of them is not here.
        """
        before = state.previous_round
        witnesses = before.witnesses if before is not None else ()
        quorum = witness_quorum(state.config.witness_nodes, len(witnesses))
        updates = []
        for batch in sorted(self.assignments):
            candidates = self.results.get(batch, [])
            picked = select_commitment([one.commitment for one in candidates], witnesses, quorum)
            if picked is None:
                continue
            update = candidates[picked].update
            if update is None:
                raise UnknownCommitmentError("UnknownCommitment: a result that counts is not here")
            updates.append(update)
        return tuple(updates)

    def unseen(self, state: Coordinator) -> list[tuple[NodeIdentity, CommitteeProof]]:
        """Whoever the witnesses of this round did not see, when ``state`` is of the next; ourselves included."""
        if self.selection is None or self.witness is None or not self.witness.witness or self.height < 1:
            return []
        if state.epoch_state.first_round:
            return []
        checks = []
        for index, client in enumerate(state.epoch_state.clients):
            try:
                proof = self.selection.get_committee(index)
                healthy = is_healthy(state, client.id, proof)
            except CoordinatorError:
                healthy = False
            if not healthy:
                checks.append((client.id, proof))
        return checks

    @property
    def root(self) -> bytes:
        """Over what was broadcast in it (32 bytes)."""
        return merkle_root(self.broadcasts) if self.broadcasts else EMPTY_ROOT

    def report(self, proof: WitnessProof) -> Witness:
        """What a witness of the next round says about it."""
        took_part, seen = self.filters or (None, None)
        return Witness(proof, _bloom(took_part), _bloom(seen), MerkleRoot(self.root))


def _bloom(bloom: BloomFilter | None) -> WitnessBloom:
    return WitnessBloom() if bloom is None else WitnessBloom(bloom.keys, bloom.words)
