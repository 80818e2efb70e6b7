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
from typing import Final

from typing_extensions import override

from ....verify.sequential import SAMPLES_OF_A_PEER, Balance, Usual, usual_of
from .docket import AGREEING, Audit, Docket, Settled
from .reports import AuditReport

__all__ = ["KEPT_STEPS", "TOLERANCE", "AuditBook"]

TOLERANCE: Final = 0.05
"""Between two honest auditors' shares of signs that agree; between float32 and bfloat16 it was 0.01 (tests/verify).
Chosen above that."""

KEPT_STEPS: Final = 6
"""From a round to when what is known of its audits is settled. Its results are drawn and audited two rounds later; the
rest is for slow auditors. Chosen arbitrarily."""

FEW: Final = 8
"""Coefficients by which two honest auditors may differ besides, which is much in a small model. Chosen arbitrarily."""


class AuditBook(Docket[AuditReport]):
    """See the module.

    Args:
        counts: whether the owner of a public key is a peer whose reports count.
        agreeing: auditors that have to agree; 1 for a peer that audits by itself.
        of_others: what is usual follows from what was found in the audited results, for an auditor that has none of
            its own.
    """

    def __init__(self, counts: Callable[[bytes], bool], *, agreeing: int = AGREEING, of_others: bool = False) -> None:
        super().__init__(counts)
        self._agreeing = agreeing
        self._of_others = of_others
        self._own: dict[bytes, deque[float]] = {}  # what auditors found of themselves
        self._balances: dict[bytes, Balance] = {}

    # -- what is audited -----------------------------------------------------------------------------------------------

    @override
    def _keep_only(self, clients: Collection[bytes]) -> None:
        self._own = {key: own for key, own in self._own.items() if key in clients}
        self._balances = {key: balance for key, balance in self._balances.items() if key in clients}

    def expect(self, epoch: int, step: int, drawn: Iterable[tuple[bytes, tuple[bytes, ...]]]) -> None:
        """These peers are audited, each by these auditors."""
        for trainer, auditors in drawn:
            self._audits.setdefault((step, trainer), Audit(auditors, epoch))

    def audited_by(self, auditor: bytes, step: int) -> tuple[bytes, ...]:
        """The peers whose results of a step an auditor is to look at."""
        return tuple(
            trainer for (of, trainer), audit in self._audits.items() if of == step and auditor in audit.auditors
        )

    # -- what is known -------------------------------------------------------------------------------------------------

    @property
    def usual(self) -> Usual | None:
        """What honest results have; None while too little is known."""
        return usual_of({key: list(own) for key, own in self._own.items()})

    # -- inside --------------------------------------------------------------------------------------------------------

    @override
    def _decide(self, step: int, trainer: bytes, reports: dict[bytes, AuditReport]) -> Settled | None:
        agreed = self._agreed(reports)
        if not agreed:
            return None
        usual = self.usual  # before this audit
        for auditor in agreed:
            own = reports[auditor].own
            if self._of_others:
                own, auditor = reports[auditor].found, trainer
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
        words = (
            f"signs side with its batch at {found:.2f} where that tells anything, honest ones at {usual.middle:.2f}, "
            f"those of results that were not trained at 0.50 (audit {audits}, by {auditors})"
        )
        if verdict is False:
            return self._verdict(trainer, step, words, passed=False)
        if not usual.is_near(found):
            return None  # it speaks against it, but not enough yet
        return self._verdict(trainer, step, words, passed=True)

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
            self._note(auditor, contradicted=auditor not in best)
        return best
