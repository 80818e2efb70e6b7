"""What happens inside a round: apply, train, announce, fetch, finish, witness. No I/O.

:class:`RoundPipeline` knows three rounds: the one under way, in which results are made; the one before, whose results
are on their way; and the one before that, whose results are due. :class:`~.rounds.Rounds`, which follows the
coordinator from phase to phase, shifts them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from blake3 import blake3

from ...comm import postcard
from ...comm.addresses import EndpointAddr
from ...comm.signing import SecretKey
from ...comm.tickets import BlobTicket
from ...compress import CompressedUpdate, TilePlan
from ...coordinator.rules.schedule import cold_start_bounds, effective_learning_rate
from ...coordinator.rules.steps import is_prompt
from ...coordinator.types import ClientState, CommitteeProof, Coordinator, MerkleRoot, NodeIdentity, RunState
from ...errors import ConfigurationError, InvalidResultError, ProtocolError
from ...verify.commitment import Commitment, finished_hash
from ...verify.merkle import EMPTY_ROOT, merkle_root
from . import actions as act
from .actions import Action, Dropped, DropReason
from .admission import NotAdmitted, check_broadcast
from .applying import DueResults
from .broadcasts import Broadcast, BroadcastType, Finished, TrainingResult
from .repeats import Repeats
from .results import EncodedResult, encode_own_result, max_result_size, read_result
from .round_state import MAX_CLAIMS, Claim, ClaimState, RoundState
from .waiting import is_awaited, unheard_seconds
from .weights import WeightsWatch
from .witness_reports import witness_report

__all__ = ["MAX_EARLY_PER_SENDER", "RoundPipeline"]

RETRY_SECONDS: Final = 2.0
"""Before a failed download is tried again (``shared/network/src/download/scheduler.rs``); doubles each time ..."""

MAX_RETRY_SECONDS: Final = 8.0
"""... up to this. Results are wanted for two rounds, so nobody gives up earlier. Chosen arbitrarily."""

MAX_EARLY_PER_SENDER: Final = 4
"""Messages held that are about the next round, of which the coordinator has not told us yet. A result and a
"finished" are honest; chosen arbitrarily above."""

MAX_HOLD_SECONDS: Final = 0.5
"""A result goes out when the round is over, so that it is not on the line before the reports that end the round; it is
wanted only in the round after the next. Where others still train, it does not wait longer than this. Chosen
arbitrarily above a round trip."""

_U32: Final = 0xFFFF_FFFF
_NONCE_BYTES: Final = 4
_S = RunState


@dataclass
class _Unpublished:
    """A result that was trained and has not gone out yet.

    Attributes:
        own: what the trainer wants back with the next round.
        nonce: how often we had trained before.
        encoded: what :meth:`RoundPipeline.encoding` gave, if that has come.
        held_until: when it goes out even if its round is not over; None while it is being encoded.
    """

    round: RoundState
    update: CompressedUpdate
    own: object
    nonce: int
    encoded: EncodedResult | None = None
    held_until: float | None = None


class RoundPipeline:
    """See the module; the arguments are those of :class:`~.rounds.Rounds`."""

    def __init__(
        self, *, identity: NodeIdentity, key: SecretKey, address: EndpointAddr, draw: Callable[[int], bytes]
    ) -> None:
        if identity.p2p_identity != key.public or address.id != key.public:
            raise ConfigurationError("identity, key and address must be of one peer", name="key")
        self.address = address
        self.fault: act.Desynced | None = None
        self.dropped: Counter[DropReason] = Counter()
        self._me = identity
        self._key = key
        self._draw = draw
        self._out: list[Action] = []
        self._now = 0.0
        self._state: Coordinator | None = None
        self._plan: TilePlan | None = None
        self._peers: dict[bytes, NodeIdentity] = {}
        self._watch = WeightsWatch(key.public)
        self._repeats = Repeats()
        # The round under way, the one before, and the results of the one before that while they are not applied.
        self._current: RoundState | None = None
        self._previous: RoundState | None = None
        self._due: DueResults | None = None
        # Whether the current round's training, if any, has been begun, and so what was due was applied.
        self._prepared = False
        self._early: dict[bytes, list[Broadcast]] = {}
        self._trainer_nonce = 0
        self._unpublished: _Unpublished | None = None

    # -- inputs --------------------------------------------------------------------------------------------------------

    def fetched(self, blob: bytes, data: bytes, now: float) -> list[Action]:
        """A download is here. ``blob`` is the BLAKE3 of ``data``, which was verified on the way."""
        self._now = now
        for round_, claim in self._fetching(blob):
            self._look_at(round_, claim, data)
        self._advance()
        return self._take()

    def fetch_failed(self, blob: bytes, now: float, *, is_slow: bool = False) -> list[Action]:
        """A download came to nothing. It is tried again while its round is of interest.

        Args:
            blob: the hash of what was to be fetched.
            now: monotonic time in seconds.
            is_slow: it was on its way, and the next attempt goes on where this one ended.
        """
        self._now = now
        for _, claim in self._fetching(blob):
            claim.retry_at = now + min(MAX_RETRY_SECONDS, RETRY_SECONDS * 2 ** min(claim.failures, 8))
            claim.failures += not is_slow
        self._advance()
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
        self._publish_pending()
        nonce, round_ = self._trainer_nonce, self._over(step)
        self._advance()
        if round_ is not None and self._in(_S.ROUND_TRAIN):
            self._unpublished = _Unpublished(round_, update, own, nonce)
            self._out.append(act.PublishResult(step))
        return self._take()

    def encoding(self) -> Callable[[], EncodedResult] | None:
        """What :meth:`publish` will have to compute, to be computed in advance, in another thread; None if nothing.

        Raises ProtocolError when it is called and the result is of no use.
        """
        pending, plan = self._unpublished, self._plan
        if pending is None or plan is None:
            return None
        step, batch = pending.round.step, pending.round.batch_of(self._me)
        if batch is None:
            return None
        return partial(
            encode_own_result, pending.update, step=step, trainer_nonce=pending.nonce, batch=batch, plan=plan
        )

    def publish(self, now: float, encoded: EncodedResult | None = None) -> list[Action]:
        """Answer to :class:`~.actions.PublishResult`.

        In a run whose rounds end with their last report, the result is held until the coordinator says that the round
        is over, or :data:`MAX_HOLD_SECONDS`. If it is over already, it goes out at once.

        Args:
            now: monotonic time in seconds.
            encoded: what :meth:`encoding` gave, if it was computed in advance.
        """
        self._now = now
        state, pending = self._state, self._unpublished
        if (
            state is not None
            and pending is not None
            and is_prompt(state)
            and self._in(_S.ROUND_TRAIN)
            and pending.round is self._current
        ):
            pending.encoded, pending.held_until = encoded, now + MAX_HOLD_SECONDS
        else:
            self._publish_pending(encoded)
            self._advance()
        return self._take()

    def cancelled(self, step: int, now: float) -> list[Action]:
        """The training of ``step`` was stopped before it came to a result."""
        self._now = now
        self._over(step)
        self._advance()
        return self._take()

    # -- one round -----------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Does what has become possible."""
        current = self._current
        if current is None:
            return
        if not self._prepared:
            self._prepare(current, too_late=False)
        if not current.training_over or not self._in(_S.ROUND_TRAIN):
            return
        if current.ready_at is None:
            current.ready_at = self._now
        if self._is_previous_awaited(current):
            return
        if not current.sent_finished:
            previous = self._previous
            current.sent_finished = True
            root = merkle_root(previous.broadcasts) if previous is not None else EMPTY_ROOT
            data_hash = finished_hash(root)
            current.finished.add(self._me)
            current.broadcasts.append(data_hash)
            self._say(current.step, current.committee_proof, data_hash, Finished(MerkleRoot(root), warmup=False))
        # Where everybody witnesses, the reports themselves say who has finished: waiting for the others' word would
        # only make each round longer by a message.
        if current.everybody_witnesses or current.finished.issuperset(self._present(current.clients)):
            self._witness()

    def _present(self, clients: Iterable[NodeIdentity]) -> set[NodeIdentity]:
        """Those of ``clients`` that have not left, or been dropped, in the meantime."""
        assert self._state is not None
        healthy = {c.id for c in self._state.epoch_state.clients if c.state is ClientState.HEALTHY}
        return healthy.intersection(clients)

    def _is_previous_awaited(self, current: RoundState) -> bool:
        previous, unheard_until = self._previous, self._unheard_until(current)
        if previous is None or unheard_until is None:
            return False
        if self._unpublished is not None and self._unpublished.round is previous:
            return True  # ours is being encoded
        owners = self._present(previous.assignments.values()) - {self._me}
        return is_awaited(previous, owners, unheard_until, self._now)

    def _looks_again_at(self) -> float | None:
        """When what is awaited will have been awaited long enough."""
        current = self._current
        due = self._unheard_until(current) if current is not None and not current.sent_finished else None
        return due if due is not None and self._now < due else None

    def _unheard_until(self, current: RoundState) -> float | None:
        if current.ready_at is None or self._state is None:
            return None
        return current.ready_at + unheard_seconds(self._state.config.max_round_train_time)

    def _prepare(self, current: RoundState, *, too_late: bool) -> None:
        """Applies what is due, then trains, unless something has yet to come. ``too_late``: it comes no more."""
        if self._due is not None:
            choice = self._due.choose()
            if choice.waiting and not too_late:
                for claim in choice.wanted:
                    claim.state = ClaimState.FETCHING
                    self._fetch(self._due.round, claim)
                return
            if choice.waiting:
                self._watch.doubt = current.step
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
            self._out.append(
                act.DecayWeights(
                    step=current.step,
                    lr=current.lr,
                    bounds=cold_start_bounds(state),
                    own_previous=self._previous.own if self._previous is not None else None,
                )
            )

    def _train(self, state: Coordinator, current: RoundState) -> None:
        batch = current.batch_of(self._me)
        assert batch is not None
        bounds = cold_start_bounds(state)
        current.training = True
        self._out.append(
            act.TrainBatch(
                step=current.step,
                batch=batch,
                lr=current.lr,
                previous_lr=effective_learning_rate(state, max(0, current.step - 1)),
                bounds=bounds,
                zero_optim=bounds is not None and current.height == 0,
                own_previous=self._previous.own if self._previous is not None else None,
            )
        )

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

    def _publish_before_the_next_round(self) -> None:
        """The coordinator goes on: what was trained in the round that is over goes out now, or as soon as it can."""
        pending, state = self._unpublished, self._state
        if pending is None or state is None:
            return
        is_encoding = pending.held_until is None and pending.round is self._current
        if is_prompt(state) and is_encoding and self.fault is None:
            pending.round.own = pending.own  # it is being encoded, which the next round need not wait for
        else:
            self._publish_pending()

    def _publish_held(self) -> None:
        due = self._held_until()
        if due is not None and due <= self._now:
            self._publish_pending()

    def _held_until(self) -> float | None:
        return self._unpublished.held_until if self._unpublished is not None else None

    def _publish_pending(self, encoded: EncodedResult | None = None) -> None:
        encode = self.encoding()
        pending, self._unpublished = self._unpublished, None
        if pending is None or encode is None or self.fault is not None:
            return
        encoded = encoded if encoded is not None else pending.encoded
        try:
            # What was encoded in advance may be of a round before: then it was published when that round ended.
            if encoded is None or (encoded.step, encoded.result.trainer_nonce) != (pending.round.step, pending.nonce):
                encoded = encode()
            self._publish(pending.round, pending.own, encoded)
        except ProtocolError as error:
            self._drop(self._key.public, DropReason.INVALID_RESULT, str(error))

    def _publish(self, round_: RoundState, own: object, encoded: EncodedResult) -> None:
        batch = round_.batch_of(self._me)
        assert batch is not None
        blob, data_hash = encoded.blob, encoded.data_hash
        round_.own = own
        ticket = BlobTicket.raw(self.address, blake3(blob).digest())
        self._out.append(act.StoreBlob(data=blob, tag=f"distro-result_{round_.step}"))
        commitment = self._say(round_.step, round_.committee_proof, data_hash, TrainingResult(batch, ticket))
        claim = Claim(self._me, batch, commitment, ticket)
        round_.add(claim)
        round_.broadcasts.append(data_hash)
        round_.settle(claim, ClaimState.VALID, encoded.result)

    def _witness(self) -> None:
        current = self._current
        if current is None or current.sent_witness or self._is_run_at_rest(self._previous):
            return
        report = witness_report(current, self._previous)
        if report is not None:
            current.sent_witness = True
            self._out.append(act.SendWitness(step=current.step, witness=report))

    def _is_run_at_rest(self, previous: RoundState | None) -> bool:
        """Whether our weights are wrong and nobody else trains either: steps would go by in which nothing is learned.

        A round on which nobody reports ends the epoch, and in the next warm-up somebody gives weights to all.
        """
        return self.fault is not None and previous is not None and previous.trains and not previous.claims

    # -- messages ------------------------------------------------------------------------------------------------------

    def _take_broadcast(self, sender: NodeIdentity, broadcast: Broadcast) -> None:
        """Raises NotAdmitted if it is not taken."""
        round_ = next((r for r in self._live_rounds() if r.step == broadcast.step), None)
        if round_ is None:
            self._hold(sender, broadcast)
            return
        check_broadcast(broadcast, sender, round_)
        data_hash = broadcast.commitment.data_hash
        match broadcast.data:
            case TrainingResult(batch, ticket):
                claim = Claim(sender, batch, broadcast.commitment, ticket)
                round_.add(claim)
                if claim.state is ClaimState.SPARE:
                    raise NotAdmitted(DropReason.TOO_MANY, f"{MAX_CLAIMS} results for {batch} already")
                round_.broadcasts.append(data_hash)
                self._fetch(round_, claim)
            case Finished():
                round_.broadcasts.append(data_hash)
                round_.finished.add(sender)

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
        ticket, owner = claim.ticket, claim.sender.p2p_identity
        if ticket.addr.id != owner:
            # Honest peers offer what they make themselves. Addresses of somebody else would replace what we know of
            # that peer, or have us call at a stranger's.
            ticket = replace(ticket, addr=EndpointAddr(owner))
        self._out.append(
            act.FetchBlob(
                ticket=ticket,
                providers=tuple(peer for peer in self._peers if peer != self._key.public),
                max_size=max_result_size(self._plan),
                tag=f"downloaded-distro-result-{claim.sender}_{round_.step}",
            )
        )

    def _look_at(self, round_: RoundState, claim: Claim, data: bytes) -> None:
        """The data of ``claim`` are here."""
        assert self._plan is not None
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

    def _fetching(self, blob: bytes) -> list[tuple[RoundState, Claim]]:
        """Announcements that wait for ``blob``."""
        return [
            (round_, claim)
            for round_ in self._live_rounds()
            for claim in round_.claims_of_blob(blob)
            if claim.state is ClaimState.FETCHING
        ]

    def _live_rounds(self) -> list[RoundState]:
        """Rounds that messages and downloads can still be about."""
        rounds = [self._current, self._previous, self._due.round if self._due is not None else None]
        return [round_ for round_ in rounds if round_ is not None]

    def _say(self, step: int, proof: CommitteeProof, data_hash: bytes, data: BroadcastType) -> Commitment:
        commitment = Commitment(data_hash, self._key.sign(data_hash))
        broadcast = Broadcast(step, proof, commitment, self._random_nonce(), data)
        self._repeats.add(broadcast, self._now)
        self._out.append(act.Announce(postcard.encode(broadcast)))
        return commitment

    def _random_nonce(self) -> int:
        return int.from_bytes(self._draw(_NONCE_BYTES), "little")

    # -- small things --------------------------------------------------------------------------------------------------

    def _hash_weights(self, state: Coordinator) -> None:
        if self._watch.ask(state.progress.epoch, state.progress.step):
            self._out.append(act.HashWeights(state.progress.step))

    def _in(self, run_state: RunState) -> bool:
        return self._state is not None and self._state.run_state is run_state

    def _drop(self, sender: bytes, reason: DropReason, detail: str = "") -> None:
        self.dropped[reason] += 1
        self._out.append(Dropped(sender=sender, reason=reason, detail=detail))

    def _take(self) -> list[Action]:
        out, self._out = self._out, []
        return out
