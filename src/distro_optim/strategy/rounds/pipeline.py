"""What happens inside a round: apply, train, finish, witness. No I/O.

A :class:`RoundPipeline` holds three rounds: the one under way, in which results are made; the one before, whose results
are on their way; and the one before that, whose results are due. It exists from the first round of an epoch in which we
take part to the last. :class:`~.phases.Phases`, which follows the coordinator from phase to phase, moves it on.
"""

from __future__ import annotations

from collections.abc import Callable

from ...compress import TilePlan
from ...coordinator.rules.checkpoints import is_run_of_psyche
from ...coordinator.rules.schedule import cold_start_bounds, effective_learning_rate
from ...coordinator.types import BatchId, Coordinator, MerkleRoot, NodeIdentity, RunState
from ...verify.commitment import finished_hash
from ...verify.merkle import EMPTY_ROOT, merkle_root
from . import actions as act
from .actions import DropReason, Outbox
from .admission import NotAdmitted, Peers, check_broadcast
from .announcer import Announcer
from .audits.momentum_watch import commits_momentum
from .audits.watch import AuditWatch
from .broadcasts import Broadcast, Finished
from .choose_result import DueResults
from .downloads import Downloads
from .moment import Moment, sooner
from .own_result import OwnResult
from .reading import Reader
from .repair import MAX_FETCH_SECONDS, Repair
from .round_state import MAX_CLAIMS, ClaimState, RoundState
from .waiting import UNHEARD_SHARE, is_awaited, is_missing, unheard_seconds
from .weights import WeightsWatch
from .witness_reports import health_checks, witness_report

__all__ = ["RoundPipeline"]


