"""The client's side of a run, without I/O: what to fetch, apply, train, say and report, and when.

States of the coordinator, messages of peers, downloads, results of the trainer and ``now`` go in; actions come out
(:mod:`.actions`), to be carried out in their order. ``docs/rounds.md`` draws the pipeline. Rules:
PsycheFoundation/psyche, ``shared/client/src``; where that client ends in a panic or goes on with other weights than its
peers, this one says :class:`~.actions.Desynced`, trains no more, still witnesses, and loads the weights anew in the
next warm-up.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Final

from typing_extensions import override

from ...comm import postcard
from ...comm.addresses import EndpointAddr
from ...comm.announcements import Announcement
from ...comm.signing import SecretKey
from ...compress import TilePlan
from ...coordinator.rules.checkpoints import is_shared_by_peers
from ...coordinator.types import Committee, CommitteeProof, Coordinator, MerkleRoot, NodeIdentity, RunState
from ...errors import CoordinatorError, ProtocolError
from ...verify.commitment import finished_hash
from ...verify.merkle import EMPTY_ROOT
from . import actions as act
from .actions import Action, DropReason
from .admission import NotAdmitted, check_commitment
from .applying import DueResults
from .broadcasts import Broadcast, Finished, WeightsReport
from .choose_providers import whom_to_ask
from .pipeline import RoundPipeline
from .repeats import Repeats
from .round_state import RoundState
from .witness_reports import health_checks, warmup_witness

__all__ = ["Rounds", "Stage"]

KEPT_STEPS: Final = 2
"""Blobs and messages are offered until two steps later (``s - 2`` in ``shared/client/src/client.rs``)."""

MAX_LOADS: Final = 3
"""Attempts to load the model in one warm-up. Chosen arbitrarily."""

_WARMUP_PROOF: Final = CommitteeProof(Committee.TIE_BREAKER, 0, 0)

_S = RunState
_ROUND: Final = frozenset({_S.ROUND_TRAIN, _S.ROUND_WITNESS})


class Stage(enum.Enum):
    """What we are to the run."""

    OUTSIDE = "no model is loaded that fits the run"
    LOADING = "the model is being loaded"
    RUNNING = "we take part"
    ENDED = "the run is over"


class Rounds(RoundPipeline):
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
        super().__init__(identity=identity, key=key, address=address, draw=draw)
        self.stage = Stage.OUTSIDE
        self._listed = False
        self._allowed: frozenset[bytes] = frozenset()
        # Warm-up: which one, who is ready, what was said, how often and for which step the model was loaded, and from
        # whom it is best loaded if ours was wrong.
        self._warmup: tuple[int, int] | None = None
        self._greeted = False
        self._ready: set[NodeIdentity] = set()
        self._warmup_witnessed = False
        self._loads = 0
        self._load_step = 0
        self._source: tuple[bytes, ...] = ()
        # Attempts in a row, over all warm-ups, in which nobody gave us the model.
        self._vain_loads = 0

    # -- inputs --------------------------------------------------------------------------------------------------------

    def coordinator_state(self, state: Coordinator, now: float) -> list[Action]:
        """The coordinator tells its state. The same one again changes nothing."""
        self._now = now
        if self.stage is Stage.ENDED or state is self._state or state == self._state:
            return self._take()
        before = self._state
        if before is None or (state.run_state, state.progress) != (before.run_state, before.progress):
            self._publish_before_the_next_round()
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
        self._plan, self._watch.names = plan, tuple(names)
        self._watch.forget_ours()
        self._vain_loads = 0
        self.stage, self.fault, self._greeted, self._trainer_nonce = Stage.RUNNING, None, False, 0
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
            self._vain_loads += 1
            if self._loads >= MAX_LOADS and not self._had_the_weights(self._state):
                self._end(f"the model cannot be loaded: {reason}")
            elif self._state.run_state is _S.WARMUP and self._listed and self._loads < MAX_LOADS:
                self._load(self._state)
        return self._take()

    def receive(self, announcement: Announcement, now: float) -> list[Action]:
        """A peer announces a :class:`~.broadcasts.Broadcast`; its signature was checked."""
        self._now = now
        sender = self._sender_of(announcement, while_loading=True)
        if sender is not None:
            try:
                broadcast: Broadcast = postcard.decode(Broadcast, announcement.data)
                if isinstance(broadcast.data, Finished) and broadcast.data.warmup:
                    self._take_ready(sender, broadcast)
                elif self.stage is not Stage.RUNNING:
                    raise NotAdmitted(DropReason.NOT_RUNNING)
                else:
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
            elif not self._watch.add(announcement.sender, report):
                self._drop(announcement.sender, DropReason.DUPLICATE)
            else:
                self._judge(report.step, final=False)
        return self._take()

    def weights_hashed(self, step: int, digests: Sequence[bytes], now: float) -> list[Action]:
        """Answer to :class:`~.actions.HashWeights`: 32 bytes for each tensor, in the plan's order."""
        self._now = now
        report = self._watch.hashed(step, digests, self._random_nonce())
        if report is not None and self.stage is Stage.RUNNING:
            self._say_weights(report)
            self._judge(step, final=self._current is not None and step < self._current.step)
        return self._take()

    def tick(self, now: float) -> list[Action]:
        """Time passes: retries and repetitions. To be called at :meth:`next_timer`."""
        self._now = now
        self._publish_held()
        for round_ in self._live_rounds():
            for claim in round_.all_claims():
                if claim.retry_at is not None and claim.retry_at <= now:
                    self._fetch(round_, claim)
        if self.stage is Stage.RUNNING and (again := self._repeats.due(now)):
            self._out.extend(act.Announce(postcard.encode(broadcast)) for broadcast in again)
            self._say_weights(self._watch.again())
        self._advance()
        return self._take()

    def next_timer(self) -> float | None:
        """When :meth:`tick` has something to do; None if never."""
        times = [c.retry_at for round_ in self._live_rounds() for c in round_.all_claims() if c.retry_at is not None]
        if self.stage is Stage.RUNNING and self._repeats.next_at is not None:
            times.append(self._repeats.next_at)
        if (held_until := self._held_until()) is not None:
            times.append(held_until)
        if (look_again_at := self._looks_again_at()) is not None:
            times.append(look_again_at)
        return min(times, default=None)

    # -- following the coordinator -------------------------------------------------------------------------------------

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
            self._watch.clear()
        if not self._listed:
            if self.stage is Stage.RUNNING:
                self._drop_out("the epoch begins without us")
            return
        self._allow(state)
        is_right = self.stage is Stage.RUNNING and self.fault is None
        if not is_right and self.stage is not Stage.LOADING and self._loads < MAX_LOADS:
            self._load(state)
        elif self.stage is Stage.RUNNING and not self._greeted:
            self._greeted = True
            self._early.clear()
            self._repeats = Repeats()
            self._hash_weights(state)
            self._ready.add(self._me)
            self._say(0, _WARMUP_PROOF, finished_hash(EMPTY_ROOT), Finished(MerkleRoot(), warmup=True))
        self._witness_warmup(state)

    @override
    def _advance(self) -> None:
        super()._advance()
        if self._state is not None and self._in(_S.WARMUP) and self._listed:
            self._witness_warmup(self._state)

    def _witness_warmup(self, state: Coordinator) -> None:
        clients = [client.id for client in state.epoch_state.clients]
        if self.stage is Stage.RUNNING and not self._warmup_witnessed and self._ready.issuperset(clients):
            self._warmup_witnessed = True
            self._out.append(act.SendWarmupWitness(warmup_witness(clients.index(self._me))))

    def _load(self, state: Coordinator) -> None:
        self.stage = Stage.LOADING
        self._loads += 1
        self._load_step = state.progress.step
        self._out.append(
            whom_to_ask(
                state,
                self._me,
                right=self._source,
                ready=self._ready,
                had_the_weights=self._had_the_weights(state),
                vain_attempts=self._vain_loads,
            )
        )

    def _had_the_weights(self, state: Coordinator) -> bool:
        """We have been in this run of peers of our own kind: our weights were the run's, and are not far from them."""
        return self._plan is not None and is_shared_by_peers(state.model.checkpoint)

    def _enter_round(self, state: Coordinator) -> None:
        step, current = state.progress.step, self._current
        if current is not None and current.step == step:
            if state.run_state is _S.ROUND_WITNESS:
                self._stop_training()
                self._witness()
            return
        follows = current is not None and current.step + 1 == step and current.height + 1 == state.current_round.height
        if current is not None and follows:
            self._close_round(current)
        else:
            self._leave_rounds(state)
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
        self._watch.forget_before(step - KEPT_STEPS)
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
        elif missed == 0:
            if self.fault is None:
                self._out.append(act.FinishEpoch(current.step))
        else:
            self._watch.clear()  # the coordinator began the epoch anew, and so will the comparison
        self._current = self._previous = self._due = None
        self._early.clear()

    # -- messages ------------------------------------------------------------------------------------------------------

    def _sender_of(self, announcement: Announcement, *, while_loading: bool = False) -> NodeIdentity | None:
        # Who is ready says so once and then seldom: whoever still loads the model must not miss it.
        listens = self.stage is Stage.RUNNING or (while_loading and self.stage is Stage.LOADING)
        if not listens:
            self._drop(announcement.sender, DropReason.NOT_RUNNING)
            return None
        sender = self._peers.get(announcement.sender)
        if sender is None or sender == self._me:
            self._drop(announcement.sender, DropReason.UNKNOWN_SENDER)
            return None
        return sender

    def _take_ready(self, sender: NodeIdentity, broadcast: Broadcast) -> None:
        if not self._in(_S.WARMUP) or broadcast.step != 0:
            raise NotAdmitted(DropReason.WRONG_STEP, "it is not warm-up")
        if sender in self._ready:
            raise NotAdmitted(DropReason.DUPLICATE)
        check_commitment(broadcast, sender)
        self._ready.add(sender)

    # -- weights -------------------------------------------------------------------------------------------------------

    def _say_weights(self, report: WeightsReport | None) -> None:
        if report is not None and self.fault is None:
            self._out.append(act.AnnounceWeights(postcard.encode(report)))

    def _judge(self, step: int, *, final: bool) -> None:
        """Compares our weights at ``step`` with the others'."""
        if self._state is None or self.fault is not None or self.stage is not Stage.RUNNING:
            return
        clients = [client.id.p2p_identity for client in self._state.epoch_state.clients]
        finding = self._watch.judge(step, clients, final=final)
        if finding is not None:
            self._source = finding.right
            self._desync(finding.reason, finding.tensors)

    def _desync(self, reason: str, tensors: tuple[str, ...] = ()) -> None:
        if self.fault is not None:
            return
        state = self._state
        assert state is not None
        self.fault = act.Desynced(step=state.progress.step, reason=reason, tensors=tensors)
        self._out.append(self.fault)
        self._due, self._watch.doubt = None, None
        self._stop_training()
        if self._in(_S.WARMUP) and self._listed and self._loads < MAX_LOADS:
            self._ready.discard(self._me)
            self._load(state)

    # -- small things --------------------------------------------------------------------------------------------------

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
