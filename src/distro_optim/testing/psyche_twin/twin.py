"""The twin: inputs in, actions out, and the steps of Psyche's machine between them. No I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from blake3 import blake3

from ...comm.addresses import EndpointAddr
from ...comm.announcements import Announcement
from ...comm.signing import SecretKey
from ...comm.tickets import BlobTicket
from ...compress import CompressedUpdate, TilePlan
from ...coordinator.rules.schedule import cold_start_bounds, effective_learning_rate
from ...coordinator.types import (
    BatchId,
    CommitteeProof,
    Coordinator,
    MerkleRoot,
    NodeIdentity,
    RunState,
    Witness,
    WitnessProof,
)
from ...strategy.rounds import actions as act
from ...strategy.rounds.actions import Action, DropReason
from ...strategy.rounds.audits.docket import AuditCount
from ...strategy.rounds.broadcasts import BroadcastType, Finished, TrainingResult
from ...strategy.rounds.phases import Stage
from ...strategy.rounds.results import encode_any_result
from ...verify.calibrate import Limits
from ...verify.commitment import Commitment, finished_hash
from ...verify.merkle import EMPTY_ROOT, merkle_root
from .messages import NotTaken, take
from .rounds import NOBODY, Announced, TwinRound, UnknownCommitmentError
from .voice import Voice

__all__ = ["PsycheTwin"]

POLL_SECONDS: Final = 0.5
"""``OPPROTUNISTIC_WITNESS_INTERVAL``: how often it looks whether it has something to say."""

RETRY_SECONDS: Final = 2.0
"""Until a failed download is tried again; Psyche's pauses grow, and it never gives up."""

_ANY_SIZE: Final = 1 << 40
"""It downloads whatever is announced."""

_ROUNDS: Final = frozenset({RunState.ROUND_TRAIN, RunState.ROUND_WITNESS})
_RESTING: Final = frozenset({RunState.WARMUP, RunState.WAITING_FOR_MEMBERS, RunState.PAUSED})

_MOVES: Final = {
    (RunState.WARMUP, RunState.ROUND_TRAIN),
    (RunState.ROUND_TRAIN, RunState.ROUND_WITNESS),
    (RunState.ROUND_WITNESS, RunState.ROUND_TRAIN),
    (RunState.ROUND_WITNESS, RunState.COOLDOWN),
}
"""Steps of its machine. Between epochs it rests in warm-up, whatever the run calls it."""


