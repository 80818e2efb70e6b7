"""The rule that decides which result of a batch counts: the one its witnesses agree on. No I/O.

Votes are counted by :func:`~distro_optim.coordinator.rules.consensus.select_seen`; here stands who votes, on what and
in which order, and what happens to a result that counts and has not come.

Rules: ``shared/client/src/state/train.rs`` of PsycheFoundation/psyche. There the candidates for a batch stand in order
of arrival, which decides between equals and gives each vote to the first candidate that a filter seems to hold; so two
honest peers can choose differently. Here they stand in the order of their hashes. Where each sender announces a single
result, as honest ones do, both rules choose the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ...compress import CompressedUpdate
from ...coordinator.rules.checkpoints import is_with_peers
from ...coordinator.rules.consensus import participant_item, select_seen, witness_quorum
from ...coordinator.rules.schedule import cold_start_bounds, effective_learning_rate
from ...coordinator.types import BatchId, Coordinator, NodeIdentity, Witness
from ...errors import CoordinatorError
from ...verify.filter_bank import FilterBank
from .actions import CountedResult
from .reading import Reader
from .round_state import Claim, ClaimState, RoundState

__all__ = ["Choice", "DueResults"]


@dataclass(frozen=True)
class Choice:
    """Which results count, as far as that is known.

    Attributes:
        updates: contributions in ascending order of their batches.
        applied: whose they are.
        waiting: batches for which the witnesses saw a result that has not come here.
        wanted: results that count and that we have not asked for yet.
        counted: clients whose results count and fit, and we, if we made one that fits.
        silent: clients that had work, and of whom nothing that fits is here or on its way.
    """

    updates: tuple[CompressedUpdate, ...]
    waiting: tuple[BatchId, ...]
    wanted: tuple[Claim, ...] = ()
    counted: tuple[NodeIdentity, ...] = ()
    silent: tuple[NodeIdentity, ...] = ()
    applied: tuple[CountedResult, ...] = ()


@dataclass(frozen=True)
class DueResults:
    """The results of round h-2, to be applied at the start of round h.

    Attributes:
        step: of round h.
        lr: learning rate of that step.
        bounds: first and last step of the cold start, if there is one.
        round: round h-2.
        witnesses: reports sent during round h-1; they say what was seen of round h-2.
        quorum: how many of them must agree.
        least_nonce: results of trainers that have trained fewer rounds than this are left out.
        reader: of the reports.
    """

    step: int
    lr: float
    bounds: tuple[int, int] | None
    round: RoundState
    witnesses: tuple[Witness, ...]
    quorum: int
    least_nonce: int
    reader: Reader

    @classmethod
    def of(cls, state: Coordinator, round_: RoundState, reader: Reader) -> DueResults:
        """What is due in the current round of ``state``, where ``round_`` is two rounds back."""
        previous = state.previous_round
        witnesses = previous.witnesses if previous is not None else ()
        try:
            quorum = witness_quorum(state.config.witness_nodes, len(witnesses))
        except CoordinatorError:
            quorum = 1  # there are no reports, so nothing reaches it
        shared_by_peers = is_with_peers(state.model.checkpoint)
        return cls(
            step=state.progress.step,
            lr=effective_learning_rate(state, state.progress.step),
            bounds=cold_start_bounds(state),
            round=round_,
            witnesses=witnesses,
            quorum=quorum,
            least_nonce=state.model.cold_start_warmup_steps if shared_by_peers else 0,
            reader=reader,
        )

    def choose(self, me: NodeIdentity | None = None) -> Choice:
        """Applies the rule to each batch of the round.

        Args:
            me: whose results are known to fit, whether a quorum says that it saw them or not.
        """
        updates, waiting, wanted, counted, silent, applied = [], [], [], [], [], []
        # What the reports say of all results, asked in one pass; the loop only looks it up.
        hashes = [claim.commitment.data_hash for claim in self.round.all_claims()]
        votes = dict(zip(hashes, self._results.count(hashes), strict=True))
        for batch, owner in sorted(self.round.assignments.items(), key=lambda item: item[0].start):
            claims = self.round.claims.get(batch, [])
            if len(claims) == 1:  # of honest clients; others in the same way would cost a round of many peers the most
                picked = 0 if votes[claims[0].commitment.data_hash] >= self.quorum else None
            else:
                claims = sorted(claims, key=lambda claim: claim.order)
                picked = select_seen(self._results.ask([c.commitment.data_hash for c in claims]), self.quorum)
            fits = any(claim.state is ClaimState.VALID for claim in claims)
            if fits and (picked is not None or owner == me):
                counted.append(owner)
            if not fits and all(claim.state is not ClaimState.FETCHING for claim in claims):
                silent.append(owner)
            if picked is None:
                if self._seen_elsewhere(owner, claims):
                    waiting.append(batch)
                continue
            claim = claims[picked]
            if claim.state in (ClaimState.FETCHING, ClaimState.SPARE):
                waiting.append(batch)
                if claim.state is ClaimState.SPARE:
                    wanted.append(claim)
            elif claim.result is not None and claim.result.trainer_nonce >= self.least_nonce:
                updates.append(claim.result.update)
                bytes_ = claim.result.num_bytes
                applied.append(CountedResult(owner=owner.p2p_identity, samples=len(batch), bytes=bytes_))
        lost = set(silent).difference(self.round.assignments[batch] for batch in waiting)
        return Choice(tuple(updates), tuple(waiting), tuple(wanted), tuple(counted), tuple(lost), tuple(applied))

    def _seen_elsewhere(self, owner: NodeIdentity, claims: Sequence[Claim]) -> bool:
        """Whether a quorum of witnesses saw ``owner`` take part with something that is not among ``claims``.

        A witness's filter of participants contains clients, and a client has one batch: so it tells of results whose
        announcements never came here.
        """
        took_part = self._participants.ask([participant_item(owner)])[:, 0]
        seen = self._results.ask([claim.commitment.data_hash for claim in claims])
        return int((took_part & ~seen.any(axis=1)).sum()) >= self.quorum

    @cached_property
    def _results(self) -> FilterBank:
        return self.reader.results_filters(self.witnesses)

    @cached_property
    def _participants(self) -> FilterBank:
        return self.reader.participants_filters(self.witnesses)
