"""Follows the coordinator from phase to phase: what is to be done in a warm-up, in a round, at an epoch's end. No I/O.

This file decides when the model is loaded, when rounds begin and end, and what follows if our weights are wrong. How a
model is loaded is in :mod:`.warm_up`, what happens inside a round in :mod:`.pipeline`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Final

from ...compress import TilePlan
from ...coordinator.rules.checkpoints import is_run_of_psyche
from ...coordinator.types import ClientState, NodeIdentity, RunState
from ...errors import CoordinatorError
from . import actions as act
from .actions import DropReason, Outbox
from .admission import EarlyMessages, NotAdmitted, Peers
from .announcer import AMONG_PSYCHES, PROMPT, Announcer
from .audits.watch import AuditWatch
from .broadcasts import Broadcast
from .moment import Moment
from .own_result import OwnResult
from .pipeline import RoundPipeline
from .reading import Reader
from .repair import Repair
from .round_state import RoundState
from .warm_up import WarmUp
from .weights import WeightsWatch

__all__ = ["KEPT_STEPS", "Phases", "Stage"]

KEPT_STEPS: Final = 2
"""Blobs and messages are offered until two steps later (``s - 2`` in ``shared/client/src/client.rs``)."""

_S = RunState

_WHY_GONE: Final = {
    ClientState.DROPPED: ", since nothing of ours came in time for a round: a busy machine, or a slow line",
    ClientState.EJECTED: ", since its coordinator has put us out",
    ClientState.WITHDRAWN: ", since its coordinator has lost us",
}
"""What a peer is told that is not in its epoch any more, by how its coordinator lists it."""


class Stage(enum.Enum):
    """What we are to the run."""

    OUTSIDE = "no model is loaded that fits the run"
    LOADING = "the model is being loaded"
    RUNNING = "we take part"
    ENDED = "the run is over"


class Phases:
    """Where we are in the run.

    Args:
        me: who we are to the coordinator.
        draw: gives so many random bytes, from a source that peers cannot guess.
        peers: who may talk to us.
        announcer: what we announce, and repeat.
        watch: what is known of our weights.
        own_result: what we trained and have not published yet.
        audits: who is audited, and what came of it.
        reader: of what peers send.
        outbox: where what is to be done goes.
        watches: we are in no list, and follow the run all the same.

    Attributes:
        stage: what we are to the run.
        warm_up: what was done in the present warm-up.
        repair: whether some of our weights are to be replaced.
        pipeline: the rounds that are alive; None while no rounds go on, or we do not take part.
    """

    def __init__(
        self,
        me: NodeIdentity,
        draw: Callable[[int], bytes],
        *,
        peers: Peers,
        announcer: Announcer,
        watch: WeightsWatch,
        own_result: OwnResult,
        audits: AuditWatch,
        reader: Reader,
        outbox: Outbox,
        watches: bool = False,
    ) -> None:
        self.stage = Stage.OUTSIDE
        self.warm_up = WarmUp(me, announcer, outbox, reader, watches=watches)
        self.repair = Repair(watch, outbox)
        self.pipeline: RoundPipeline | None = None
        self._me = me
        self._watches = watches
        self._draw = draw
        self._peers = peers
        self._announcer = announcer
        self._watch = watch
        self._own_result = own_result
        self._audits = audits
        self._reader = reader
        self._outbox = outbox
        self._early = EarlyMessages()
        # Of the model that was loaded last.
        self._plan: TilePlan | None = None

    @property
    def current_round(self) -> RoundState | None:
        """The round under way, if there is one and we take part."""
        return self.pipeline.current if self.pipeline is not None else None

    # -- following the coordinator -------------------------------------------------------------------------------------

    def follow(self, at: Moment) -> None:
        """Does what the phase of the run asks for."""
        clients = len(at.state.epoch_state.clients)
        self._announcer.repeats.pace = AMONG_PSYCHES if is_run_of_psyche(at.state) else PROMPT.among(clients)
        try:
            if at.is_in(_S.ROUND_TRAIN, _S.ROUND_WITNESS):
                if self.stage is Stage.RUNNING and self._plan is not None:
                    self._follow_rounds(at, self._plan)
                return
            self._leave_rounds(at)
            if at.is_in(_S.FINISHED):
                self._end(at, None)
            elif at.is_in(_S.WARMUP):
                self._follow_warm_up(at)
        except CoordinatorError as error:
            self._end(at, f"the coordinator's state cannot be followed: {error}")

    def _follow_warm_up(self, at: Moment) -> None:
        warm_up = self.warm_up
        if warm_up.begin(at.state):
            self._watch.clear()
            self._watch.standing.begin_epoch(client.p2p_identity for client in at.clients)
            self.repair.begin_epoch()
            self._audits.begin_epoch(at.state)
        if not self._follows(at):
            if self.stage is Stage.RUNNING:
                self._drop_out(at, "the epoch begins without us")
            return
        self._allow(at)
        is_right = self.stage is Stage.RUNNING and self._watch.fault is None
        if not is_right and self.stage is not Stage.LOADING and warm_up.may_load:
            self._load(at)
        elif self.stage is Stage.RUNNING and not warm_up.said_ready:
            self._early.clear()
            self._announcer.repeats.clear()
            self._watch.hash(at.state.progress.epoch, at.step)
            warm_up.say_ready(at.now)
        self._witness_warm_up(at)

    def _follow_rounds(self, at: Moment, plan: TilePlan) -> None:
        if not self._follows(at):
            self._drop_out(at, "the run goes on without us")
            return
        pipeline = self.pipeline
        if pipeline is not None and pipeline.current.step == at.step:
            if at.is_in(_S.ROUND_WITNESS):
                pipeline.stop_training()
                pipeline.witness()
        elif pipeline is not None and pipeline.is_followed_by(at.state):
            self._close_round(at, pipeline)
            pipeline.check_health(at.state)
            pipeline.begin_next_round(at.state)
            self._begin_round(at, pipeline)
        else:
            self._leave_rounds(at)
            if at.state.current_round.height > 0:
                self.desync(at, f"we come into round {at.state.current_round.height} without the ones before it")
            self.pipeline = RoundPipeline(
                at.state,
                me=self._me,
                draw=self._draw,
                plan=plan,
                peers=self._peers,
                own_result=self._own_result,
                reader=self._reader,
                announcer=self._announcer,
                watch=self._watch,
                repair=self.repair,
                audits=self._audits,
                outbox=self._outbox,
            )
            self._begin_round(at, self.pipeline)
        self.advance(at)

    def _begin_round(self, at: Moment, pipeline: RoundPipeline) -> None:
        """A round has begun: what is too old goes, and what came too early is taken."""
        oldest = at.step - KEPT_STEPS
        self._announcer.repeats.drop_before(oldest)
        self._watch.forget_before(oldest)
        self._allow(at)
        self._outbox.put(act.Forget(max(0, oldest)))
        for key, broadcast in self._early.take():
            sender = self._peers.find(key)
            if sender is not None:
                try:
                    self.take(sender, broadcast, at)
                except NotAdmitted as refusal:
                    self._outbox.drop(key, refusal.reason, refusal.detail)
        if at.is_in(_S.ROUND_WITNESS):
            pipeline.witness()

    def _close_round(self, at: Moment, pipeline: RoundPipeline) -> None:
        """The current round is over: whatever its comparison of weights says is final."""
        pipeline.close_round(at)
        self.judge(at, pipeline.current.step, final=True)
        if self.repair.fault is not None and self.repair.is_hopeless:
            self.desync(at, self.repair.fault.reason, self.repair.fault.tensors)

    def _leave_rounds(self, at: Moment) -> None:
        """The rounds are over, or were interrupted."""
        pipeline = self.pipeline
        if pipeline is None:
            return
        self._close_round(at, pipeline)
        missed = at.step - pipeline.current.step - 1
        if self.repair.fault is not None:
            self.desync(at, self.repair.fault.reason, self.repair.fault.tensors)
        if missed > 0:
            self.desync(at, f"{missed} rounds went by unseen")
        elif missed < 0:
            self._watch.clear()  # the coordinator has begun the epoch again, and the comparison begins again with it
        elif self._watch.fault is None:
            self._outbox.put(act.FinishEpoch(pipeline.current.step))
        self.pipeline = None
        self._early.clear()

    def advance(self, at: Moment) -> None:
        """Does what has become possible."""
        if self.pipeline is not None:
            self.pipeline.advance(at)
        if at.state.run_state is _S.WARMUP and self._follows(at):
            self._witness_warm_up(at)

    def _follows(self, at: Moment) -> bool:
        """Whether the epoch is ours: we are in its list, or watch."""
        return self._watches or at.lists(self._me)

    def _witness_warm_up(self, at: Moment) -> None:
        if self.stage is Stage.RUNNING:
            self.warm_up.witness(at)

    # -- messages ------------------------------------------------------------------------------------------------------

    def take(self, sender: NodeIdentity, broadcast: Broadcast, at: Moment) -> None:
        """Takes a message about a round, or keeps it for the next one.

        Raises:
            NotAdmitted: it is about another round, or does not pass the checks.
        """
        pipeline = self.pipeline
        if pipeline is not None and pipeline.take(sender, broadcast):
            return
        next_step = at.step if at.is_in(_S.WARMUP) else at.step + 1 if pipeline is not None else None
        if broadcast.step != next_step:
            raise NotAdmitted(DropReason.WRONG_STEP, f"step {broadcast.step}, it is {at.step}")
        self._early.hold(sender, broadcast)

    def _allow(self, at: Moment) -> None:
        """Peers are the clients of the epoch, and those of the rounds that are not over for us."""
        known = list(at.clients)
        for round_ in self.pipeline.live_rounds if self.pipeline is not None else ():
            known.extend(round_.clients)
        self._peers.allow(known)

    # -- the model -----------------------------------------------------------------------------------------------------

    def loaded(self, at: Moment, plan: TilePlan, names: Sequence[str]) -> None:
        """The model that we asked for is here."""
        self.stage, self._plan = Stage.RUNNING, plan
        self._watch.loaded(names)
        self._own_result.restart()
        if not self.warm_up.loaded(at):
            self.desync(at, "the model was loaded only after training had begun")
        self.follow(at)

    def load_failed(self, at: Moment, reason: str) -> None:
        """The model that we asked for could not be loaded."""
        self.stage = Stage.OUTSIDE
        self.warm_up.load_failed()
        if self._watches:
            # It followed the rounds meanwhile, to apply them to what it would get; the next epoch has a model again.
            self.pipeline = None
            self._outbox.put(act.Desynced(step=at.step, reason=f"the model cannot be loaded: {reason}", tensors=()))
            self._load_if_possible(at)
            return
        if not self.warm_up.may_load and not self.warm_up.had_the_weights(at.state):
            self._end(at, f"the model cannot be loaded: {reason}")
        else:
            self._load_if_possible(at)

    def _load(self, at: Moment) -> None:
        self.stage = Stage.LOADING
        self.warm_up.load(at.state, self._watch.electorate(at.state), has_standing=self._watch.standing.is_ours_earned)

    def _load_if_possible(self, at: Moment) -> None:
        if at.is_in(_S.WARMUP) and self._follows(at) and self.warm_up.may_load:
            self._load(at)

    def judge(self, at: Moment, step: int, *, final: bool) -> None:
        """Compares our weights at ``step`` with the others'."""
        if self._watch.fault is not None or self.stage is not Stage.RUNNING or self._watch.is_undisputed(step):
            return
        finding = self._watch.judge(step, self._watch.electorate(at.state), final=final)
        if finding is None:
            return
        self.warm_up.source = finding.right
        if self.pipeline is None or not self.repair.takes(finding, step, final=final):
            self.desync(at, finding.reason, finding.tensors)

    def desync(self, at: Moment, reason: str, tensors: tuple[str, ...] = ()) -> None:
        """Our weights are wrong. In warm-up the right ones are loaded at once."""
        if self._watch.fault is not None:
            return
        self.repair.give_up()
        self._watch.condemn(act.Desynced(step=at.step, reason=reason, tensors=tensors))
        if self.pipeline is not None:
            self.pipeline.abandon_results()
        self._load_if_possible(at)

    def _drop_out(self, at: Moment, what: str) -> None:
        """We are not in the list of the epoch any more."""
        how = {client.id: client.state for client in at.state.epoch_state.exited_clients}
        why = _WHY_GONE.get(how[self._me], "") if self._me in how else ""
        self.desync(at, f"{what}{why}")
        self.pipeline = None
        self.stage = Stage.OUTSIDE

    def _end(self, at: Moment, error: str | None) -> None:
        """The run is over for us, with an error or without."""
        if self.pipeline is not None:
            self.pipeline.stop_training()
        self.pipeline = None
        self.stage = Stage.ENDED
        self._outbox.put(act.RunEnded(step=at.step, error=error))