class RoundPipeline:
    """See the module. It begins with the current round of ``state``.

    Args:
        state: of the coordinator, in a round, with us in its list.
        me: our own identity.
        draw: gives so many random bytes, from a source that peers cannot guess.
        plan: how the model's tensors are tiled.
        peers: have what they announce.
        own_result: what we trained and have not published yet.
        reader: of what peers send.
        announcer: tells the peers when we have finished.
        watch: what is known of our weights.
        repair: whether some of them are to be replaced before we train.
        audits: of results that are about to be applied.
        outbox: where what is to be done goes.

    Attributes:
        current: the round under way.
        plan: as above.

    Raises:
        CoordinatorError: the state contradicts itself.
    """

    def __init__(
        self,
        state: Coordinator,
        *,
        me: NodeIdentity,
        draw: Callable[[int], bytes],
        plan: TilePlan,
        peers: Peers,
        own_result: OwnResult,
        reader: Reader,
        announcer: Announcer,
        watch: WeightsWatch,
        repair: Repair,
        audits: AuditWatch,
        outbox: Outbox,
    ) -> None:
        self.plan = plan
        self._me = me
        self._draw = draw
        self._peers = peers
        self._reader = reader
        self._is_psyches = is_run_of_psyche(state)
        self._downloads = Downloads(plan, peers, reader, outbox, finite=not self._is_psyches)
        self._own_result = own_result
        self._announcer = announcer
        self._watch = watch
        self._repair = repair
        self._audits = audits
        self._outbox = outbox
        self.current = RoundState.begin(state, me, draw)
        self._previous: RoundState | None = None
        # Results of the round before that, while they are not applied.
        self._due: DueResults | None = None
        # How much had come of the round that is due when it was found to lack something.
        self._waited_since: int | None = None
        # Whether what was due was applied, and the current round's training, if any, was begun.
        self._prepared = False
        audits.momenta.begin_rounds(state, plan)

    # -- from round to round -------------------------------------------------------------------------------------------

    def is_followed_by(self, state: Coordinator) -> bool:
        """Whether the round of ``state`` is the one after the current one."""
        current = self.current
        return current.step + 1 == state.progress.step and current.height + 1 == state.current_round.height

    def close_round(self, at: Moment) -> None:
        """The current round is over: what was not done in it will not be done any more."""
        self.stop_training()
        if not self._prepared:
            self._prepare(at, too_late=True)

    def check_health(self, state: Coordinator) -> None:
        """Tells the coordinator which clients did no work, as far as the round says that is over in ``state``."""
        checks = health_checks(state, self.current, self._previous, self._me)
        if checks:
            self._outbox.put(act.SendHealthChecks(checks))

    def begin_next_round(self, state: Coordinator) -> None:
        """The round of ``state`` begins, which follows the current one.

        Raises:
            CoordinatorError: the state contradicts itself.
        """
        before = self._previous
        self._previous, self.current = self.current, RoundState.begin(state, self._me, self._draw)
        self._due = None
        if before is not None and self._watch.fault is None:
            self._due = DueResults.of(state, before, self._reader)
        self._prepared, self._waited_since = False, None
        self._audits.begin_round(state, before)

    @property
    def live_rounds(self) -> list[RoundState]:
        """Rounds that messages and downloads can still be about, the latest first."""
        rounds = [self.current, self._previous, self._due.round if self._due is not None else None]
        return [round_ for round_ in rounds if round_ is not None]

    def _live_round(self, step: int) -> RoundState | None:
        """The one of :attr:`live_rounds` with this step; every message asks for it."""
        current, previous, due = self.current, self._previous, self._due
        if current.step == step:
            return current
        if previous is not None and previous.step == step:
            return previous
        return due.round if due is not None and due.round.step == step else None

    # -- what comes in -------------------------------------------------------------------------------------------------

    def take(self, sender: NodeIdentity, broadcast: Broadcast) -> bool:
        """A peer says something; False if it is about another round than those that are alive.

        Raises:
            NotAdmitted: it does not pass the checks.
        """
        round_ = self._live_round(broadcast.step)
        if round_ is None:
            return False
        if isinstance(broadcast.data, Finished) and not self._waits_for_finished(round_):
            return True  # nothing of it is checked
        claim = check_broadcast(broadcast, sender, round_, self._reader if self._is_psyches else None)
        data_hash = broadcast.commitment.data_hash
        if claim is None:
            round_.broadcasts.append(data_hash)
            round_.note_finished(sender)
            return True
        round_.add(claim)
        if claim.state is ClaimState.SPARE:
            raise NotAdmitted(DropReason.TOO_MANY, f"{MAX_CLAIMS} results for {claim.batch} already")
        round_.broadcasts.append(data_hash)
        self._downloads.begin(round_, claim)
        return True

    def fetched(self, blob: bytes, data: bytes) -> None:
        """A download is here."""
        self._downloads.arrived(self.live_rounds, blob, data)

    def fetch_failed(self, blob: bytes, now: float, *, is_slow: bool) -> None:
        """A download came to nothing."""
        self._downloads.failed(self.live_rounds, blob, now, is_slow=is_slow)

    def retry_downloads(self, now: float) -> None:
        """Tries those again whose time has come."""
        self._downloads.retry(self.live_rounds, now)

    def next_timer(self, at: Moment) -> float | None:
        """When :meth:`retry_downloads` or :meth:`advance` has something to do, in monotonic seconds; None if never."""
        due = self._downloads.next_retry(self.live_rounds) if self._downloads.has_failed else None
        if self.current.ready_at is not None:
            due = sooner(due, self._looks_again_at(at))
        return sooner(due, self._repair.waits_until)

    def end_training(self, step: int, now: float) -> BatchId | None:
        """The trainer has answered: the batch of the current round that it was at work on, if it was."""
        current = self.current
        if current.step != step or current.training is None:
            return None
        batch, current.training, current.training_over = current.training, None, True
        self._announcer.repeats.release(now)
        return batch

    # -- one round -----------------------------------------------------------------------------------------------------

    def advance(self, at: Moment) -> None:
        """Does what has become possible."""
        current, previous = self.current, self._previous
        if not self._prepared:
            self._prepare(at, too_late=False)
        if self._is_psyches:
            self._forget_what_all_have(at)
        if not current.training_over or at.state.run_state is not RunState.ROUND_TRAIN:
            return
        if current.ready_at is None:
            current.ready_at = at.now
        unheard_until = current.ready_at + self._unheard_seconds(at)
        if previous is not None and self._is_awaited(previous, unheard_until, at):
            return
        if not current.has_finished:
            self._finish(current, previous, at.now)
        if current.is_newcomer:
            # Nobody waits for our result: it goes out first, so that the others have it when they report.
            if not self._own_result.is_unpublished(current):
                self.witness()
            return
        # Where everybody witnesses, the reports themselves say who has finished: waiting for the others' word would
        # only make each round longer by a message.
        if current.sent_witness or not current.witness_proof.witness:
            return
        if current.everybody_witnesses or not any(map(at.is_present, current.unfinished)):
            self.witness()

    def _looks_again_at(self, at: Moment) -> float | None:
        """When what the round waits for will have been waited for long enough, in monotonic seconds; None if never."""
        current = self.current
        if current.ready_at is None or current.has_finished:
            return None
        due = current.ready_at + self._unheard_seconds(at)
        return due if at.now < due else None

    def _is_awaited(self, previous: RoundState, unheard_until: float, at: Moment) -> bool:
        """Whether something of the round before may still come, of which our report is to tell."""
        if self._own_result.is_unpublished(previous):
            return True  # ours is being encoded
        if not previous.missing:
            return False

        def may_bring(client: NodeIdentity) -> bool:
            return client != self._me and at.is_present(client) and client in previous.regular

        if not self._is_psyches:
            return is_awaited(previous, may_bring, unheard_until, at.now)

        def is_ours(client: NodeIdentity) -> bool:
            return self._peers.is_of_our_kind(client.p2p_identity)

        return is_missing(previous, lambda client: may_bring(client) and not is_ours(client)) or is_awaited(
            previous, lambda client: may_bring(client) and is_ours(client), unheard_until, at.now
        )

    def _waits_for_finished(self, round_: RoundState) -> bool:
        """Whether our report waits until the others have finished. Where everybody reports, nobody's does: the reports
        say it. To Psyche's clients it is said all the same, since theirs wait."""
        return self._is_psyches or (round_.witness_proof.witness and not round_.everybody_witnesses)

    def _finish(self, current: RoundState, previous: RoundState | None, now: float) -> None:
        """We have nothing more to do in this round; the peers are told, if any of them waits for it."""
        current.has_finished = True
        if not self._is_psyches and current.everybody_witnesses:
            return
        root = merkle_root(previous.broadcasts) if previous is not None else EMPTY_ROOT
        data_hash = finished_hash(root)
        current.note_finished(self._me)
        current.broadcasts.append(data_hash)
        finished = Finished(MerkleRoot(root), warmup=False)
        self._announcer.say(current.step, current.committee_proof, data_hash, finished, now)

    def _prepare(self, at: Moment, *, too_late: bool) -> None:
        """Applies what is due, then trains, unless it has to wait for a result. ``too_late``: none will come."""
        current = self.current
        if self._due is not None and not self._apply(at.state, self._due, too_late=too_late):
            return
        if not too_late and self._waits_for_repair(at):
            return
        self._prepared = True
        if self._watch.fault is not None:
            current.training_over = True
            return
        batch = current.batch_of(self._me)
        if not too_late:
            self._watch.hash(at.state.progress.epoch, at.step)
            if batch is not None and at.is_in(RunState.ROUND_TRAIN):
                self._train(at.state, batch)
                return
        current.training_over = True
        if current.trains:
            self._outbox.put(
                act.DecayWeights(
                    step=current.step,
                    lr=current.lr,
                    bounds=cold_start_bounds(at.state),
                    own_previous=self._own_previous,
                )
            )

    def _waits_for_repair(self, at: Moment) -> bool:
        """Whether some of our weights are to be replaced before we go on, and the others have not said by which."""
        if self._repair.fault is None or self._watch.fault is not None:
            return False
        self._watch.hash(at.state.progress.epoch, at.step)
        electorate = self._watch.electorate(at.state)
        longest = min(MAX_FETCH_SECONDS, UNHEARD_SHARE * at.state.config.max_round_train_time)
        return self._repair.holds_back(at.step, electorate, at.now, seconds=self._unheard_seconds(at), longest=longest)

    def _apply(self, state: Coordinator, due: DueResults, *, too_late: bool) -> bool:
        """Applies what is due; False if it has to wait for a result, which is asked for."""
        if not too_late and due.round.changes == self._waited_since:
            return False  # nothing has come since it was asked last
        choice = due.choose(self._me)
        if choice.waiting and not too_late:
            for claim in choice.wanted:
                claim.state = ClaimState.FETCHING
                self._downloads.begin(due.round, claim)
            self._waited_since = due.round.changes
            return False
        if choice.waiting:
            self._watch.suspect(self.current.step)
            self._outbox.put(act.ResultMissing(step=self.current.step, batches=choice.waiting))
        self._watch.standing.end_round(
            {owner.p2p_identity for owner in choice.counted}, [owner.p2p_identity for owner in choice.silent]
        )
        self._due = None
        if self.current.trains and not too_late:
            self._audits.ask(state, due, choice)
        self._outbox.put(
            act.ApplyResults(
                step=due.step, lr=due.lr, bounds=due.bounds, updates=choice.updates, counted=choice.applied
            )
        )
        return True

    def _train(self, state: Coordinator, batch: BatchId) -> None:
        current, bounds = self.current, cold_start_bounds(state)
        current.training = batch
        self._announcer.repeats.hold()
        self._outbox.put(
            act.TrainBatch(
                step=current.step,
                batch=batch,
                lr=current.lr,
                previous_lr=effective_learning_rate(state, max(0, current.step - 1)),
                bounds=bounds,
                zero_optim=bounds is not None and current.height == 0,
                own_previous=self._own_previous,
                commits=commits_momentum(state, self.plan),
            )
        )

    @property
    def _own_previous(self) -> object:
        return self._previous.own if self._previous is not None else None

    def stop_training(self) -> None:
        """Cancels the training of the current round, if it is under way."""
        current = self.current
        if current.training is not None:
            current.training, current.training_over = None, True
            self._announcer.repeats.release()
            self._outbox.put(act.CancelTraining(current.step))

    def abandon_results(self) -> None:
        """Our weights are wrong: nothing is applied to them, or trained on them, any more."""
        self._due = None
        self.stop_training()

    def witness(self) -> None:
        """Reports to the coordinator, once, what was seen of the round before, if we are elected to."""
        current, previous = self.current, self._previous
        if current.sent_witness or self._is_run_at_rest(previous):
            return
        report = witness_report(current, previous)
        if report is not None:
            current.sent_witness = True
            self._outbox.put(act.SendWitness(step=current.step, witness=report))

    def _unheard_seconds(self, at: Moment) -> float:
        return unheard_seconds(at.state.config.max_round_train_time, among_psyches=self._is_psyches)

    def _forget_what_all_have(self, at: Moment) -> None:
        """A client of Psyche's that has finished has all results of the round before; one of ours may have given up."""
        previous = self._previous
        if previous is None:
            return
        others = at.present(self.current.clients) - {self._me}
        if self.current.finished.issuperset(others) and not any(
            self._peers.is_of_our_kind(other.p2p_identity) for other in others
        ):
            self._announcer.repeats.drop_results_of(previous.step)

    def _is_run_at_rest(self, previous: RoundState | None) -> bool:
        """Whether our weights are wrong and nobody else trains either: steps would go by in which nothing is learned.

        A round on which nobody reports ends the epoch, and in the next warm-up some peer gives its weights to all.
        """
        return self._watch.fault is not None and previous is not None and previous.trains and not previous.claims
