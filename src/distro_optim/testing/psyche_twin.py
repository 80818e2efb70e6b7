"""A client of Psyche's as far as its peers and its coordinator can tell, without I/O, for tests of mixed runs.

:class:`PsycheTwin` takes the inputs of :class:`~distro_optim.strategy.rounds.rounds.Rounds` and gives the same actions,
so whatever drives the one drives the other. What it decides follows PsycheFoundation/psyche,
``shared/client/src/{client,state/steps,state/train,state/witness}.rs``, quirks included:

==========================  ========================================================================================
senders                     it knows those of the last warm-up that it saw, and hears nothing before it is initialised
rounds                      messages about the current round and the one before; nothing is kept for the next
consensus                   candidates in order of arrival; of equals the last
results                     any numbers, infinities and NaN included; only the commitment is compared
"finished"                  once, when it has trained and has every result of the round before; until then it waits
repetition                  one message every 10 s, in turn, each time with another nonce
health check                about every client that the witnesses did not see, itself included
dropped                     it waits without another ``Join``
end of the run              an error, since "finished" follows no step of its machine
==========================  ========================================================================================
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import torch
from blake3 import blake3

from ..comm import postcard
from ..comm.addresses import EndpointAddr
from ..comm.announcements import Announcement
from ..comm.signing import SecretKey, is_signed_by
from ..comm.tickets import BlobTicket
from ..compress import CompressedUpdate, TilePlan
from ..compress.wire import decode_download
from ..coordinator.rules.assignment import assign_data
from ..coordinator.rules.committee import CommitteeSelection
from ..coordinator.rules.consensus import is_healthy, select_commitment, witness_quorum
from ..coordinator.rules.schedule import cold_start_bounds, effective_learning_rate
from ..coordinator.types import (
    BatchId,
    Committee,
    CommitteeProof,
    Coordinator,
    MerkleRoot,
    NodeIdentity,
    RunState,
    Witness,
    WitnessBloom,
    WitnessProof,
)
from ..errors import CoordinatorError, ProtocolError
from ..strategy.rounds import actions as act
from ..strategy.rounds.actions import Action, DropReason
from ..strategy.rounds.broadcasts import Broadcast, BroadcastType, Finished, TrainingResult
from ..strategy.rounds.phases import Stage
from ..strategy.rounds.results import commitment_hash, encode_any_result
from ..strategy.rounds.round_state import BLOOM_ENTROPY
from ..verify.bloom import BloomFilter
from ..verify.commitment import Commitment, finished_hash
from ..verify.merkle import EMPTY_ROOT, merkle_root

__all__ = ["REBROADCAST_SECONDS", "PsycheTwin", "with_wild_values"]

REBROADCAST_SECONDS: Final = 10.0
"""``REBROADCAST_SHAREABLE``."""

POLL_SECONDS: Final = 0.5
"""``OPPROTUNISTIC_WITNESS_INTERVAL``: how often it looks whether it has something to say."""

RETRY_SECONDS: Final = 2.0
"""Until a failed download is tried again; Psyche's pauses grow, and it never gives up."""

_ANY_SIZE: Final = 1 << 40
"""It downloads whatever is announced."""

_NOBODY: Final = CommitteeProof(Committee.TIE_BREAKER, 0, 0)
_ROUNDS: Final = frozenset({RunState.ROUND_TRAIN, RunState.ROUND_WITNESS})
_RESTING: Final = frozenset({RunState.WARMUP, RunState.WAITING_FOR_MEMBERS, RunState.PAUSED})

_MOVES: Final = {
    (RunState.WARMUP, RunState.ROUND_TRAIN),
    (RunState.ROUND_TRAIN, RunState.ROUND_WITNESS),
    (RunState.ROUND_WITNESS, RunState.ROUND_TRAIN),
    (RunState.ROUND_WITNESS, RunState.COOLDOWN),
}
"""Steps of its machine. Between epochs it rests in warm-up, whatever the run calls it."""


