"""Reports of auditors, and the rule by which they decide about a peer. No I/O.

1. A result is audited by up to three peers. Their reports count if at least two of them agree about how many of its
   signs agree with its batch (:data:`TOLERANCE`): that does not depend on anything that auditors choose.
2. Of those that agree, the second-lowest siding is taken: at least two say that it is no better.
3. What is usual in the run follows from what auditors found in their own results, one voice for each of them.
4. Sidings of a peer add up to a verdict (:class:`~distro_optim.verify.sequential.Balance`).
5. An auditor that two others contradict is noted, and after :data:`CONTRADICTIONS` more of these than of reports that
   others confirmed it has no weight any more.

Every peer keeps such a book, and the host acts by its own. One auditor alone decides nothing, nor does one that has no
standing: ``counts`` says who has.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Final

from ....verify.sequential import SAMPLES_OF_A_PEER, Balance, Usual, usual_of
from .reports import AuditReport

__all__ = ["CONTRADICTIONS", "KEPT_STEPS", "TOLERANCE", "AuditBook", "AuditCount", "Settled"]

AGREEING: Final = 2
"""Auditors that have to agree."""

TOLERANCE: Final = 0.05
"""Between two honest auditors' shares of signs that agree; between float32 and bfloat16 it was 0.01 (tests/verify).
Chosen above that."""

CONTRADICTIONS: Final = 3
"""After which an auditor's reports do not count. Chosen so that an accident does no harm."""

KEPT_STEPS: Final = 6
"""From a round to when what is known of its audits is settled. Its results are there one round later and are audited
another one later; the rest is for slow auditors. Chosen arbitrarily."""

MAX_FAILED: Final = 256
"""Peers that have failed and are gone, that are still shown. Chosen arbitrarily."""

FEW: Final = 8
"""Coefficients by which two honest auditors may differ besides, which is much in a small model. Chosen arbitrarily."""


