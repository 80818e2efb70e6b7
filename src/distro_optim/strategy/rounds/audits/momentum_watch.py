"""Test 2 as the rounds of a run go by: momenta are committed to, audits drawn, openings fetched, verdicts told. No I/O.

::

    round h      the trainer trains, and says what its momentum is then (MomentumSaid), as after every round
    round h+1    what it says has to be with everybody before this round is over
    round h+2    the random seed, which nobody knew before, says who is audited for h, by whom, and which leaves. The
                 audited trainer opens them (OpeningSaid); its auditors keep the weights of h, and look at themselves
    .. h+6       each auditor fetches the opening, computes it again, and tells what it found (MomentumReport); if none
                 has come by then it tells that, unless it hears little of anybody
    h+10         what is not settled yet is settled by what there is

A result is audited if it counts, and the trainer's result of the round before counted, too: then an honest trainer
has committed to both momenta, whatever happened to it before. So a peer that has just come, was loaded again or missed
a round has one round in which nobody looks at it in this way, which is the first after that; and nothing that it does
then keeps it from being asked in the next. A peer that sends every second round only is not asked. It has half of the
results, and half of the points, and test 1 looks at each of them. Nor is a result looked at that says nothing of any
tensor, as that of a round whose data could not be read: the momentum went on without a gradient, as everybody sees, and
to test 1 it is one that was not trained.

Nothing is computed, fetched or kept for whoever was not drawn, and of who was drawn one opening is fetched by each of
its three auditors, of a size that follows from the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ....comm.addresses import EndpointAddr
from ....comm.announcements import Announcement
from ....comm.signing import SecretKey
from ....comm.tickets import BlobFormat, BlobTicket
from ....compress import CompressedUpdate, TilePlan
from ....coordinator.rules.checkpoints import audit_fraction_of, audits_momentum
from ....coordinator.types import BatchId, Coordinator
from ....errors import ProtocolError
from ....verify.audit import LEAVES, Challenge, Verdict, draw, is_auditable, leaves_to_open
from ....verify.calibrate import SAMPLES_OF_A_PEER, Limits, Noise
from ....verify.momentum import MomentumCommitment
from ....verify.opening import max_opening_bytes
from ..actions import (
    AnnounceWeights,
    AuditMomentum,
    AuditSettled,
    DropReason,
    FetchBlob,
    OpenMomentum,
    Outbox,
    OwnLink,
    PrepareAudit,
    StoreBlob,
)
from ..choose_result import Choice, DueResults
from ..round_state import RoundState
from ..trust.standing import Standing
from .docket import DRAWN_AFTER, AuditCount, Settled
from .momentum_book import MomentumBook
from .momentum_messages import (
    MAX_GROUPS,
    Distances,
    MomentumMessage,
    MomentumReport,
    MomentumSaid,
    OpeningSaid,
    Outcome,
    decode_momentum_message,
    distances_of,
)

__all__ = ["OPENING_ROUNDS", "OPENING_TAG", "MomentumWatch", "commits_momentum", "settle"]

OPENING_TAG: Final = "momentum-opening"
"""What the tags of openings begin with; a step follows, as in those of results."""

OPENING_ROUNDS: Final = 4
"""From the draw on, until an opening that has not come is said to be missing. One of a model of 124 million parameters,
sent to three auditors, takes 42 seconds of a line of 10 megabits; a round of such a model takes 15. Chosen so that this
fits."""

SETTLED_AFTER: Final = 10
"""Rounds from a result to when its audit is settled by what there is: the rest is for auditors that are slow."""

REPETITIONS: Final = 1
"""Of what was said, in the round that follows, since gossip may lose it. Chosen arbitrarily."""

KEPT_SAID: Final = 4
"""Steps back from the present one for which it is known what momenta were said to be."""

OWN_EVERY: Final = 4
"""Audits of others, in one of which we look at ourselves, too, once there is enough noise. Chosen arbitrarily."""

ENOUGH_OWN: Final = SAMPLES_OF_A_PEER // 4
"""Samples of our own noise after which that is so."""


@dataclass
class _Ours:
    """An audit that is ours to make.

    Attributes:
        epoch: of the run.
        drawn_in: step whose seed has drawn it.
        batch, before, after, decays, previous, sent: see :class:`~..actions.AuditMomentum`.
        blob: what the trainer has opened; None until it says so.
        computing: it is here, and the trainer has been asked.
    """

    challenge: Challenge
    epoch: int
    drawn_in: int
    batch: BatchId
    before: MomentumCommitment
    after: MomentumCommitment
    decays: tuple[float, ...]
    previous: CompressedUpdate
    sent: CompressedUpdate
    blob: BlobTicket | None = None
    computing: bool = False


def commits_momentum(state: Coordinator, plan: TilePlan) -> bool:
    """Whether trainers of a run commit to their momenta."""
    fits = all(spec.group < MAX_GROUPS for spec in plan.specs)
    return fits and audits_momentum(state.model.checkpoint) and is_auditable(plan)


class MomentumWatch:
    """See the module.

    Args:
        key: ours; signs what we say.
        standing: who has trained; reports of others do not count.
        outbox: where what is to be done goes.
        limits: of the run, as a checkpoint has them; None learns them anew.
        named: peers that have failed in this epoch, by either test.
    """

    def __init__(
        self,
        key: SecretKey,
        standing: Standing,
        outbox: Outbox,
        limits: Limits | None = None,
        *,
        named: set[bytes] | None = None,
    ) -> None:
        self._named: set[bytes] = set() if named is None else named
        self._key = key
        self._me = key.public
        self._outbox = outbox
        # Nobody needs standing in its own eyes.
        self._book = MomentumBook(lambda peer: peer == self._me or standing.has_earned(peer), limits)
        self._plan: TilePlan | None = None  # while momenta are audited
        self._step = 0
        self._momenta: dict[tuple[int, bytes], MomentumSaid] = {}
        self._counted: dict[int, dict[bytes, CompressedUpdate]] = {}
        self._ours: dict[tuple[int, bytes], _Ours] = {}
        self._early: dict[tuple[int, bytes], OpeningSaid] = {}
        self._own_noise: dict[int, Distances] = {}
        self._said: list[tuple[MomentumMessage, int]] = []
        self._audits_made = 0

    # -- what is known -------------------------------------------------------------------------------------------------

    def seen(self) -> dict[bytes, AuditCount]:
        """Audits of each peer, by public key."""
        return self._book.seen()

    @property
    def limits(self) -> Limits | None:
        """Of the run; None while nothing is decided by distances."""
        return self._book.limits

    @property
    def is_beyond_reach(self) -> bool:
        """Whether honest peers find so much noise in themselves that momenta cannot be audited."""
        return self._book.is_beyond_reach

    # -- rounds --------------------------------------------------------------------------------------------------------

    def begin_epoch(self, state: Coordinator) -> None:
        """An epoch forms."""
        for memory in (self._momenta, self._counted, self._ours, self._early, self._own_noise):
            memory.clear()
        self._said.clear()
        self._tell(self._book.begin_epoch({client.id.p2p_identity for client in state.epoch_state.clients}))

    def begin_rounds(self, state: Coordinator, plan: TilePlan) -> None:
        """The first round of an epoch begins, or the first one that we take part in."""
        self._plan = plan if commits_momentum(state, plan) else None
        self._step = state.progress.step

    def begin_round(self, state: Coordinator, before: RoundState | None) -> None:
        """The round of ``state`` begins, and says who is audited for ``before``, the one two rounds back."""
        plan = self._plan
        if plan is None:
            return
        step = self._step = state.progress.step
        self._tell(self._book.settle_before(step - SETTLED_AFTER))
        self._say_again()
        self._forget(step)
        self._give_up(state)
        self._fetch_again()
        if before is None or before.height == 0:
            return  # nobody has committed to what was before its first round
        fraction = audit_fraction_of(state.model.checkpoint)
        trainers = [owner.p2p_identity for owner in before.assignments.values()]
        auditors = [client.p2p_identity for client in before.regular]
        for challenge in draw(state.current_round.random_seed, before.step, plan, trainers, auditors, fraction):
            self._book.expect(state.progress.epoch, before.step, challenge)
            if challenge.trainer == self._me:
                self._outbox.put(OpenMomentum(before.step, challenge.leaves))

    def ask(self, state: Coordinator, due: DueResults, choice: Choice) -> None:
        """These results are about to be applied: those of which ours to audit are remembered, with all it takes."""
        if self._plan is None:
            return
        of_step = due.round.step
        counted = {one.owner: update for one, update in zip(choice.applied, choice.updates, strict=True)}
        self._counted[of_step] = counted
        before = self._counted.get(of_step - 1, {})
        batches = {owner.p2p_identity: batch for batch, owner in due.round.assignments.items()}
        ours = []
        for trainer in sorted(counted.keys() & before.keys() & batches.keys()):
            challenge = self._book.challenge(of_step, trainer)
            if challenge is None or self._me not in challenge.auditors:
                continue
            if not any(counted[trainer].present):
                continue  # it says that it had no gradients: of that nothing could be a lie
            said, said_before = (self._momenta.get((number, trainer)) for number in (of_step, of_step - 1))
            if said is None or said_before is None:
                if self._hears_well():
                    self._report(state, of_step, trainer, Outcome.NOT_SHOWN)
                continue
            ours.append(trainer)
            self._ours[of_step, trainer] = _Ours(
                challenge=challenge,
                epoch=state.progress.epoch,
                drawn_in=due.step,
                batch=batches[trainer],
                before=self._commitment(said_before),
                after=self._commitment(said),
                decays=said.decays,
                previous=before[trainer],
                sent=counted[trainer],
            )
        if ours:
            own = self._own_link(state, due, before, counted, batches.get(self._me))
            self._outbox.put(PrepareAudit(step=due.step, of_step=of_step, own=own))
            for trainer in ours:
                if (early := self._early.pop((of_step, trainer), None)) is not None:
                    self._fetch(of_step, trainer, early.ticket)

    def _own_link(
        self,
        state: Coordinator,
        due: DueResults,
        before: dict[bytes, CompressedUpdate],
        counted: dict[bytes, CompressedUpdate],
        batch: BatchId | None,
    ) -> OwnLink | None:
        """What it takes to look at our own result of the step, now and then."""
        self._audits_made += 1
        is_time = self._book.samples_of(self._me) < ENOUGH_OWN or self._audits_made % OWN_EVERY == 0
        if not is_time or batch is None or self._plan is None or self._me not in before.keys() & counted.keys():
            return None
        # Which leaves we compare of our own does not matter to anybody.
        leaves = leaves_to_open(state.current_round.random_seed, due.round.step, self._plan, self._me)
        return OwnLink(batch=batch, leaves=leaves, previous=before[self._me], sent=counted[self._me])

    # -- answers of the trainer ----------------------------------------------------------------------------------------

    def committed(self, state: Coordinator, step: int, root: bytes, decays: tuple[float, ...]) -> None:
        """Our momentum after ``step`` has this root."""
        if self._plan is not None:
            said = MomentumSaid(state.progress.epoch, step, bytes(64), 0, root, decays).signed(self._key, state.run_id)
            self._momenta[step, self._me] = said
            self._say(said, 1)

    def opened(self, state: Coordinator, step: int, data: bytes, address: EndpointAddr, blob: bytes) -> None:
        """What we were asked to show of our momentum in ``step`` is in ``data``, whose BLAKE3 is ``blob``."""
        if self._book.challenge(step, self._me) is None:
            return  # it took too long
        self._outbox.put(StoreBlob(data=data, tag=f"{OPENING_TAG}_{self._step + OPENING_ROUNDS}"))
        ticket = BlobTicket(address, BlobFormat.RAW, blob)
        said = OpeningSaid(state.progress.epoch, step, bytes(64), 0, ticket).signed(self._key, state.run_id)
        self._say(said, REPETITIONS)

    def own_audited(self, step: int, noise: Noise) -> None:
        """We have found this in our own momentum of ``step``."""
        values = (noise.jaccard or 0.0, noise.hamming or 0.0, noise.manhattan or 0.0)
        self._own_noise[step] = Distances.of(*values)

    def audited(self, state: Coordinator, step: int, trainer: bytes, verdict: Verdict) -> None:
        """The trainer has computed the momentum of ``trainer`` in ``step`` again."""
        if self._ours.pop((step, trainer), None) is None:
            return
        if not verdict.passed and not verdict.coefficients:
            self._report(state, step, trainer, Outcome.NOT_AS_SAID)
        else:
            self._report(state, step, trainer, Outcome.COMPARED, verdict)

    # -- peers ---------------------------------------------------------------------------------------------------------

    def receive(self, announcement: Announcement, state: Coordinator) -> None:
        """A peer of the epoch says something. The signature of the announcement was checked before."""
        sender = announcement.sender
        try:
            message = decode_momentum_message(announcement.data)
        except ProtocolError as error:
            self._outbox.drop(sender, DropReason.MALFORMED, str(error))
            return
        reason = self._refuses(sender, message, state)
        if reason is None and not message.is_signed_by(sender, state.run_id):
            reason = DropReason.BAD_SIGNATURE
        if reason is not None:
            self._outbox.drop(sender, reason, "a message about a momentum")
            return
        match message:
            case MomentumSaid(step=step):
                self._momenta[step, sender] = message
            case OpeningSaid(step=step, ticket=ticket):
                if (step, sender) in self._ours:
                    self._fetch(step, sender, ticket)
                else:
                    self._early[step, sender] = message
            case MomentumReport():
                self._settle(self._book.add(sender, message))

    def _refuses(self, sender: bytes, message: MomentumMessage, state: Coordinator) -> DropReason | None:
        """Why a message is of no use, before anything is done about it."""
        now = state.progress.step
        if message.epoch != state.progress.epoch or self._plan is None:
            return DropReason.WRONG_STEP
        match message:
            case MomentumSaid(step=step):
                # It is of no use once the seed of the round that draws is known; we may be a round behind ourselves.
                if not now - DRAWN_AFTER < step <= now + 1:
                    return DropReason.WRONG_STEP
                return DropReason.DUPLICATE if (step, sender) in self._momenta else None
            case OpeningSaid(step=step, ticket=ticket):
                challenge = self._book.challenge(step, sender)
                if challenge is None or self._me not in challenge.auditors:
                    return DropReason.WRONG_STEP  # nobody asked for it, or not for us
                if ticket.format is not BlobFormat.RAW or ticket.addr.id != sender:
                    return DropReason.MALFORMED
                ours = self._ours.get((step, sender))
                known = (step, sender) in self._early or (ours is not None and ours.blob is not None)
                return DropReason.DUPLICATE if known else None
            case MomentumReport():
                if not self._book.expects(sender, message):
                    return DropReason.WRONG_STEP
                return DropReason.DUPLICATE if self._book.has(sender, message) else None
        return DropReason.MALFORMED

    def fetched(self, blob: bytes, data: bytes, state: Coordinator) -> None:
        """A download is here, of an opening or of something else."""
        for (step, _), audit in self._ours.items():
            if audit.blob is not None and audit.blob.hash == blob and not audit.computing:
                audit.computing = True
                self._outbox.put(
                    AuditMomentum(
                        step=state.progress.step,
                        of_step=step,
                        challenge=audit.challenge,
                        opening=data,
                        batch=audit.batch,
                        before=audit.before,
                        after=audit.after,
                        decays=audit.decays,
                        previous=audit.previous,
                        sent=audit.sent,
                    )
                )

    # -- inside --------------------------------------------------------------------------------------------------------

    def _commitment(self, said: MomentumSaid) -> MomentumCommitment:
        layout = b"" if self._plan is None else self._plan.layout
        return MomentumCommitment(said.step, layout, said.root)

    def _fetch(self, step: int, trainer: bytes, ticket: BlobTicket) -> None:
        audit = self._ours[step, trainer]
        if self._plan is None:
            return
        audit.blob = ticket
        # From the trainer alone: what it shows is kept by nobody else.
        self._outbox.put(
            FetchBlob(
                ticket=ticket,
                providers=(),
                max_size=max_opening_bytes(self._plan, LEAVES),
                tag=f"{OPENING_TAG}_{self._step + 1}",
            )
        )

    def _fetch_again(self) -> None:
        """What has not come yet is asked for once in a round."""
        for (step, trainer), audit in self._ours.items():
            if audit.blob is not None and not audit.computing:
                self._fetch(step, trainer, audit.blob)

    def _give_up(self, state: Coordinator) -> None:
        """Says of openings that have not come that they have not."""
        for (step, trainer), audit in list(self._ours.items()):
            if self._step < audit.drawn_in + OPENING_ROUNDS or audit.epoch != state.progress.epoch:
                continue
            if audit.computing:
                continue  # we are too slow ourselves
            del self._ours[step, trainer]
            if self._hears_well():
                self._report(state, step, trainer, Outcome.NOT_SHOWN)

    def _hears_well(self) -> bool:
        """Whether we have heard in time of most momenta of the last step whose results count: otherwise it is we that
        are slow, or cut off, and that something did not come says nothing about anybody else."""
        if not self._counted:
            return False
        step = max(self._counted)
        others = self._counted[step].keys() - {self._me}
        return 2 * sum((step, peer) in self._momenta for peer in others) > len(others)

    def _report(
        self, state: Coordinator, step: int, trainer: bytes, outcome: Outcome, verdict: Verdict | None = None
    ) -> None:
        found = Distances(0, 0, 0) if verdict is None else distances_of(verdict)
        report = MomentumReport(
            state.progress.epoch,
            step,
            bytes(64),
            0,
            trainer,
            outcome,
            found,
            0 if verdict is None else min(verdict.coefficients, 0xFFFF_FFFF),
            self._own_noise.pop(step, None),
        ).signed(self._key, state.run_id)
        if not self._book.expects(self._me, report) or self._book.has(self._me, report):
            return
        self._say(report, REPETITIONS)
        self._settle(self._book.add(self._me, report))

    def _say(self, message: MomentumMessage, repetitions: int) -> None:
        self._outbox.put(AnnounceWeights(message.encode()))
        self._said.append((message, repetitions))

    def _say_again(self) -> None:
        said, self._said = self._said, []
        for message, left in said:
            again = message.again()
            self._outbox.put(AnnounceWeights(again.encode()))
            if left > 1:
                self._said.append((again, left - 1))

    def _forget(self, step: int) -> None:
        self._momenta = {key: said for key, said in self._momenta.items() if key[0] >= step - KEPT_SAID}
        self._counted = {of: counted for of, counted in self._counted.items() if of >= step - KEPT_SAID}
        self._early = {key: said for key, said in self._early.items() if self._book.challenge(*key) is not None}
        self._ours = {key: ours for key, ours in self._ours.items() if self._book.challenge(*key) is not None}
        self._own_noise = {of: noise for of, noise in self._own_noise.items() if of >= step - SETTLED_AFTER}

    def _tell(self, settled: list[Settled]) -> None:
        for each in settled:
            self._settle(each)

    def _settle(self, settled: Settled | None) -> None:
        if settled is not None:
            settle(settled, self._named, self._outbox)


def settle(settled: Settled, named: set[bytes], outbox: Outbox) -> None:
    """Says what came of an audit; that a peer has failed it says once, by whichever test found it first.

    Args:
        settled: by either test.
        named: peers that have failed in this epoch; changed.
        outbox: where it goes.
    """
    if not settled.passed:
        if settled.trainer in named:
            return
        named.add(settled.trainer)
    outbox.put(AuditSettled(trainer=settled.trainer, step=settled.step, passed=settled.passed, words=settled.words))
