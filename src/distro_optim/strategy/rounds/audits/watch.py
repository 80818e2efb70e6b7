"""The audits of a run as its rounds go by: drawn with each round, asked for, told, and settled. No I/O.

The random seed of a round says which results of two rounds before are audited, and by whom
(:func:`~distro_optim.verify.audit.draw_results`). Nobody knew it while a result could still go out, so that nobody can
train only what it will be asked about. Auditors are drawn among the clients that are not on probation. A result is
audited when it is about to be applied, in the round that draws it, at the weights that are there then: so nobody has to
keep any. They are a step later than the trainer has seen them; the signs of gradients hardly change from one step to
the next, and auditors compare with their own results, for which the same holds.

In a run of Psyche's nobody is drawn. There a client may audit by itself (``alone``), and tells only its own people. So
does one that only watches a run, of either kind: it has no results of its own, and learns what is usual from those of
the others, which is right where most of them are honest.
"""

from __future__ import annotations

from typing import Final

from ....comm.announcements import Announcement
from ....comm.signing import SecretKey
from ....coordinator.rules.checkpoints import audit_fraction_of, is_run_of_psyche
from ....coordinator.types import BatchId, Coordinator
from ....errors import ProtocolError
from ....verify.audit import draw_results
from ....verify.calibrate import Limits
from ....verify.recompute import Evidence
from ..actions import AnnounceWeights, AuditResult, AuditResults, DropReason, Outbox
from ..choose_result import Choice, DueResults
from ..round_state import RoundState
from ..trust.standing import Standing
from .book import KEPT_STEPS, AuditBook
from .docket import AGREEING, AuditCount, Settled
from .momentum_watch import MomentumWatch, settle
from .reports import AuditReport, Compared, decode_report, encode_report

__all__ = ["AuditWatch"]

REPETITIONS: Final = 2
"""Of a report, one in each of the rounds that follow, since gossip may lose it. Chosen arbitrarily."""


