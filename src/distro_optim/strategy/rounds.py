"""The client's side of a run, without I/O: what to fetch, apply, train, say and report, and when.

States of the coordinator, messages of peers, downloads, results of the trainer and ``now`` go in; actions come out
(:mod:`.actions`), to be carried out in their order. ``docs/rounds.md`` draws the pipeline. Rules:
PsycheFoundation/psyche, ``shared/client/src``; where that client ends in a panic or goes on with other weights than its
peers, this one says :class:`~.actions.Desynced`, trains no more, still witnesses, and loads the weights anew in the
next warm-up.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from blake3 import blake3

from ..comm import postcard
from ..comm.announcements import Announcement
from ..comm.iroh.addresses import EndpointAddr
from ..comm.iroh.tickets import BlobTicket
from ..comm.signing import SecretKey
from ..compress import CompressedUpdate, TilePlan
from ..coordinator.model import P2P, P2PGcs
from ..coordinator.schedule import cold_start_bounds, effective_learning_rate
from ..coordinator.types import Committee, CommitteeProof, Coordinator, MerkleRoot, NodeIdentity, RunState
from ..errors import ConfigurationError, CoordinatorError, InvalidResultError, ProtocolError
from ..verify.commitment import Commitment, finished_hash
from ..verify.merkle import EMPTY_ROOT, merkle_root
from . import actions as act
from .actions import Action, Dropped, DropReason
from .admission import NotAdmitted, check_broadcast, check_commitment
from .applying import DueResults
from .broadcasts import Broadcast, BroadcastType, Finished, TrainingResult, WeightsReport
from .repeats import Repeats
from .reports import health_checks, warmup_witness, witness_report
from .results import encode_result, max_result_size, read_result
from .round_state import Claim, ClaimState, RoundState
from .weights import WeightsTable, differing_tensors, weights_report

__all__ = ["Rounds", "Stage"]

RETRY_SECONDS: Final = 2.0
"""Before a failed download is tried again (``shared/network/src/download/scheduler.rs``); doubles each time ..."""

MAX_RETRY_SECONDS: Final = 8.0
"""... up to this. Results are wanted for two rounds, so nobody gives up earlier. Chosen arbitrarily."""

KEPT_STEPS: Final = 2
"""Blobs and messages are offered until two steps later (``s - 2`` in ``shared/client/src/client.rs``)."""

MAX_EARLY_PER_SENDER: Final = 4
"""Messages held that are about the next round, of which the coordinator has not told us yet. A result and a
"finished" are honest; chosen arbitrarily above."""

MAX_LOADS: Final = 3
"""Attempts to load the model in one warm-up. Chosen arbitrarily."""

_WARMUP_PROOF: Final = CommitteeProof(Committee.TIE_BREAKER, 0, 0)
_U32: Final = 0xFFFF_FFFF
_NONCE_BYTES: Final = 4

_S = RunState
_ROUND: Final = frozenset({_S.ROUND_TRAIN, _S.ROUND_WITNESS})


class Stage(enum.Enum):
    """What we are to the run."""

    OUTSIDE = "no model is loaded that fits the run"
    LOADING = "the model is being loaded"
    RUNNING = "we take part"
    ENDED = "the run is over"


class Rounds:
    """See the module. Every method that takes ``now`` is an input and returns what is to be done because of it.

    Args:
        identity: who we are to the coordinator.
        key: of our endpoint; signs commitments.
        address: where blobs that we offer are to be had.
        draw: gives so many random bytes, from a source that peers cannot guess.

    Attributes:
        stage: what we are to the run.
        fault: why our weights are not those of the others; None if they are, as far as we know.
        dropped: messages and results that were not taken, by reason.
    """

    def __init__(
        self, *, identity: NodeIdentity, key: SecretKey, address: EndpointAddr, draw: Callable[[int], bytes]
    ) -> None:
        if identity.p2p_identity != key.public or address.id != key.public:
            raise ConfigurationError("identity, key and address must be of one peer", name="key")
        self.address = address
        self.stage = Stage.OUTSIDE
        self.fault: act.Desynced | None = None
        self.dropped: Counter[DropReason] = Counter()
        self._me = identity
        self._key = key
        self._draw = draw
        self._out: list[Action] = []
        self._now = 0.0
        self._state: Coordinator | None = None
        self._listed = False
        self._plan: TilePlan | None = None
        self._names: tuple[str, ...] = ()
        self._peers: dict[bytes, NodeIdentity] = {}
        self._allowed: frozenset[bytes] = frozenset()
        # The round under way, the one before, and the results of the one before that while they are not applied.
        self._current: RoundState | None = None
        self._previous: RoundState | None = None
        self._due: DueResults | None = None
        self._prepared = False
        self._early: dict[bytes, list[Broadcast]] = {}
        self._trainer_nonce = 0
        # Warm-up: which one, who is ready, what was said.
        self._warmup: tuple[int, int] | None = None
        self._greeted = False
        self._ready: set[NodeIdentity] = set()
        self._warmup_witnessed = False
        self._loads = 0
        self._load_step = 0
        self._source: tuple[bytes, ...] = ()
        self._repeats = Repeats()
        self._repeat_at = 0.0
        # Weights: what was asked for (step to epoch), our own reports, those of the others, and since when we doubt.
        self._hashing: dict[int, int] = {}
        self._reports: dict[int, WeightsReport] = {}
        self._table = WeightsTable()
        self._doubt: int | None = None

    # -- inputs ----------------------------------------------------------------------------------------------------

    def coordinator_state(self, state: Coordinator, now: float) -> list[Action]:
        """The coordinator tells its state. The same one again changes nothing."""
        self._now = now
        if self.stage is Stage.ENDED or state is self._state or state == self._state:
            return self._take()
        self._state = state
        was_listed, self._listed = self._listed, self._is_listed(state)
        if was_listed and not self._listed and state.run_state is not _S.FINISHED:
            self._out.append(act.Rejoin())
        try:
            self._follow(state)
        except CoordinatorError as error:
            self._end(f"the coordinator's state cannot be followed: {error}")
        return self._take()

    def initialized(self, plan: TilePlan, names: Sequence[str], now: float) -> list[Action]:
        """The model is loaded.

        Args:
            plan: how its tensors are tiled.
            names: of the tensors, in the plan's order.
            now: monotonic time in seconds.
        """
        self._now = now
        if self.stage is not Stage.LOADING or self._state is None:
            return self._take()
        self._plan, self._names = plan, tuple(names)
        self.stage, self.fault, self._doubt, self._greeted = Stage.RUNNING, None, None, False
        self._reports.clear()
        if self._state.run_state is _S.COOLDOWN or self._state.progress.step != self._load_step:
            self._desync("the model was loaded only after training had begun")
        try:
            self._follow(self._state)
        except CoordinatorError as error:
            self._end(f"the coordinator's state cannot be followed: {error}")
        return self._take()

    def initialization_failed(self, reason: str, now: float) -> list[Action]:
        """The model could not be loaded. Tried again a few times while it is warm-up."""
        self._now = now
        if self.stage is Stage.LOADING and self._state is not None:
            self.stage = Stage.OUTSIDE
            if self._loads >= MAX_LOADS:
                self._end(f"the model cannot be loaded: {reason}")
            elif self._state.run_state is _S.WARMUP and self._listed:
                self._load(self._state, self._source)
        return self._take()

    def receive(self, announcement: Announcement, now: float) -> list[Action]:
        """A peer announces a :class:`~.broadcasts.Broadcast`; its signature was checked."""
        self._now = now
        sender = self._sender_of(announcement)
        if sender is not None:
            try:
                broadcast: Broadcast = postcard.decode(Broadcast, announcement.data)
                self._take_broadcast(sender, broadcast)
            except NotAdmitted as refusal:
                self._drop(announcement.sender, refusal.reason, refusal.detail)
            except ProtocolError as error:
                self._drop(announcement.sender, DropReason.MALFORMED, str(error))
            self._advance()
        return self._take()

    def receive_weights(self, announcement: Announcement, now: float) -> list[Action]:
        """A peer of our own kind announces a :class:`~.broadcasts.WeightsReport`; its signature was checked."""
        self._now = now
        sender = self._sender_of(announcement)
        if sender is not None and self._state is not None:
            try:
                report: WeightsReport = postcard.decode(WeightsReport, announcement.data)
            except ProtocolError as error:
                self._drop(announcement.sender, DropReason.MALFORMED, str(error))
                return self._take()
            progress = self._state.progress
            if report.epoch != progress.epoch or not -KEPT_STEPS <= report.step - progress.step <= 1:
                self._drop(announcement.sender, DropReason.WRONG_STEP)
            elif not self._table.add(announcement.sender, report):
                self._drop(announcement.sender, DropReason.DUPLICATE)
            else:
                self._judge(report.step, final=False)
        return self._take()

    def fetched(self, blob: bytes, data: bytes, now: float) -> list[Action]:
        """A download is here. ``blob`` is the BLAKE3 of ``data``, which was verified on the way."""
        self._now = now
        found = self._claim(blob)
        if found is not None and self._plan is not None:
            round_, claim = found
            try:
                result = read_result(
                    data, step=round_.step, batch=claim.batch, data_hash=claim.commitment.data_hash, plan=self._plan
                )
                round_.settle(claim, ClaimState.VALID, result)
            except InvalidResultError as error:
                round_.settle(claim, ClaimState.INVALID)
                self._drop(claim.sender.p2p_identity, DropReason.INVALID_RESULT, str(error))
            except ProtocolError as error:
                round_.settle(claim, ClaimState.BROKEN)
                self._drop(claim.sender.p2p_identity, DropReason.WRONG_HASH, str(error))
            self._advance()
        return self._take()

    def fetch_failed(self, blob: bytes, now: float) -> list[Action]:
        """A download came to nothing. It is tried again while its round is of interest."""
        self._now = now
        found = self._claim(blob)
        if found is not None:
            claim = found[1]
            claim.retry_at = now + min(MAX_RETRY_SECONDS, RETRY_SECONDS * 2 ** min(claim.failures, 8))
            claim.failures += 1
        return self._take()

    def trained(self, step: int, update: CompressedUpdate, own: object, now: float) -> list[Action]:
        """The training of ``step`` is done.

        Args:
            step: of the :class:`~.actions.TrainBatch`.
            update: what to send.
            own: what the trainer wants back in the next round, if this one is sent.
            now: monotonic time in seconds.
        """
        self._now = now
        nonce, round_ = self._trainer_nonce, self._over(step)
        if round_ is not None and self._in(_S.ROUND_TRAIN):
            self._publish(round_, update, own, nonce)
        self._advance()
        return self._take()

    def cancelled(self, step: int, now: float) -> list[Action]:
        """The training of ``step`` was stopped before it came to a result."""
        self._now = now
        self._over(step)
        self._advance()
        return self._take()

    def weights_hashed(self, step: int, digests: Sequence[bytes], now: float) -> list[Action]:
        """Answer to :class:`~.actions.HashWeights`: 32 bytes for each tensor, in the plan's order."""
        self._now = now
        epoch = self._hashing.pop(step, None)
        if epoch is not None and self.stage is Stage.RUNNING and self.fault is None:
            self._reports[step] = weights_report(epoch, step, digests, self._random_nonce())
            self._say_weights(step)
            self._judge(step, final=self._current is not None and step < self._current.step)
        return self._take()

    def tick(self, now: float) -> list[Action]:
        """Time passes: retries and repetitions. To be called at :meth:`next_timer`."""
        self._now = now
        for round_ in self._live_rounds():
            for claim in round_.all_claims():
                if claim.retry_at is not None and claim.retry_at <= now:
                    self._fetch(round_, claim)
        if self.stage is Stage.RUNNING and now >= self._repeat_at:
            self._repeat_at = now + self._repeats.pause
            if (again := self._repeats.next()) is not None:
                self._out.append(act.Announce(postcard.encode(again)))
            if self._reports:
                self._say_weights(max(self._reports))
        return self._take()

    def next_timer(self) -> float | None:
        """When :meth:`tick` has something to do; None if never."""
        times = [c.retry_at for round_ in self._live_rounds() for c in round_.all_claims() if c.retry_at is not None]
        if self.stage is Stage.RUNNING:
            times.append(self._repeat_at)
        return min(times, default=None)

    # -- following the coordinator ---------------------------------------------------------------------------------

    def _follow(self, state: Coordinator) -> None:
        if state.run_state in _ROUND:
            if self.stage is Stage.RUNNING:
                if not self._listed:
                    self._drop_out("the run goes on without us")
                    return
                self._enter_round(state)
                self._advance()
            return
        self._leave_rounds(state)
        match state.run_state:
            case _S.FINISHED:
                self._end(None)
            case _S.WARMUP:
                self._warm_up(state)

    def _warm_up(self, state: Coordinator) -> None:
        warmup = (state.progress.epoch, state.epoch_state.start_timestamp)
        if warmup != self._warmup:
            self._warmup = warmup
            self._greeted, self._warmup_witnessed, self._loads = False, False, 0
            self._ready.clear()
            self._table.clear()
            self._reports.clear()
            self._hashing.clear()
        if not self._listed:
            if self.stage is Stage.RUNNING:
                self._drop_out("the epoch begins without us")
            return
        self._allow(state)
        if self.stage is Stage.RUNNING and self.fault is not None:
            self.stage = Stage.OUTSIDE
        if self.stage is Stage.OUTSIDE:
            self._load(state, self._source)
        elif self.stage is Stage.RUNNING and not self._greeted:
            self._greeted = True
            self._early.clear()
            self._repeats = Repeats()
            self._repeat_at = self._now + self._repeats.pause
            self._hash_weights(state)
            self._ready.add(self._me)
            self._say(0, _WARMUP_PROOF, finished_hash(EMPTY_ROOT), Finished(MerkleRoot(), warmup=True))
        self._witness_warmup(state)

    def _witness_warmup(self, state: Coordinator) -> None:
        clients = [client.id for client in state.epoch_state.clients]
        if self.stage is Stage.RUNNING and not self._warmup_witnessed and self._ready.issuperset(clients):
            self._warmup_witnessed = True
            self._out.append(act.SendWarmupWitness(warmup_witness(clients.index(self._me))))

    def _load(self, state: Coordinator, source: tuple[bytes, ...]) -> None:
        self.stage = Stage.LOADING
        self._loads += 1
        self._load_step = state.progress.step
        others = [client.id.p2p_identity for client in state.epoch_state.clients if client.id != self._me]
        healing = [peer for peer in source if peer in others]
        shared = isinstance(state.model.checkpoint, P2P | P2PGcs)
        self._out.append(
            act.Initialize(
                epoch=state.progress.epoch,
                step=state.progress.step,
                checkpoint=state.model.checkpoint,
                providers=tuple(dict.fromkeys([*healing, *others])) if healing or shared else (),
            )
        )

    def _enter_round(self, state: Coordinator) -> None:
        step, current = state.progress.step, self._current
        if current is not None and current.step == step:
            if state.run_state is _S.ROUND_WITNESS:
                self._stop_training()
                self._witness()
            return
        follows = current is not None and current.step + 1 == step and current.height + 1 == state.current_round.height
        if current is not None:
            self._close_round(current)
        if not follows and state.current_round.height > 0:
            self._desync(f"we come into round {state.current_round.height} without the ones before it")
        if follows and current is not None:
            checks = health_checks(state, current, self._previous, self._me)
            if checks:
                self._out.append(act.SendHealthChecks(checks))
        self._begin_round(state, self._previous if follows else None, current if follows else None)

    def _begin_round(self, state: Coordinator, before: RoundState | None, previous: RoundState | None) -> None:
        """``previous`` is the round before the one that begins, ``before`` the one before that."""
        step = state.progress.step
        self._previous, self._current = previous, RoundState.begin(state, self._me, self._draw)
        self._due = DueResults.of(state, before) if before is not None and self.fault is None else None
        self._prepared = False
        self._repeats.drop_before(step - KEPT_STEPS)
        for old in [old for old in self._reports if old < step - KEPT_STEPS]:
            del self._reports[old]
        self._table.forget_before(step - KEPT_STEPS)
        self._allow(state)
        self._out.append(act.Forget(max(0, step - KEPT_STEPS)))
        early, self._early = self._early, {}
        for sender, broadcasts in early.items():
            for broadcast in broadcasts if sender in self._peers else ():
                try:
                    self._take_broadcast(self._peers[sender], broadcast)
                except NotAdmitted as refusal:
                    self._drop(sender, refusal.reason, refusal.detail)
        if state.run_state is _S.ROUND_WITNESS:
            self._witness()

    def _close_round(self, current: RoundState) -> None:
        """The round is over: what could not be done in it is not done any more."""
        self._stop_training()
        if not self._prepared:
            self._prepare(current, too_late=True)
        self._judge(current.step, final=True)

    def _leave_rounds(self, state: Coordinator) -> None:
        current = self._current
        if current is None:
            return
        self._close_round(current)
        missed = state.progress.step - current.step - 1
        if missed > 0:
            self._desync(f"{missed} rounds went by unseen")
        elif missed == 0 and self.fault is None:
            self._out.append(act.FinishEpoch(current.step))
        # Below zero the coordinator began the epoch anew. Weights are compared in its warm-up.
        self._current = self._previous = self._due = None
        self._early.clear()

    # -- one round -------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Does what has become possible."""
        current, state = self._current, self._state
        if state is None:
            return
        if current is None:
            if state.run_state is _S.WARMUP and self._listed:
                self._witness_warmup(state)
            return
        if not self._prepared:
            self._prepare(current, too_late=False)
        if not current.training_over or not self._in(_S.ROUND_TRAIN):
            return
        previous = self._previous
        if previous is not None and previous.missing:
            return
        if not current.sent_finished and current.committee_proof is not None:
            current.sent_finished = True
            root = merkle_root(previous.broadcasts) if previous is not None else EMPTY_ROOT
            data_hash = finished_hash(root)
            current.finished.add(self._me)
            current.broadcasts.append(data_hash)
            self._say(current.step, current.committee_proof, data_hash, Finished(MerkleRoot(root), warmup=False))
        if current.finished.issuperset(current.clients):
            self._witness()

    def _prepare(self, current: RoundState, *, too_late: bool) -> None:
        """Applies what is due, then trains, unless something has yet to come. ``too_late``: it comes no more."""
        if self._due is not None:
            choice = self._due.choose()
            if choice.waiting and not too_late:
                return
            if choice.waiting:
                self._doubt = current.step
                self._out.append(act.ResultMissing(step=current.step, batches=choice.waiting))
            due, self._due = self._due, None
            self._out.append(act.ApplyResults(step=due.step, lr=due.lr, bounds=due.bounds, updates=choice.updates))
        self._prepared = True
        state = self._state
        assert state is not None
        if self.fault is not None:
            current.training_over = True
            return
        if not too_late:
            self._hash_weights(state)
        batch = current.batch_of(self._me)
        if batch is not None and not too_late and state.run_state is _S.ROUND_TRAIN:
            self._train(state, current)
            return
        current.training_over = True
        if current.trains:
            self._out.append(act.DecayWeights(step=current.step, lr=self._lr_of(current.step)))

    def _train(self, state: Coordinator, current: RoundState) -> None:
        batch = current.batch_of(self._me)
        assert batch is not None
        bounds = cold_start_bounds(state)
        current.training = True
        self._out.append(
            act.TrainBatch(
                step=current.step,
                batch=batch,
                lr=effective_learning_rate(state, current.step),
                previous_lr=effective_learning_rate(state, max(0, current.step - 1)),
                bounds=bounds,
                zero_optim=bounds is not None and current.height == 0,
                own_previous=self._previous.own if self._previous is not None else None,
            )
        )

    def _lr_of(self, step: int) -> float:
        assert self._state is not None
        return effective_learning_rate(self._state, step)

    def _over(self, step: int) -> RoundState | None:
        """The trainer has answered: the round it was at work for, if that is still under way."""
        self._trainer_nonce = (self._trainer_nonce + 1) & _U32
        current = self._current
        if current is None or current.step != step or not current.training:
            return None
        current.training, current.training_over = False, True
        return current

    def _stop_training(self) -> None:
        current = self._current
        if current is not None and current.training:
            current.training, current.training_over = False, True
            self._out.append(act.CancelTraining(current.step))

    def _publish(self, round_: RoundState, update: CompressedUpdate, own: object, nonce: int) -> None:
        batch, proof, plan = round_.batch_of(self._me), round_.committee_proof, self._plan
        if batch is None or proof is None or plan is None or self.fault is not None:
            return
        blob, data_hash = encode_result(update, step=round_.step, trainer_nonce=nonce, batch=batch)
        try:
            # What peers will read, and so what we apply: the very same bytes.
            result = read_result(blob, step=round_.step, batch=batch, data_hash=data_hash, plan=plan)
        except ProtocolError as error:
            self._drop(self._key.public, DropReason.INVALID_RESULT, str(error))
            return
        round_.own = own
        ticket = BlobTicket.raw(self.address, blake3(blob).digest())
        self._out.append(act.StoreBlob(data=blob, tag=f"distro-result_{round_.step}"))
        commitment = self._say(round_.step, proof, data_hash, TrainingResult(batch, ticket))
        claim = Claim(self._me, batch, commitment, ticket)
        round_.claims.setdefault(batch, []).append(claim)
        round_.broadcasts.append(data_hash)
        round_.settle(claim, ClaimState.VALID, result)

    def _witness(self) -> None:
        current = self._current
        if current is None or current.sent_witness:
            return
        report = witness_report(current, self._previous)
        if report is not None:
            current.sent_witness = True
            self._out.append(act.SendWitness(step=current.step, witness=report))

    # -- messages --------------------------------------------------------------------------------------------------

    def _sender_of(self, announcement: Announcement) -> NodeIdentity | None:
        if self.stage is not Stage.RUNNING:
            self._drop(announcement.sender, DropReason.NOT_RUNNING)
            return None
        sender = self._peers.get(announcement.sender)
        if sender is None or sender == self._me:
            self._drop(announcement.sender, DropReason.UNKNOWN_SENDER)
            return None
        return sender

    def _take_broadcast(self, sender: NodeIdentity, broadcast: Broadcast) -> None:
        """Raises NotAdmitted if it is not taken."""
        if isinstance(broadcast.data, Finished) and broadcast.data.warmup:
            self._take_ready(sender, broadcast)
            return
        round_ = next((r for r in self._live_rounds() if r.step == broadcast.step), None)
        if round_ is None:
            self._hold(sender, broadcast)
            return
        check_broadcast(broadcast, sender, round_)
        round_.broadcasts.append(broadcast.commitment.data_hash)
        match broadcast.data:
            case TrainingResult(batch, ticket):
                claim = Claim(sender, batch, broadcast.commitment, ticket)
                round_.claims.setdefault(batch, []).append(claim)
                self._fetch(round_, claim)
            case Finished():
                round_.finished.add(sender)

    def _take_ready(self, sender: NodeIdentity, broadcast: Broadcast) -> None:
        if not self._in(_S.WARMUP) or broadcast.step != 0:
            raise NotAdmitted(DropReason.WRONG_STEP, "it is not warm-up")
        if sender in self._ready:
            raise NotAdmitted(DropReason.DUPLICATE)
        check_commitment(broadcast, sender)
        self._ready.add(sender)

    def _hold(self, sender: NodeIdentity, broadcast: Broadcast) -> None:
        """Keeps a message about the round that comes next; gossip can be faster than the coordinator."""
        assert self._state is not None
        step = self._state.progress.step
        expected = step if self._in(_S.WARMUP) else step + 1 if self._current is not None else None
        if broadcast.step != expected:
            raise NotAdmitted(DropReason.WRONG_STEP, f"step {broadcast.step}, it is {step}")
        held = self._early.setdefault(sender.p2p_identity, [])
        if len(held) >= MAX_EARLY_PER_SENDER:
            raise NotAdmitted(DropReason.TOO_MANY, "more about the next round")
        held.append(broadcast)

    def _fetch(self, round_: RoundState, claim: Claim) -> None:
        assert self._plan is not None
        claim.retry_at = None
        self._out.append(
            act.FetchBlob(
                ticket=claim.ticket,
                providers=tuple(peer for peer in self._peers if peer != self._key.public),
                max_size=max_result_size(self._plan),
                tag=f"downloaded-distro-result-{claim.sender}_{round_.step}",
            )
        )

    def _claim(self, blob: bytes) -> tuple[RoundState, Claim] | None:
        for round_ in self._live_rounds():
            claim = round_.claim_of_blob(blob)
            if claim is not None and claim.state is ClaimState.FETCHING:
                return round_, claim
        return None

    def _live_rounds(self) -> list[RoundState]:
        """Rounds that messages and downloads can still be about."""
        rounds = [self._current, self._previous, self._due.round if self._due is not None else None]
        return [round_ for round_ in rounds if round_ is not None]

    def _say(self, step: int, proof: CommitteeProof, data_hash: bytes, data: BroadcastType) -> Commitment:
        commitment = Commitment(data_hash, self._key.sign(data_hash))
        broadcast = Broadcast(step, proof, commitment, self._random_nonce(), data)
        self._repeats.add(broadcast)
        self._out.append(act.Announce(postcard.encode(broadcast)))
        return commitment

    def _random_nonce(self) -> int:
        return int.from_bytes(self._draw(_NONCE_BYTES), "little")

    # -- weights ---------------------------------------------------------------------------------------------------

    def _hash_weights(self, state: Coordinator) -> None:
        step = state.progress.step
        if step in self._reports or step in self._hashing:
            return  # the first round begins with the weights of the warm-up
        self._hashing = {old: epoch for old, epoch in self._hashing.items() if old >= step - KEPT_STEPS}
        self._hashing[step] = state.progress.epoch
        self._out.append(act.HashWeights(step))

    def _say_weights(self, step: int) -> None:
        report = self._reports[step]
        self._reports[step] = report = replace(report, nonce=(report.nonce + 1) & _U32)
        self._out.append(act.AnnounceWeights(postcard.encode(report)))

    def _judge(self, step: int, *, final: bool) -> None:
        """Compares our weights at ``step`` with the others'. Before it is final, only a majority of all convinces."""
        ours, state = self._reports.get(step), self._state
        if state is None or self.fault is not None or self.stage is not Stage.RUNNING:
            return
        if ours is None:
            if final and self._doubt is not None and self._doubt < step:
                self._desync("results are missing, and our weights were never compared")
            return
        clients = [client.id.p2p_identity for client in state.epoch_state.clients]
        verdict = self._table.judge(self._key.public, ours, clients)
        if verdict.report is not None and (final or 2 * len(verdict.right) > len(clients)):
            self._source = verdict.right
            tensors = differing_tensors(ours, verdict.report, self._names)
            self._desync(f"{len(verdict.right)} peers have other weights at step {step}", tensors)
        elif self._doubt is not None and self._doubt <= step:
            if verdict.confirmed:
                self._doubt = None
            elif final:
                self._desync("results are missing, and nobody has the weights that we have")

    def _desync(self, reason: str, tensors: tuple[str, ...] = ()) -> None:
        if self.fault is not None:
            return
        state = self._state
        assert state is not None
        self.fault = act.Desynced(step=state.progress.step, reason=reason, tensors=tensors)
        self._out.append(self.fault)
        self._due, self._doubt = None, None
        self._stop_training()
        if self._in(_S.WARMUP) and self._listed and self._loads < MAX_LOADS:
            self._ready.discard(self._me)
            self._load(state, self._source)

    # -- small things ----------------------------------------------------------------------------------------------

    def _in(self, run_state: RunState) -> bool:
        return self._state is not None and self._state.run_state is run_state

    def _is_listed(self, state: Coordinator) -> bool:
        return any(client.id == self._me for client in state.epoch_state.clients)

    def _allow(self, state: Coordinator) -> None:
        """Peers are the clients of the epoch, and those of the rounds that are not done with."""
        known = [client.id for client in state.epoch_state.clients]
        for round_ in self._live_rounds():
            known.extend(round_.clients)
        self._peers = {identity.p2p_identity: identity for identity in known}
        allowed = frozenset(self._peers) - {self._key.public}
        if allowed != self._allowed:
            self._allowed = allowed
            self._out.append(act.AllowPeers(allowed))

    def _drop_out(self, reason: str) -> None:
        self._desync(reason)
        self._current = self._previous = self._due = None
        self.stage = Stage.OUTSIDE

    def _end(self, error: str | None) -> None:
        self._stop_training()
        self._current = self._previous = self._due = None
        self.stage = Stage.ENDED
        self._out.append(act.RunEnded(step=self._state.progress.step if self._state else 0, error=error))

    def _drop(self, sender: bytes, reason: DropReason, detail: str = "") -> None:
        self.dropped[reason] += 1
        self._out.append(Dropped(sender=sender, reason=reason, detail=detail))

    def _take(self) -> list[Action]:
        out, self._out = self._out, []
        return out