@dataclass(frozen=True, kw_only=True)
class AuditCount:
    """Audits of one peer.

    Attributes:
        passed: with a result nearer to honest ones than to chance.
        failed: verdicts against it.
    """

    passed: int = 0
    failed: int = 0


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What came of an audit.

    Attributes:
        trainer: public key.
        step: of the result.
        passed: True if the result is near to honest ones; False if the peer has failed, with this and earlier ones.
        words: what was found.
    """

    trainer: bytes
    step: int
    passed: bool
    words: str


@dataclass
class _Audit:
    """One audit, until it is settled."""

    auditors: tuple[bytes, ...]
    epoch: int
    reports: dict[bytes, AuditReport] = field(default_factory=dict)


class AuditBook:
    """See the module.

    Args:
        counts: whether the owner of a public key is a peer whose reports count.
        agreeing: auditors that have to agree; 1 for a peer that audits by itself.
    """

    def __init__(self, counts: Callable[[bytes], bool], *, agreeing: int = AGREEING) -> None:
        self._counts = counts
        self._agreeing = agreeing
        self._audits: dict[tuple[int, bytes], _Audit] = {}
        self._own: dict[bytes, deque[float]] = {}  # what auditors found of themselves
        self._balances: dict[bytes, Balance] = {}
        self._contradicted: dict[bytes, int] = {}
        self._seen: dict[bytes, AuditCount] = {}
        # In this epoch: about these nothing more is to be said here. They are audited all the same: others, the host
        # among them, may have heard less than we.
        self._failed: set[bytes] = set()

    # -- what is audited -----------------------------------------------------------------------------------------------

    def begin_epoch(self, clients: Collection[bytes]) -> list[Settled]:
        """An epoch begins. Of those that are not in it only who has failed is remembered, for people to look at."""
        settled = self.settle_before(None)
        self._failed = set()
        # Identities cost nothing, so those that left are not kept; who comes back begins anew.
        self._own = {key: own for key, own in self._own.items() if key in clients}
        self._balances = {key: balance for key, balance in self._balances.items() if key in clients}
        self._contradicted = {key: count for key, count in self._contradicted.items() if key in clients}
        failed = [key for key, count in self._seen.items() if count.failed and key not in clients]
        kept = {*clients, *failed[-MAX_FAILED:]}
        self._seen = {key: count for key, count in self._seen.items() if key in kept}
        return settled

    def expect(self, epoch: int, step: int, drawn: Iterable[tuple[bytes, tuple[bytes, ...]]]) -> None:
        """These peers are audited, each by these auditors."""
        for trainer, auditors in drawn:
            self._audits.setdefault((step, trainer), _Audit(auditors, epoch))

    def audited_by(self, auditor: bytes, step: int) -> tuple[bytes, ...]:
        """The peers whose results of a step an auditor is to look at."""
        return tuple(
            trainer for (of, trainer), audit in self._audits.items() if of == step and auditor in audit.auditors
        )

    # -- reports -------------------------------------------------------------------------------------------------------

    def expects(self, auditor: bytes, report: AuditReport) -> bool:
        """Whether a report is about an audit that is under way, of one of its auditors."""
        audit = self._audits.get((report.step, report.trainer))
        return audit is not None and audit.epoch == report.epoch and auditor in audit.auditors

    def has(self, auditor: bytes, report: AuditReport) -> bool:
        """Whether this auditor has reported on it already."""
        audit = self._audits.get((report.step, report.trainer))
        return audit is not None and auditor in audit.reports

    def add(self, auditor: bytes, report: AuditReport) -> Settled | None:
        """Keeps a report that is expected and new; what came of the audit if this was the last that is waited for."""
        audit = self._audits[report.step, report.trainer]
        audit.reports[auditor] = report
        if audit.reports.keys() < set(audit.auditors):
            return None
        return self._settle((report.step, report.trainer))

    def settle_before(self, step: int | None) -> list[Settled]:
        """Settles the audits of earlier steps by what there is; None settles all."""
        old = sorted(key for key in self._audits if step is None or key[0] < step)
        found = (self._settle(key) for key in old if key in self._audits)
        return [settled for settled in found if settled is not None]

    # -- what is known -------------------------------------------------------------------------------------------------

    @property
    def usual(self) -> Usual | None:
        """What honest results have; None while too little is known."""
        return usual_of({key: list(own) for key, own in self._own.items()})

    def has_weight(self, auditor: bytes) -> bool:
        """Whether an auditor's reports count."""
        return self._counts(auditor) and self._contradicted.get(auditor, 0) < CONTRADICTIONS

    def seen(self) -> dict[bytes, AuditCount]:
        """Audits of each peer, by public key."""
        return dict(self._seen)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _settle(self, key: tuple[int, bytes]) -> Settled | None:
        (step, trainer), audit = key, self._audits.pop(key)
        reports = {auditor: report for auditor, report in audit.reports.items() if self.has_weight(auditor)}
        agreed = self._agreed(reports)
        if not agreed:
            return None
        usual = self.usual  # before this audit
        for auditor in agreed:
            own = reports[auditor].own
            if own is not None and (found := own.siding) is not None:
                self._own.setdefault(auditor, deque(maxlen=SAMPLES_OF_A_PEER)).append(found)
        sidings = sorted(s for auditor in agreed if (s := reports[auditor].found.siding) is not None)
        if usual is None or len(sidings) < self._agreeing:
            return None
        return self._weigh(trainer, step, sidings[self._agreeing - 1], usual, len(agreed))

    def _weigh(self, trainer: bytes, step: int, found: float, usual: Usual, auditors: int) -> Settled | None:
        if trainer in self._failed:
            return None
        balance = self._balances.setdefault(trainer, Balance())
        audits = balance.audits + 1
        verdict = balance.add(found, usual)
        before = self._seen.get(trainer, AuditCount())
        words = (
            f"signs side with its batch at {found:.2f} where that tells anything, honest ones at {usual.middle:.2f}, "
            f"those of results that were not trained at 0.50 (audit {audits}, by {auditors})"
        )
        if verdict is False:
            self._seen[trainer] = AuditCount(passed=before.passed, failed=before.failed + 1)
            self._failed.add(trainer)
            return Settled(trainer=trainer, step=step, passed=False, words=words)
        if usual.weigh(found) <= 0:
            return None  # it speaks against it, but not enough yet
        self._seen[trainer] = AuditCount(passed=before.passed + 1, failed=before.failed)
        return Settled(trainer=trainer, step=step, passed=True, words=words)

    def _agreed(self, reports: dict[bytes, AuditReport]) -> list[bytes]:
        """The largest group of auditors that agree with the one in its middle; the others are noted."""
        shares = {auditor: share for auditor, r in reports.items() if (share := r.found.share) is not None}
        if len(shares) < self._agreeing:
            # Of a result without anything to compare all that is said is that there is nothing.
            empty = [auditor for auditor, report in reports.items() if report.found.share is None]
            return empty if len(empty) >= self._agreeing else []
        total = statistics.median_low([report.found.total for report in reports.values() if report.found.total])
        near = TOLERANCE + FEW / total
        groups = [[other for other in shares if abs(shares[other] - shares[one]) <= near] for one in shares]
        best = max(groups, key=len)
        if len(best) < self._agreeing:
            return []
        for auditor in shares:
            wrong = self._contradicted.get(auditor, 0) + (1 if auditor not in best else -1)
            if wrong > 0:
                self._contradicted[auditor] = wrong
            else:
                self._contradicted.pop(auditor, None)
        return best