class PsycheTwin:
    """See the module. Arguments and inputs are those of :class:`~distro_optim.strategy.rounds.rounds.Rounds`.

    Attributes:
        stage: what we are to the run.
        fault: never set: it does not find out.
        dropped: messages that Psyche's client calls invalid or ignores, by the reason that ours would give.
        address: where its blobs are.
        audits, audit_limits, audits_nothing: none: it audits nobody.
        watches: never: it takes part.
    """

    def __init__(
        self, *, identity: NodeIdentity, key: SecretKey, address: EndpointAddr, draw: Callable[[int], bytes]
    ) -> None:
        self.stage = Stage.OUTSIDE
        self.fault: act.Desynced | None = None
        self.dropped: Counter[DropReason] = Counter()
        self.address = address
        self.audits: dict[bytes, AuditCount] = {}
        self.audit_limits: Limits | None = None
        self.audits_nothing = False
        self.watches = False
        self._me = identity
        self._draw = draw
        self._voice = Voice(key, draw)
        self._actions: list[Action] = []
        self._state: Coordinator | None = None
        self._lookup: dict[bytes, NodeIdentity] = {}
        self._allowed: frozenset[bytes] = frozenset()
        self._plan: TilePlan | None = None
        self._active = RunState.WARMUP
        self._current, self._previous = TwinRound(), TwinRound()
        self._said_ready = self._reported_ready = False
        self._training: tuple[int, BatchId] | None = None
        self._nonce = 0
        self._look_at: float | None = None

    def _take(self) -> list[Action]:
        actions, self._actions = self._actions, []
        return actions

    # -- inputs: the coordinator ---------------------------------------------------------------------------------------

    def coordinator_state(self, state: Coordinator, now: float) -> list[Action]:
        """The coordinator tells its state; one that equals the last is ignored."""
        if self.stage is Stage.ENDED or state == self._state:
            return self._take()
        before, self._state = self._state, state
        if self._look_at is None:
            self._voice.begin(now)
            self._look_at = now
        clients = [client.id for client in state.epoch_state.clients]
        if state.run_state is RunState.WARMUP:
            self._lookup = {client.p2p_identity: client for client in clients}
        allowed = frozenset(client.p2p_identity for client in clients) - {self._me.p2p_identity}
        if allowed != self._allowed:
            self._allowed = allowed
            self._actions.append(act.AllowPeers(allowed))
        if state.run_state is RunState.ROUND_TRAIN and (before is None or before.run_state is not state.run_state):
            oldest = max(0, state.progress.step - 2)
            self._voice.forget_before(oldest)
            self._actions.append(act.Forget(oldest))
        if self.stage is Stage.OUTSIDE:
            if state.run_state is RunState.WARMUP and self._me in clients:
                self.stage = Stage.LOADING
                others = tuple(client.p2p_identity for client in clients if client != self._me)
                shared = type(state.model.checkpoint).__name__.startswith("P2P")
                self._actions.append(
                    act.Initialize(
                        epoch=state.progress.epoch,
                        step=state.progress.step,
                        checkpoint=state.model.checkpoint,
                        providers=others if shared else (),
                    )
                )
        elif self.stage is Stage.RUNNING:
            self._follow(state, now)
        return self._take()

    def _follow(self, state: Coordinator, now: float) -> None:
        clients = [client.id for client in state.epoch_state.clients]
        if self._me not in clients:
            self._stop_training()
            self._rest()
            return
        active, reached = self._active, state.run_state
        if (active is RunState.WARMUP and reached in _RESTING) or active is reached:
            return
        if active is RunState.COOLDOWN and reached in _RESTING:
            self._rest()
            return
        if (active, reached) not in _MOVES:
            self.stage = Stage.ENDED
            error = f"Desync: we're in step {active.value} but next RunState is {reached.value}"
            self._actions.append(act.RunEnded(step=state.progress.step, error=error))
            return
        self._active = reached
        if reached is RunState.ROUND_TRAIN:
            self._said_ready = self._reported_ready = False
            self._train(state)
        elif reached is RunState.ROUND_WITNESS:
            self._stop_training()
            self._send_witness()
        else:
            self._actions.append(act.FinishEpoch(state.progress.step - 1))

    def _rest(self) -> None:
        """Every way into warm-up."""
        self._active = RunState.WARMUP
        self._current, self._previous = TwinRound(), TwinRound()

    # -- inputs: the trainer -------------------------------------------------------------------------------------------

    def initialized(self, plan: TilePlan, names: Sequence[str], now: float) -> list[Action]:
        """The model is loaded."""
        if self.stage is Stage.LOADING and self._state is not None:
            self.stage, self._plan = Stage.RUNNING, plan
            self._follow(self._state, now)
        return self._take()

    def initialization_failed(self, reason: str, now: float) -> list[Action]:
        """It could not be loaded, which is fatal."""
        self.stage = Stage.ENDED
        self._actions.append(act.RunEnded(step=0, error=reason))
        return self._take()

    def trained(self, step: int, update: CompressedUpdate, own: object, now: float) -> list[Action]:
        """A batch is trained: it is announced at once, and taken like anybody else's."""
        self._nonce += 1
        if self._training is not None and self._training[0] == step:
            (_, batch), self._training = self._training, None
            current = self._current
            data, data_hash = encode_any_result(update, step=step, trainer_nonce=self._nonce - 1, batch=batch)
            ticket = BlobTicket.raw(self.address, blake3(data).digest())
            self._actions.append(act.StoreBlob(data=data, tag=f"distro-result_{step}"))
            commitment = self._say(step, current.proof, data_hash, TrainingResult(batch, ticket))
            current.results.setdefault(batch, []).append(Announced(self._me, commitment, ticket))
            current.broadcasts.append(data_hash)
            current.own = own
            self._keep(current, ticket.hash, data)
            current.trained = True
        return self._take()

    def encoding(self) -> None:
        """Nothing is computed in advance."""

    def publish(self, now: float, encoded: object = None) -> list[Action]:
        """Never asked for."""
        return self._take()

    def cancelled(self, step: int, now: float) -> list[Action]:
        """A training was stopped."""
        self._nonce += 1
        return self._take()

    def weights_hashed(self, step: int, digests: Sequence[bytes], now: float) -> list[Action]:
        """Never asked for."""
        return self._take()

    # -- inputs: the peers and the clock -------------------------------------------------------------------------------

    def receive(self, announcement: Announcement, now: float) -> list[Action]:
        """A peer announces something."""
        try:
            self._hear(announcement)
        except NotTaken as refusal:
            self.dropped[refusal.reason] += 1
        return self._take()

    def receive_weights(self, announcement: Announcement, now: float) -> list[Action]:
        """It does not listen there."""
        return self._take()

    def fetched(self, blob: bytes, data: bytes, now: float) -> list[Action]:
        """A download is here."""
        for round_ in (self._current, self._previous):
            if round_.of_blob(blob) is not None:
                self._keep(round_, blob, data)
                break
        return self._take()

    def fetch_failed(self, blob: bytes, now: float, *, is_slow: bool = False) -> list[Action]:
        """A download came to nothing; it is tried again for as long as its round is kept."""
        for round_ in (self._current, self._previous):
            if (found := round_.of_blob(blob)) is not None:
                found[1].retry_at = now + RETRY_SECONDS
        return self._take()

    def tick(self, now: float) -> list[Action]:
        """Time passes: half-second looks, repetitions, downloads."""
        if self._look_at is not None and now >= self._look_at:
            self._look_at = now + POLL_SECONDS
            if self.stage is Stage.RUNNING and self._state is not None:
                self._look(self._state)
        self._actions += self._voice.repeat(now)
        for round_ in (self._current, self._previous):
            for announced in round_.results.values():
                for one in announced:
                    if one.retry_at is not None and now >= one.retry_at:
                        one.retry_at = None
                        self._fetch(round_, one)
        return self._take()

    def next_timer(self) -> float | None:
        """When :meth:`tick` has something to do."""
        times = [self._look_at, self._voice.repeats_at]
        for round_ in (self._current, self._previous):
            times += [one.retry_at for announced in round_.results.values() for one in announced]
        return min((time for time in times if time is not None), default=None)

    # -- a round -------------------------------------------------------------------------------------------------------

    def _train(self, state: Coordinator) -> None:
        """``TrainingStepMetadata::start``."""
        self._apply(state)
        checks = self._current.unseen(state)
        if checks:
            self._actions.append(act.SendHealthChecks(tuple(checks)))
        self._previous, self._current = self._current, TwinRound.begin(state, self._me, self._draw)
        batch = self._current.batch_of(self._me)
        if batch is None:
            self._current.trained = True
            return
        bounds = cold_start_bounds(state)
        step = state.progress.step
        self._training = step, batch
        self._actions.append(
            act.TrainBatch(
                step=step,
                batch=batch,
                lr=effective_learning_rate(state, step),
                previous_lr=effective_learning_rate(state, max(0, step - 1)),
                bounds=bounds,
                zero_optim=bounds is not None and self._current.height == 0,
                own_previous=self._previous.own,
            )
        )

    def _apply(self, state: Coordinator) -> None:
        """Results of two rounds before, with the present learning rate; none in the first two rounds of an epoch."""
        if self._current.height == 0:
            return
        try:
            updates = self._previous.updates_that_count(state)
        except UnknownCommitmentError as error:
            self.stage = Stage.ENDED
            self._actions.append(act.RunEnded(step=state.progress.step, error=str(error)))
            return
        step = state.progress.step
        self._actions.append(
            act.ApplyResults(
                step=step,
                lr=effective_learning_rate(state, step),
                bounds=cold_start_bounds(state),
                updates=updates,
            )
        )

    def _stop_training(self) -> None:
        if self._training is not None:
            (step, _), self._training = self._training, None
            self._actions.append(act.CancelTraining(step))

    def _look(self, state: Coordinator) -> None:
        """``try_send_opportunistic_witness``."""
        current, previous = self._current, self._previous
        clients = {client.id for client in state.epoch_state.clients}
        if current.selection is None:
            if state.run_state is RunState.WARMUP and self._me in clients:
                self._look_in_warm_up(state)
            return
        if self._active is not RunState.ROUND_TRAIN or not current.trained or not previous.is_complete:
            return
        if not current.sent_finished:
            current.sent_finished = True
            root = previous.root
            data_hash = finished_hash(root)
            self._say(current.step, current.proof, data_hash, Finished(MerkleRoot(root), warmup=False))
            current.finished.add(self._me)
            current.broadcasts.append(data_hash)
        elif current.finished.issuperset(clients):
            self._send_witness()

    def _look_in_warm_up(self, state: Coordinator) -> None:
        clients = [client.id for client in state.epoch_state.clients]
        current = self._current
        if not self._said_ready:
            self._said_ready = True
            data_hash = finished_hash(EMPTY_ROOT)
            self._say(0, NOBODY, data_hash, Finished(MerkleRoot(EMPTY_ROOT), warmup=True))
            current.finished.add(self._me)
            current.broadcasts.append(data_hash)
        elif not self._reported_ready and current.finished.issuperset(clients):
            self._reported_ready = True
            index = clients.index(self._me)
            root = MerkleRoot(merkle_root(current.broadcasts))
            proof = WitnessProof(position=index, index=index, witness=False)
            self._actions.append(act.SendWarmupWitness(replace(Witness(proof), broadcast_merkle=root)))

    def _send_witness(self) -> None:
        current, previous = self._current, self._previous
        proof = current.witness
        if previous.sent_witness or proof is None or not proof.witness:
            return
        previous.sent_witness = True
        self._actions.append(act.SendWitness(step=current.step, witness=previous.report(proof)))

    # -- messages ------------------------------------------------------------------------------------------------------

    def _hear(self, announcement: Announcement) -> None:
        if self.stage is not Stage.RUNNING or self._state is None:
            raise NotTaken(DropReason.NOT_RUNNING)
        rounds = (self._current, self._previous)
        round_, announced = take(announcement, state=self._state, lookup=self._lookup, rounds=rounds)
        if announced is not None:
            self._fetch(round_, announced)

    def _fetch(self, round_: TwinRound, announced: Announced) -> None:
        self._actions.append(
            act.FetchBlob(
                ticket=announced.ticket,
                providers=tuple(sorted(self._allowed)),
                max_size=_ANY_SIZE,
                tag=f"downloaded-distro-result-{announced.sender}_{round_.step}",
            )
        )

    def _keep(self, round_: TwinRound, blob: bytes, data: bytes) -> None:
        if self._plan is not None:
            round_.keep(blob, data, self._plan)

    def _say(self, step: int, proof: CommitteeProof, data_hash: bytes, data: BroadcastType) -> Commitment:
        """Announces something for the first time."""
        commitment, announce = self._voice.say(step, proof, data_hash, data)
        self._actions.append(announce)
        return commitment