class AuditWatch:
    """See the module.

    Args:
        key: ours; signs reports.
        standing: who has trained; reports of others do not count.
        outbox: where what is to be done goes.
        alone: the share of results that we audit by ourselves in a run of Psyche's.
        limits: of test 2, as a checkpoint has them.
        watches: we are no client, and audit by ourselves in a run of any kind.

    Attributes:
        momenta: the same for test 2, in runs that audit momenta, too.
    """

    def __init__(
        self,
        key: SecretKey,
        standing: Standing,
        outbox: Outbox,
        *,
        alone: float = 0.0,
        limits: Limits | None = None,
        watches: bool = False,
    ) -> None:
        self._watches = watches
        self._named: set[bytes] = set()  # in this epoch, by either test
        self.momenta = MomentumWatch(key, standing, outbox, limits, named=self._named)
        self._key = key
        self._me = key.public
        self._standing = standing
        self._outbox = outbox
        self._alone = alone
        self._book = self._new_book(AGREEING)
        self._agreeing = AGREEING
        self._said: dict[tuple[int, bytes], tuple[AuditReport, int]] = {}

    def _new_book(self, agreeing: int) -> AuditBook:
        # Nobody needs standing in its own eyes.
        return AuditBook(
            lambda key: key == self._me or self._standing.has_earned(key), agreeing=agreeing, of_others=self._watches
        )

    def seen(self) -> dict[bytes, AuditCount]:
        """Audits of each peer by either test, by public key."""
        found = self._book.seen()
        for key, count in self.momenta.seen().items():
            before = found.get(key, AuditCount())
            found[key] = AuditCount(passed=before.passed + count.passed, failed=max(before.failed, count.failed))
        return found

    # -- rounds --------------------------------------------------------------------------------------------------------

    def begin_epoch(self, state: Coordinator) -> None:
        """An epoch forms."""
        agreeing = 1 if self._is_alone(state) else AGREEING
        if agreeing != self._agreeing:
            self._book, self._agreeing = self._new_book(agreeing), agreeing
        self._said.clear()
        self._tell(self._book.begin_epoch({client.id.p2p_identity for client in state.epoch_state.clients}))
        self.momenta.begin_epoch(state)
        self._named.clear()

    def begin_round(self, state: Coordinator, before: RoundState | None) -> None:
        """The round of ``state`` begins: it says who is audited for ``before``, the round two rounds back
        (:data:`~.docket.DRAWN_AFTER`); None if there was none in this epoch."""
        self.momenta.begin_round(state, before)
        alone = self._is_alone(state)
        fraction = self._alone if alone else audit_fraction_of(state.model.checkpoint)
        if not fraction:
            return
        self._tell(self._book.settle_before(state.progress.step - KEPT_STEPS))
        self._say_again()
        if before is None:
            return
        trainers = [owner.p2p_identity for owner in before.assignments.values()]
        auditors = [client.p2p_identity for client in before.regular]
        seed = state.current_round.random_seed
        if alone:
            auditors = [self._me]
            trainers = [trainer for trainer in trainers if trainer != self._me]
        drawn = draw_results(seed, before.step, trainers, auditors, fraction)
        self._book.expect(state.progress.epoch, before.step, drawn)

    def ask(self, state: Coordinator, due: DueResults, choice: Choice) -> None:
        """These results are about to be applied: asks the trainer for the audits that are ours."""
        self.momenta.ask(state, due, choice)
        wanted = self._book.audited_by(self._me, due.round.step)
        if not wanted:
            return
        updates = {counted.owner: update for counted, update in zip(choice.applied, choice.updates, strict=True)}
        batches = {owner.p2p_identity: batch for batch, owner in due.round.assignments.items()}
        audited = tuple(
            AuditResult(trainer=trainer, batch=batches[trainer], update=updates[trainer])
            for trainer in wanted
            if trainer in updates and trainer in batches
        )
        own_batch = batches.get(self._me)
        if not audited:
            return
        if self._watches:
            self._ask_in_pairs(due, audited)
            return
        own = updates.get(self._me)
        self._outbox.put(
            AuditResults(
                step=due.step,
                of_step=due.round.step,
                audited=audited,
                control=own_batch if own_batch is not None else _other_batch(audited, list(due.round.assignments)),
                own=own if own_batch is not None else None,
            )
        )

    # -- reports -------------------------------------------------------------------------------------------------------

    def audited(self, state: Coordinator, step: int, trainer: bytes, found: Evidence, own: Evidence | None) -> None:
        """The trainer has audited the result of ``trainer`` in ``step``."""
        report = AuditReport(
            state.progress.epoch, step, trainer, Compared.of(found), None if own is None else Compared.of(own)
        ).signed(self._key, state.run_id)
        if not self._book.expects(self._me, report) or self._book.has(self._me, report):
            return  # it took too long
        if self._agreeing > 1:
            self._said[step, trainer] = report, REPETITIONS
            self._outbox.put(AnnounceWeights(encode_report(report)))
        self._settle(self._book.add(self._me, report))

    def receive(self, announcement: Announcement, run_id: str) -> None:
        """A peer of the epoch reports. The signature of the announcement was checked before."""
        if self._watches:
            return  # ours count here, and no others
        sender = announcement.sender
        try:
            report = decode_report(announcement.data)
        except ProtocolError as error:
            self._outbox.drop(sender, DropReason.MALFORMED, str(error))
            return
        if not self._book.expects(sender, report):
            self._outbox.drop(sender, DropReason.WRONG_STEP, "nobody was to audit that, or it comes too late")
        elif self._book.has(sender, report):
            self._outbox.drop(sender, DropReason.DUPLICATE)
        elif not report.is_signed_by(sender, run_id):
            self._outbox.drop(sender, DropReason.BAD_SIGNATURE, "the report of an audit is not signed by its sender")
        else:
            self._settle(self._book.add(sender, report))

    # -- inside --------------------------------------------------------------------------------------------------------

    def _is_alone(self, state: Coordinator) -> bool:
        return self._watches or is_run_of_psyche(state)

    def _ask_in_pairs(self, due: DueResults, audited: tuple[AuditResult, ...]) -> None:
        """All are compared with one batch, but for the one that was given that, which is compared with another."""
        batches = list(due.round.assignments)
        first = _other_batch(audited, batches)
        second = next((batch for batch in batches if batch != first), first)
        for control, those in (
            (first, tuple(each for each in audited if each.batch != first)),
            (second, tuple(each for each in audited if each.batch == first != second)),
        ):
            if those:
                self._outbox.put(
                    AuditResults(step=due.step, of_step=due.round.step, audited=those, control=control, own=None)
                )

    def _say_again(self) -> None:
        said, self._said = self._said, {}
        for key, (report, left) in said.items():
            again = report.again()
            self._outbox.put(AnnounceWeights(encode_report(again)))
            if left > 1:
                self._said[key] = again, left - 1

    def _tell(self, settled: list[Settled]) -> None:
        for each in settled:
            self._settle(each)

    def _settle(self, settled: Settled | None) -> None:
        if settled is not None:
            settle(settled, self._named, self._outbox)


def _other_batch(audited: tuple[AuditResult, ...], batches: list[BatchId]) -> BatchId:
    """One that is none of those audited, if there is one."""
    taken = {each.batch for each in audited}
    return next((batch for batch in batches if batch not in taken), batches[0])