def with_wild_values(update: CompressedUpdate, *, tensor: int = 0) -> CompressedUpdate:
    """``update`` as a client of Psyche's sends it whose momentum began with uninitialised memory.

    Args:
        update: of values, not of signs.
        tensor: the one that consists of NaN, after an infinity of each sign.
    """
    value = [values.clone() for values in update.value]
    home = update.plan.home[tensor]
    if home is not None:
        start, stop = update.plan.batches[home].ranges[tensor]
        rows = value[home][start:stop].view(-1)
        rows.fill_(torch.nan)
        rows[:2] = torch.tensor([torch.inf, -torch.inf], dtype=rows.dtype)[: len(rows)]
    return CompressedUpdate(update.plan, update.index, tuple(value), update.present)


@dataclass
class _Announced:
    """A result that was announced; ``update`` is there once it was downloaded and kept its commitment."""

    sender: NodeIdentity
    commitment: Commitment
    ticket: BlobTicket
    update: CompressedUpdate | None = None
    nonce: int = 0
    retry_at: float | None = None


@dataclass
class _Round:
    """``RoundState``; a default one has neither roles nor filters."""

    height: int = 0
    step: int = 0
    selection: CommitteeSelection | None = None
    proof: CommitteeProof = _NOBODY
    witness: WitnessProof | None = None
    assignments: dict[BatchId, NodeIdentity] = field(default_factory=dict)
    missing: set[BatchId] = field(default_factory=set)
    filters: tuple[BloomFilter, BloomFilter] | None = None
    results: dict[BatchId, list[_Announced]] = field(default_factory=dict)
    finished: set[NodeIdentity] = field(default_factory=set)
    broadcasts: list[bytes] = field(default_factory=list)
    own: object = None
    trained: bool = False
    sent_finished: bool = False
    sent_witness: bool = False

    def of_blob(self, blob: bytes) -> tuple[BatchId, _Announced] | None:
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


