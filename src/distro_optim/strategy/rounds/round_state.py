"""What a client knows of one round: which client trains what, what was announced, what has come. No I/O.

Rules: PsycheFoundation/psyche, ``shared/client/src/state/{round_state,steps}.rs``. Each round keeps the list of clients
with which it began; Psyche looks into the present one, and so refuses messages about the round before when a client
has left in between.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from ...comm.tickets import BlobTicket
from ...coordinator.rules.assignment import assign_data
from ...coordinator.rules.committee import CommitteeSelection
from ...coordinator.rules.schedule import effective_learning_rate
from ...coordinator.types import (
    BatchId,
    Committee,
    CommitteeProof,
    Coordinator,
    NodeIdentity,
    WitnessBloom,
    WitnessProof,
)
from ...verify.bloom import BLOOM_KEYS, BloomFilter
from ...verify.commitment import Commitment
from .results import ReceivedResult

__all__ = ["MAX_CLAIMS", "MAX_SPARE_CLAIMS", "Claim", "ClaimState", "RoundState"]

MAX_CLAIMS: Final = 4
"""Results for one batch that are fetched as they are announced. An honest client makes one; a client that announces
more than these is praised for none. Chosen arbitrarily."""

MAX_SPARE_CLAIMS: Final = 28
"""Further announcements for one batch, some 300 bytes each, that are kept in case the witnesses agree on one of them.
Those with the lowest hashes are kept, so that the order in which they arrive does not matter. Chosen arbitrarily."""

BLOOM_ENTROPY: Final = 8 * BLOOM_KEYS

_NOBODY: Final = CommitteeProof(Committee.TIE_BREAKER, 0, 0)
_NO_WITNESS: Final = WitnessProof(position=0, index=0, witness=False)
"""The roles of one that is in no list and watches. They are never sent."""


class ClaimState(enum.Enum):
    """What has become of an announced result."""

    FETCHING = "on its way"
    VALID = "it fits, and may be applied"
    INVALID = "it is what was announced, but not a result of this model"
    BROKEN = "it is not what was announced"
    SPARE = "one too many, fetched only if the witnesses agree on it"


@dataclass
class Claim:
    """An announcement of a result.

    Attributes:
        result: what arrived, if it fits.
        failures: downloads that came to nothing; those that were only slow do not count.
        retry_at: when to try again; None while a download is under way or none is needed.
    """

    sender: NodeIdentity
    batch: BatchId
    commitment: Commitment
    ticket: BlobTicket
    state: ClaimState = ClaimState.FETCHING
    result: ReceivedResult | None = None
    failures: int = 0
    retry_at: float | None = None

    @property
    def order(self) -> tuple[bytes, bytes]:
        """Sorts claims, so that the order of arrival decides nothing."""
        return self.commitment.data_hash, self.ticket.hash


@dataclass
class RoundState:
    """One round as seen from here.

    Attributes:
        height, step: of the round.
        lr: learning rate of the step.
        clients: those with whom it began.
        selection: the roles.
        committee_proof, witness_proof: our own.
        assignments: the client that trains each batch, in order of the data.
        trains: whether anything is trained at all.
        missing: batches of which nothing that keeps its commitment has come yet.
        participant_keys, result_keys: of the filters in our report.
        claims: announcements by batch.
        changes: how often an announcement came, or what became of one was found out.
        participants, results: what the report will praise, by batch: the client that took part, and the hash of what
            came.
        finished: clients that have said so, ourselves included, as far as our report waits for it; see
            :meth:`note_finished`.
        broadcasts: hash of every message taken, in order of arrival.
        own: what the trainer wants back with the next round.
        training_over: our trainer has nothing (more) to do in this round.
        training: the batch that it is at work on; None if it is not.
        ready_at: when we began to wait for others, monotonic seconds.
    """

    height: int
    step: int
    lr: float
    clients: tuple[NodeIdentity, ...]
    selection: CommitteeSelection
    committee_proof: CommitteeProof
    witness_proof: WitnessProof
    assignments: dict[BatchId, NodeIdentity]
    trains: bool
    missing: set[BatchId]
    participant_keys: bytes
    result_keys: bytes
    claims: dict[BatchId, list[Claim]] = field(default_factory=dict)
    changes: int = 0
    participants: dict[BatchId, bytes] = field(default_factory=dict)
    results: dict[BatchId, bytes] = field(default_factory=dict)
    finished: set[NodeIdentity] = field(default_factory=set)
    broadcasts: list[bytes] = field(default_factory=list)
    own: object = None
    training_over: bool = False
    training: BatchId | None = None
    ready_at: float | None = None
    has_finished: bool = False
    sent_witness: bool = False
    _by_blob: dict[bytes, list[Claim]] = field(default_factory=dict, repr=False)

    @classmethod
    def begin(cls, state: Coordinator, me: NodeIdentity, draw: Callable[[int], bytes]) -> RoundState:
        """The current round of ``state``, in whose list ``me`` is, unless we only watch.

        Raises:
            CoordinatorError: the state contradicts itself, or elects roles that have no work.
        """
        round_ = state.current_round
        clients = tuple(client.id for client in state.epoch_state.clients)
        selection = CommitteeSelection.for_round(state, round_)
        index = clients.index(me) if me in clients else None
        trains = not state.epoch_state.last_step
        assignments = assign_data(state, selection) if trains else {}
        return cls(
            height=round_.height,
            step=state.progress.step,
            lr=effective_learning_rate(state, state.progress.step),
            clients=clients,
            selection=selection,
            committee_proof=_NOBODY if index is None else selection.get_committee(index),
            witness_proof=_NO_WITNESS if index is None else selection.get_witness(index),
            assignments=assignments,
            trains=trains,
            missing=set(assignments),
            participant_keys=draw(BLOOM_ENTROPY),
            result_keys=draw(BLOOM_ENTROPY),
        )

    @cached_property
    def everybody_witnesses(self) -> bool:
        """Whether all clients are elected that are not on probation."""
        return all(map(self.selection.is_witness_at, range(self.selection.regular_nodes)))

    @property
    def is_newcomer(self) -> bool:
        """Whether we are on probation ourselves."""
        return self.committee_proof.index in self.selection.newcomers

    @cached_property
    def regular(self) -> frozenset[NodeIdentity]:
        """The clients that others wait for: those that are not on probation."""
        newcomers = self.selection.newcomers
        return frozenset(client for place, client in enumerate(self.clients) if place not in newcomers)

    @cached_property
    def unfinished(self) -> set[NodeIdentity]:
        """Those of :attr:`regular` that have not said that they have finished."""
        return set(self.regular - self.finished)

    def note_finished(self, client: NodeIdentity) -> None:
        """``client`` says that it has."""
        self.finished.add(client)
        self.unfinished.discard(client)

    def all_claims(self) -> Iterator[Claim]:
        """Announcements of all batches."""
        for claims in self.claims.values():
            yield from claims

    def claims_of_blob(self, blob: bytes) -> list[Claim]:
        """Announcements that lead to ``blob``. Honest peers never share one."""
        return list(self._by_blob.get(blob, ()))

    def batch_of(self, client: NodeIdentity) -> BatchId | None:
        """The batch that ``client`` trains; None if it has none."""
        return self._batches.get(client)

    @cached_property
    def _batches(self) -> dict[NodeIdentity, BatchId]:
        return {owner: batch for batch, owner in reversed(self.assignments.items())}

    def as_assigned(self, batch: BatchId, client: NodeIdentity) -> BatchId:
        """``batch``; if it is the client's, the very object of :attr:`assignments`, which dicts find sooner."""
        own = self._batches.get(client)
        return own if own is not None and own == batch else batch

    def has_room_for(self, claim: Claim) -> bool:
        """Whether an announcement would be kept."""
        claims = self.claims.get(claim.batch, ())
        if len(claims) < MAX_CLAIMS + MAX_SPARE_CLAIMS:
            return True
        return any(claim.order < spare.order for spare in _spare(claims))

    def add(self, claim: Claim) -> None:
        """Keeps an announcement for which there is room, as SPARE if there were enough before."""
        self.changes += 1
        claims = self.claims.setdefault(claim.batch, [])
        if len(claims) >= MAX_CLAIMS:
            claim.state = ClaimState.SPARE
            # For a client that announces so much, the round does not wait, and the report does not praise it. A report
            # that went out before may praise one of its results all the same; if a quorum agrees, that one counts.
            self.missing.discard(claim.batch)
            self.participants.pop(claim.batch, None)
            self.results.pop(claim.batch, None)
        if len(claims) >= MAX_CLAIMS + MAX_SPARE_CLAIMS:
            last = max(_spare(claims), key=lambda spare: spare.order)
            claims.remove(last)
            self._by_blob[last.ticket.hash].remove(last)
        claims.append(claim)
        self._by_blob.setdefault(claim.ticket.hash, []).append(claim)

    def settle(self, claim: Claim, state: ClaimState, result: ReceivedResult | None = None) -> None:
        """The data of ``claim`` are here and were read."""
        self.changes += 1
        claim.state, claim.result, claim.retry_at = state, result, None
        if state is ClaimState.BROKEN:
            return
        # A result that nobody can use does not count as work. Psyche's witnesses praise it all the same.
        if state is ClaimState.VALID and self.missing:
            if len(self.claims.get(claim.batch, ())) <= MAX_CLAIMS:
                self.participants[claim.batch] = hashlib.sha256(claim.sender.signer).digest()
            if claim.batch in self.missing:
                self.results[claim.batch] = claim.commitment.data_hash
        self.missing.discard(claim.batch)

    @property
    def participant_bloom(self) -> WitnessBloom:
        """For our report: the clients that took part."""
        return _bloom_of(self.participant_keys, self.participants.values())

    @property
    def broadcast_bloom(self) -> WitnessBloom:
        """For our report: the commitments whose results came."""
        return _bloom_of(self.result_keys, self.results.values())


def _spare(claims: Iterable[Claim]) -> list[Claim]:
    return [claim for claim in claims if claim.state is ClaimState.SPARE]


def _bloom_of(keys: bytes, items: Collection[bytes]) -> WitnessBloom:
    bloom = BloomFilter.from_entropy(keys)
    bloom.add_many(list(items))
    return WitnessBloom(bloom.keys, bloom.words)
