"""The client's side of a run, without I/O: what to fetch, apply, train, say and report, and when.

States of the coordinator, messages of peers, downloads, results of the trainer and ``now`` go in; actions come out
(:mod:`.actions`), to be carried out in their order. :class:`Rounds` takes the inputs and hands each to the object that
it concerns: :class:`~.phases.Phases` above all, which has a :class:`~.warm_up.WarmUp` and, while rounds go on, a
:class:`~.pipeline.RoundPipeline`. Each object keeps its own state, and all put their actions into one
:class:`~.actions.Outbox`.

``docs/rounds.md`` draws the pipeline. Rules: PsycheFoundation/psyche, ``shared/client/src``; where that client ends in
a panic or goes on with other weights than its peers, this one says :class:`~.actions.Desynced`, does not train any
more, still witnesses, and loads the weights again in the next warm-up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from ...comm.addresses import EndpointAddr
from ...comm.announcements import Announcement
from ...comm.signing import SecretKey
from ...compress import CompressedUpdate, TilePlan
from ...coordinator.types import Coordinator, NodeIdentity, RunState
from ...errors import ConfigurationError, ProtocolError
from ...verify.audit import Verdict
from ...verify.calibrate import Limits, Noise
from ...verify.recompute import Evidence
from . import actions as act
from .actions import Action, DropReason, Outbox
from .admission import NotAdmitted, Peers
from .announcer import Announcer
from .audits.docket import AuditCount
from .audits.momentum_messages import is_momentum_message
from .audits.reports import is_report
from .audits.watch import AuditWatch
from .broadcasts import Finished
from .moment import Moment, sooner
from .own_result import OwnResult
from .phases import KEPT_STEPS, Phases, Stage
from .reading import Reader
from .results import EncodedResult
from .weights import WeightsWatch

__all__ = ["Rounds", "Stage"]


class Rounds:
    """See the module. Every method that takes ``now`` is an input and returns what is to be done because of it.

    Args:
        identity: who we are to the coordinator.
        key: of our endpoint; signs commitments.
        address: where peers can fetch blobs that we offer.
        draw: gives so many random bytes, from a source that peers cannot guess.
        host: public key of the peer that hosts the run, if we know it; see :mod:`.trust.votes`.
        audit_alone: share of the results that we audit by ourselves in a run of Psyche's, 0 to 1.
        audit_limits: of test 2, as they were learnt in this run before; None learns them anew.
        reader: of what peers send; None makes one.
        watches: we are in no list of clients: follow the run, audit what peers send, and say nothing to anybody. The
            answer to :class:`~.actions.Initialize` may come before the model then: what follows waits for it.

    Raises:
        ConfigurationError: identity, key and address are not of one peer.
    """

    def __init__(
        self,
        *,
        identity: NodeIdentity,
        key: SecretKey,
        address: EndpointAddr,
        draw: Callable[[int], bytes],
        host: bytes | None = None,
        audit_alone: float = 0.0,
        audit_limits: Limits | None = None,
        reader: Reader | None = None,
        watches: bool = False,
    ) -> None:
        if identity.p2p_identity != key.public or address.id != key.public:
            raise ConfigurationError("identity, key and address must be of one peer", name="key")
        self._me = identity
        self._reader = reader if reader is not None else Reader()
        self._watches = watches
        self._outbox = Outbox(silent=watches)
        self._announcer = Announcer(key, draw, self._outbox)
        self._peers = Peers(identity, self._outbox)
        self._watch = WeightsWatch(key.public, self._outbox, host)
        self._own_result = OwnResult(identity, address, self._announcer, self._watch, self._outbox)
        self._audits = AuditWatch(
            key, self._watch.standing, self._outbox, alone=audit_alone, limits=audit_limits, watches=watches
        )
        self._phases = Phases(
            identity,
            draw,
            peers=self._peers,
            announcer=self._announcer,
            watch=self._watch,
            own_result=self._own_result,
            audits=self._audits,
            reader=self._reader,
            outbox=self._outbox,
            watches=watches,
        )
        # The latest input, once the coordinator has told its state.
        self._latest: Moment | None = None

    @property
    def stage(self) -> Stage:
        """What we are to the run."""
        return self._phases.stage

    @property
    def watches(self) -> bool:
        """Whether we are in no list, and only follow the run."""
        return self._watches

    @property
    def fault(self) -> act.Desynced | None:
        """Why our weights are not those of the others; None if they are, as far as we know."""
        return self._watch.fault or self._phases.repair.fault

    @property
    def dropped(self) -> Counter[DropReason]:
        """How many messages and results were not taken, by reason."""
        return self._outbox.dropped

    @property
    def audits(self) -> dict[bytes, AuditCount]:
        """Audits of each peer of the epoch, by public key; empty in a run without."""
        return self._audits.seen()

    @property
    def audit_limits(self) -> Limits | None:
        """By which momenta are judged; None in a run without such audits, and until there are any."""
        return self._audits.momenta.limits

    @property
    def audits_nothing(self) -> bool:
        """Whether momenta are audited and honest peers find so much noise in their own that nothing can be said."""
        return self._audits.momenta.is_beyond_reach

    @property
    def address(self) -> EndpointAddr:
        """Where peers can fetch blobs that we offer. It may be changed at any time."""
        return self._own_result.address

    @address.setter
    def address(self, address: EndpointAddr) -> None:
        self._own_result.address = address

    def forget_host(self) -> None:
        """Somebody else hosts the run: nobody's word on the weights counts more than the others' from now on."""
        self._watch.forget_host()

    # -- inputs: the coordinator ---------------------------------------------------------------------------------------

    def coordinator_state(self, state: Coordinator, now: float) -> list[Action]:
        """The coordinator tells its state. The same one again changes nothing."""
        before = self._moment(now)
        if self.stage is Stage.ENDED or (before is not None and (state is before.state or state == before.state)):
            return self._outbox.take()
        at = self._latest = Moment(now, state)
        if before is not None:
            if not at.is_same_phase(before):
                self._own_result.publish_before_next_round(before, self._phases.current_round)
            if before.lists(self._me) and not at.lists(self._me) and not at.is_in(RunState.FINISHED):
                self._outbox.put(act.Rejoin())
        self._phases.follow(at)
        return self._outbox.take()

    # -- inputs: the trainer -------------------------------------------------------------------------------------------

    def initialized(self, plan: TilePlan, names: Sequence[str], now: float) -> list[Action]:
        """The model is loaded.

        Args:
            plan: how its tensors are tiled.
            names: of the tensors, in the plan's order.
            now: monotonic time in seconds.
        """
        at = self._moment(now)
        if self.stage is Stage.LOADING and at is not None:
            self._phases.loaded(at, plan, names)
        return self._outbox.take()

    def initialization_failed(self, reason: str, now: float) -> list[Action]:
        """The model could not be loaded. During warm-up that is tried again a few times."""
        at = self._moment(now)
        is_loading = self.stage is Stage.LOADING or (self._watches and self.stage is Stage.RUNNING)
        if is_loading and at is not None:
            self._phases.load_failed(at, reason)
        return self._outbox.take()

    def trained(self, step: int, update: CompressedUpdate, own: object, now: float) -> list[Action]:
        """The training of ``step`` is done.

        Args:
            step: of the :class:`~.actions.TrainBatch`.
            update: what to send.
            own: what the trainer wants back in the next round, if this one is sent.
            now: monotonic time in seconds.
        """
        at, pipeline = self._moment(now), self._phases.pipeline
        self._own_result.publish(now)
        nonce = self._own_result.count_training()
        if at is not None and pipeline is not None:
            batch = pipeline.end_training(step, now)
            current, is_ours = pipeline.current, batch is not None and at.is_in(RunState.ROUND_TRAIN)
            if not current.is_newcomer:
                pipeline.advance(at)  # its report goes out first
            if batch is not None and is_ours:
                self._own_result.add(current, batch, update, own, nonce, pipeline.plan)
            if current.is_newcomer:
                pipeline.advance(at)
        return self._outbox.take()

    def encoding(self) -> Callable[[], EncodedResult] | None:
        """What :meth:`publish` will have to compute, to be computed in advance, in another thread; None if nothing.

        The function raises ProtocolError if the result is of no use to any peer.
        """
        return self._own_result.encoding()

    def publish(self, now: float, encoded: EncodedResult | None = None) -> list[Action]:
        """Answer to :class:`~.actions.PublishResult`.

        In a run whose rounds end with their last report, the result is held until the coordinator says that the round
        is over, or for :data:`~.own_result.MAX_HOLD_SECONDS`. If it is over already, it goes out at once.

        Args:
            now: monotonic time in seconds.
            encoded: what :meth:`encoding` gave, if it was computed in advance.
        """
        at = self._moment(now)
        if at is not None and not self._own_result.publish_or_hold(at, self._phases.current_round, encoded):
            self._phases.advance(at)
        return self._outbox.take()

    def cancelled(self, step: int, now: float) -> list[Action]:
        """The training of ``step`` was stopped before it came to a result."""
        at, pipeline = self._moment(now), self._phases.pipeline
        self._own_result.count_training()
        if at is not None and pipeline is not None:
            pipeline.end_training(step, now)
            pipeline.advance(at)
        return self._outbox.take()

    def weights_hashed(self, step: int, digests: Sequence[bytes], now: float) -> list[Action]:
        """Answer to :class:`~.actions.HashWeights`: 32 bytes for each tensor, in the plan's order."""
        at, pipeline = self._moment(now), self._phases.pipeline
        report = self._watch.hashed(step, digests, self._announcer.nonce())
        if at is not None and report is not None and self.stage is Stage.RUNNING:
            if self._phases.repair.fault is None:
                self._watch.tell(report)
            self._phases.judge(at, step, final=pipeline is not None and step < pipeline.current.step)
            self._phases.advance(at)
        return self._outbox.take()

    def weights_repaired(self, step: int, digests: Sequence[bytes], now: float) -> list[Action]:
        """Answer to :class:`~.actions.RepairWeights`: the digests of all tensors as they are now."""
        at = self._moment(now)
        if at is not None and self._phases.repair.repaired(step):
            progress = at.state.progress
            self._watch.tell(self._watch.replaced(progress.epoch, step, digests, self._announcer.nonce()))
        return self._outbox.take()

    def repair_failed(self, step: int, now: float) -> list[Action]:
        """Answer to :class:`~.actions.RepairWeights`, too. It is tried again in the next rounds."""
        at = self._moment(now)
        fault = self._phases.repair.failed(step)
        if at is not None and fault is not None:
            self._phases.desync(at, fault.reason, fault.tensors)
        return self._outbox.take()

    def audited(self, step: int, trainer: bytes, found: Evidence, own: Evidence | None, now: float) -> list[Action]:
        """Answer to :class:`~.actions.AuditResults`, for one of its results.

        Args:
            step: in which it was made.
            trainer: public key of who sent it.
            found: by test 1.
            own: likewise in our own result, with the two batches changed round.
            now: monotonic time in seconds.
        """
        at = self._moment(now)
        if at is not None and self.stage is Stage.RUNNING and not (self._watches and self.fault is not None):
            self._audits.audited(at.state, step, trainer, found, own)
        return self._outbox.take()

    def momentum_committed(self, step: int, root: bytes, decays: Sequence[float], now: float) -> list[Action]:
        """Answer to :class:`~.actions.TrainBatch`, too, where it asks for it: our momentum after it has this root.

        Args:
            step: that was trained.
            root: see :class:`~distro_optim.verify.momentum.Snapshot`.
            decays: of the momentum, one for each parameter group.
            now: monotonic time in seconds.
        """
        at = self._moment(now)
        if at is not None and self.stage is Stage.RUNNING:
            self._audits.momenta.committed(at.state, step, root, tuple(decays))
        return self._outbox.take()

    def momentum_opened(self, step: int, data: bytes, blob: bytes, now: float) -> list[Action]:
        """Answer to :class:`~.actions.OpenMomentum`: what is to be sent, and its BLAKE3."""
        at = self._moment(now)
        if at is not None and self.stage is Stage.RUNNING:
            self._audits.momenta.opened(at.state, step, data, self.address, blob)
        return self._outbox.take()

    def own_momentum_audited(self, step: int, noise: Noise, now: float) -> list[Action]:
        """Answer to :class:`~.actions.PrepareAudit`: what we found in our own momentum of a step."""
        self._moment(now)
        self._audits.momenta.own_audited(step, noise)
        return self._outbox.take()

    def momentum_audited(self, step: int, trainer: bytes, verdict: Verdict, now: float) -> list[Action]:
        """Answer to :class:`~.actions.AuditMomentum`.

        Args:
            step: in which the audited result was made.
            trainer: public key of who sent it.
            verdict: what we found.
            now: monotonic time in seconds.
        """
        at = self._moment(now)
        if at is not None and self.stage is Stage.RUNNING:
            self._audits.momenta.audited(at.state, step, trainer, verdict)
        return self._outbox.take()

    # -- inputs: the peers and the clock -------------------------------------------------------------------------------

    def receive(self, announcement: Announcement, now: float) -> list[Action]:
        """A peer announces a :class:`~.broadcasts.Broadcast`. Its signature was checked before."""
        at = self._moment(now)
        sender = self._sender_of(announcement, while_loading=True)
        if sender is not None and at is not None:
            try:
                broadcast = self._reader.broadcast(announcement.data)
                if isinstance(broadcast.data, Finished) and broadcast.data.warmup:
                    self._phases.warm_up.hear_ready(sender, broadcast, at)
                elif self.stage is not Stage.RUNNING:
                    raise NotAdmitted(DropReason.NOT_RUNNING)
                else:
                    self._phases.take(sender, broadcast, at)
            except NotAdmitted as refusal:
                self._outbox.drop(announcement.sender, refusal.reason, refusal.detail)
            except ProtocolError as error:
                self._outbox.drop(announcement.sender, DropReason.MALFORMED, str(error))
            self._phases.advance(at)
        return self._outbox.take()

    def receive_weights(self, announcement: Announcement, now: float) -> list[Action]:
        """A peer of our own kind announces a :class:`~.broadcasts.WeightsReport`, an
        :class:`~.audits.reports.AuditReport` or a :class:`~.audits.momentum_messages.MomentumMessage`. Its signature
        was checked before."""
        at = self._moment(now)
        if self._sender_of(announcement) is None or at is None:
            return self._outbox.take()
        if is_report(announcement.data):
            self._audits.receive(announcement, at.state.run_id)
            return self._outbox.take()
        if is_momentum_message(announcement.data):
            self._audits.momenta.receive(announcement, at.state)
            return self._outbox.take()
        try:
            report = self._reader.weights(announcement.data)
        except ProtocolError as error:
            self._outbox.drop(announcement.sender, DropReason.MALFORMED, str(error))
            return self._outbox.take()
        self._peers.note_our_kind(announcement.sender)
        progress = at.state.progress
        if report.epoch != progress.epoch or not -KEPT_STEPS <= report.step - progress.step <= 1:
            self._outbox.drop(announcement.sender, DropReason.WRONG_STEP)
        elif not self._watch.add(announcement.sender, report):
            self._outbox.drop(announcement.sender, DropReason.DUPLICATE)
        else:
            self._phases.judge(at, report.step, final=False)
            self._phases.advance(at)
        return self._outbox.take()

    def fetched(self, blob: bytes, data: bytes, now: float) -> list[Action]:
        """A download is here. ``blob`` is the BLAKE3 of ``data``, which was verified on the way."""
        at, pipeline = self._moment(now), self._phases.pipeline
        if at is not None and pipeline is not None:
            # To both: a peer may say that what it shows of its momentum is what somebody has sent as a result.
            self._audits.momenta.fetched(blob, data, at.state)
            pipeline.fetched(blob, data)
            pipeline.advance(at)
        return self._outbox.take()

    def fetch_failed(self, blob: bytes, now: float, *, is_slow: bool = False) -> list[Action]:
        """A download came to nothing. It is tried again while its round is of interest.

        Args:
            blob: the hash of what was to be fetched.
            now: monotonic time in seconds.
            is_slow: it was on its way, and the next attempt goes on where this one ended.
        """
        at, pipeline = self._moment(now), self._phases.pipeline
        if at is not None and pipeline is not None:
            pipeline.fetch_failed(blob, now, is_slow=is_slow)
            pipeline.advance(at)
        return self._outbox.take()

    def tick(self, now: float) -> list[Action]:
        """Time passes: downloads are tried again, messages repeated. To be called at :meth:`next_timer`."""
        at, pipeline = self._moment(now), self._phases.pipeline
        self._own_result.publish_due(now)
        if pipeline is not None:
            pipeline.retry_downloads(now)
        if self.stage is Stage.RUNNING and self._announcer.repeat(now):
            self._watch.tell_again()
        if at is not None:
            self._phases.advance(at)
        return self._outbox.take()

    def next_timer(self) -> float | None:
        """When :meth:`tick` has something to do, in monotonic seconds; None if never."""
        phases = self._phases
        due = self._own_result.held_until
        if phases.stage is Stage.RUNNING:
            due = sooner(due, self._announcer.repeats.next_at)
        if phases.pipeline is not None and self._latest is not None:
            due = sooner(due, phases.pipeline.next_timer(self._latest))
        return due

    def _moment(self, now: float) -> Moment | None:
        """The moment of an input; None if the coordinator has not told its state yet."""
        if self._latest is not None:
            self._latest = self._latest.later(now)
        return self._latest

    def _sender_of(self, announcement: Announcement, *, while_loading: bool = False) -> NodeIdentity | None:
        """The peer that announces something; None if it does not count."""
        # A peer says that it is ready once and then seldom: we must not miss it while we still load the model.
        listens = self.stage is Stage.RUNNING or (while_loading and self.stage is Stage.LOADING)
        if not listens:
            self._outbox.drop(announcement.sender, DropReason.NOT_RUNNING)
            return None
        sender = self._peers.find(announcement.sender)
        if sender is None:
            self._outbox.drop(announcement.sender, DropReason.UNKNOWN_SENDER)
        return sender