class PsycheTwin:
    """See the module. Arguments and inputs are those of :class:`~distro_optim.strategy.rounds.rounds.Rounds`.

    Attributes:
        stage: what we are to the run.
        fault: never set: it does not find out.
        dropped: messages that Psyche's client calls invalid or ignores, by the reason that ours would give.
        address: where its blobs are.
    """

    def __init__(
        self, *, identity: NodeIdentity, key: SecretKey, address: EndpointAddr, draw: Callable[[int], bytes]
    ) -> None:
        self.stage = Stage.OUTSIDE
        self.fault: act.Desynced | None = None
        self.dropped: Counter[DropReason] = Counter()
        self.address = address
        self._me = identity
        self._key = key
        self._draw = draw
        self._actions: list[Action] = []
        self._state: Coordinator | None = None
        self._lookup: dict[bytes, NodeIdentity] = {}
        self._allowed: frozenset[bytes] = frozenset()
        self._plan: TilePlan | None = None
        self._active = RunState.WARMUP
        self._current, self._previous = _Round(), _Round()
        self._said_ready = self._reported_ready = False
        self._training: tuple[int, BatchId] | None = None
        self._nonce = 0
        self._said: list[Broadcast] = []
        self._turn = 0
        self._repeat_at: float | None = None
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
        if self._repeat_at is None:
            self._repeat_at, self._look_at = now + REBROADCAST_SECONDS, now
        clients = [client.id for client in state.epoch_state.clients]
        if state.run_state is RunState.WARMUP:
            self._lookup = {client.p2p_identity: client for client in clients}
        allowed = frozenset(client.p2p_identity for client in clients) - {self._me.p2p_identity}
        if allowed != self._allowed:
            self._allowed = allowed
            self._actions.append(act.AllowPeers(allowed))
        if state.run_state is RunState.ROUND_TRAIN and (before is None or before.run_state is not state.run_state):
            oldest = max(0, state.progress.step - 2)
            self._said = [said for said in self._said if said.step >= oldest]
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
        self._current, self._previous = _Round(), _Round()

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
            current.results.setdefault(batch, []).append(_Announced(self._me, commitment, ticket))
            current.broadcasts.append(data_hash)
            current.own = own
            self._apply_result(current, ticket.hash, data)
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
        reason = self._refusal(announcement)
        if reason is not None:
            self.dropped[reason] += 1
        return self._take()

    def receive_weights(self, announcement: Announcement, now: float) -> list[Action]:
        """It does not listen there."""
        return self._take()

    def fetched(self, blob: bytes, data: bytes, now: float) -> list[Action]:
        """A download is here."""
        for round_ in (self._current, self._previous):
            if round_.of_blob(blob) is not None:
                self._apply_result(round_, blob, data)
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
        if self._repeat_at is not None and now >= self._repeat_at:
            self._repeat_at = now + REBROADCAST_SECONDS
            if self._said:
                self._turn = (self._turn + 1) % len(self._said)
                said = self._said[self._turn]
                said = self._said[self._turn] = replace(said, nonce=(said.nonce + 1) & 0xFFFF_FFFF)
                self._actions.append(act.Announce(postcard.encode(said)))
        for round_ in (self._current, self._previous):
            for announced in round_.results.values():
                for one in announced:
                    if one.retry_at is not None and now >= one.retry_at:
                        one.retry_at = None
                        self._fetch(round_, one)
        return self._take()

    def next_timer(self) -> float | None:
        """When :meth:`tick` has something to do."""
        times = [self._look_at, self._repeat_at]
        for round_ in (self._current, self._previous):
            times += [one.retry_at for announced in round_.results.values() for one in announced]
        return min((time for time in times if time is not None), default=None)

    # -- a round -------------------------------------------------------------------------------------------------------

    def _train(self, state: Coordinator) -> None:
        """``TrainingStepMetadata::start``."""
        self._apply(state)
        self._check_health(state)
        clients = [client.id for client in state.epoch_state.clients]
        round_ = state.current_round
        selection = CommitteeSelection.for_round(state, round_)
        index = clients.index(self._me)
        has_training = not state.epoch_state.last_step
        assignments = assign_data(state, selection) if has_training else {}
        self._previous = self._current
        self._current = _Round(
            height=round_.height,
            step=state.progress.step,
            selection=selection,
            proof=selection.get_committee(index),
            witness=selection.get_witness(index),
            assignments=assignments,
            missing=set(assignments),
            filters=(
                BloomFilter.from_entropy(self._draw(BLOOM_ENTROPY)),
                BloomFilter.from_entropy(self._draw(BLOOM_ENTROPY)),
            ),
        )
        batch = next((batch for batch, owner in assignments.items() if owner == self._me), None)
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
                zero_optim=bounds is not None and round_.height == 0,
                own_previous=self._previous.own,
            )
        )

    def _apply(self, state: Coordinator) -> None:
        """Results of two rounds before, with the present learning rate; none in the first two rounds of an epoch."""
        if self._current.height == 0:
            return
        before = state.previous_round
        witnesses = before.witnesses if before is not None else ()
        quorum = witness_quorum(state.config.witness_nodes, len(witnesses))
        updates = []
        for batch in sorted(self._previous.assignments):
            candidates = self._previous.results.get(batch, [])
            picked = select_commitment([one.commitment for one in candidates], witnesses, quorum)
            if picked is None:
                continue
            update = candidates[picked].update
            if update is None:
                self.stage = Stage.ENDED
                error = "UnknownCommitment: a result that counts is not here"
                self._actions.append(act.RunEnded(step=state.progress.step, error=error))
                return
            updates.append(update)
        step = state.progress.step
        self._actions.append(
            act.ApplyResults(
                step=step,
                lr=effective_learning_rate(state, step),
                bounds=cold_start_bounds(state),
                updates=tuple(updates),
            )
        )

    def _check_health(self, state: Coordinator) -> None:
        """Whoever the witnesses of the round that is over did not see, itself included."""
        finished = self._current
        selection, witness = finished.selection, finished.witness
        if selection is None or witness is None or not witness.witness or finished.height < 1:
            return
        if state.epoch_state.first_round:
            return
        checks = []
        for index, client in enumerate(state.epoch_state.clients):
            try:
                proof = selection.get_committee(index)
                healthy = is_healthy(state, client.id, proof)
            except CoordinatorError:
                healthy = False
            if not healthy:
                checks.append((client.id, proof))
        if checks:
            self._actions.append(act.SendHealthChecks(tuple(checks)))

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
            root = merkle_root(previous.broadcasts) if previous.broadcasts else EMPTY_ROOT
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
            self._say(0, _NOBODY, data_hash, Finished(MerkleRoot(EMPTY_ROOT), warmup=True))
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
        took_part, seen = previous.filters or (None, None)
        root = merkle_root(previous.broadcasts) if previous.broadcasts else EMPTY_ROOT
        report = Witness(proof, _bloom(took_part), _bloom(seen), MerkleRoot(root))
        self._actions.append(act.SendWitness(step=current.step, witness=report))

    # -- messages ------------------------------------------------------------------------------------------------------

    def _refusal(self, announcement: Announcement) -> DropReason | None:
        """``apply_message``, and what its caller checks; None if the message was applied."""
        state = self._state
        if self.stage is not Stage.RUNNING or state is None:
            return DropReason.NOT_RUNNING
        try:
            broadcast: Broadcast = postcard.decode(Broadcast, announcement.data)
        except ProtocolError:
            return DropReason.MALFORMED
        sender = self._lookup.get(announcement.sender)
        commitment, data = broadcast.commitment, broadcast.data
        if sender is None:
            return DropReason.UNKNOWN_SENDER
        if not is_signed_by(announcement.sender, commitment.data_hash, commitment.signature):
            return DropReason.BAD_SIGNATURE
        rounds = [each for each in (self._current, self._previous) if each.step == broadcast.step]
        if not rounds:
            return DropReason.WRONG_STEP
        round_ = rounds[0]
        clients = [client.id for client in state.epoch_state.clients]
        if isinstance(data, Finished) and data.warmup:
            if sender not in clients:
                return DropReason.UNKNOWN_SENDER
        elif round_.selection is None:
            return DropReason.NOT_RUNNING
        elif (
            not round_.selection.verify_committee(sender, broadcast.proof, state.epoch_state.clients)
            or broadcast.proof.committee is not Committee.TRAINER
        ):
            return DropReason.WRONG_PROOF
        refusal = self._take_data(round_, sender, commitment, data)
        if refusal is None:
            round_.broadcasts.append(commitment.data_hash)
        return refusal

    def _take_data(
        self, round_: _Round, sender: NodeIdentity, commitment: Commitment, data: BroadcastType
    ) -> DropReason | None:
        match data:
            case TrainingResult(batch, ticket):
                if round_.of_blob(ticket.hash) is not None:
                    return DropReason.DUPLICATE
                if round_.assignments.get(batch) != sender:
                    return DropReason.NOT_ASSIGNED
                announced = _Announced(sender, commitment, ticket)
                round_.results.setdefault(batch, []).append(announced)
                self._fetch(round_, announced)
            case Finished():
                if sender in round_.finished:
                    return DropReason.DUPLICATE
                round_.finished.add(sender)
        return None

    def _fetch(self, round_: _Round, announced: _Announced) -> None:
        self._actions.append(
            act.FetchBlob(
                ticket=announced.ticket,
                providers=tuple(sorted(self._allowed)),
                max_size=_ANY_SIZE,
                tag=f"downloaded-distro-result-{announced.sender}_{round_.step}",
            )
        )

    def _apply_result(self, round_: _Round, blob: bytes, data: bytes) -> None:
        """``apply_distro_result``: the commitment is compared, and nothing else."""
        found = round_.of_blob(blob)
        if found is None or self._plan is None:
            return
        batch, announced = found
        result = decode_download(data, max_results=max(1, len(self._plan)))
        if announced.update is not None or commitment_hash(result) != announced.commitment.data_hash:
            return
        if round_.missing and round_.filters is not None:
            took_part, seen = round_.filters
            took_part.add(hashlib.sha256(announced.sender.signer).digest())
            if batch in round_.missing:
                seen.add(announced.commitment.data_hash)
            round_.missing.discard(batch)
        announced.update = result.to_update(self._plan, finite=False)
        announced.nonce = result.trainer_nonce

    def _say(self, step: int, proof: CommitteeProof, data_hash: bytes, data: BroadcastType) -> Commitment:
        """Announces something for the first time, and keeps it to be repeated."""
        commitment = Commitment(data_hash, self._key.sign(data_hash))
        nonce = int.from_bytes(self._draw(4), "little")
        broadcast = Broadcast(step, proof, commitment, nonce, data)
        self._said.append(broadcast)
        self._actions.append(act.Announce(postcard.encode(broadcast)))
        return commitment


def _bloom(bloom: BloomFilter | None) -> WitnessBloom:
    return WitnessBloom() if bloom is None else WitnessBloom(bloom.keys, bloom.words)
