"""Audits that are under way, whose reports on them count, and what came of them so far: for either test. No I/O.

How several reports on one result decide is for who derives from :class:`Docket`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Final, Generic, Protocol, TypeVar

__all__ = ["AGREEING", "CONTRADICTIONS", "DRAWN_AFTER", "Audit", "AuditCount", "Docket", "Settled"]

DRAWN_AFTER: Final = 2
"""Rounds, until the seed that says who is audited. Results count if they come before the next round is over: with the
seed of that one, a peer could wait for it, and train only what it is asked about."""

AGREEING: Final = 2
"""Auditors that have to agree."""

CONTRADICTIONS: Final = 3
"""After which an auditor's reports do not count. Chosen so that an accident does no harm."""

MAX_FAILED: Final = 256
"""Peers that have failed and are gone, that are still shown. Chosen arbitrarily."""


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


class Report(Protocol):
    """What an auditor says of a result."""

    @property
    def epoch(self) -> int:
        """In which the result was made."""

    @property
    def step(self) -> int:
        """In which it was made."""

    @property
    def trainer(self) -> bytes:
        """Public key of who sent it."""


R = TypeVar("R", bound=Report)


@dataclass
class Audit(Generic[R]):
    """One audit, until it is settled."""

    auditors: tuple[bytes, ...]
    epoch: int
    reports: dict[bytes, R] = field(default_factory=dict)


class Docket(ABC, Generic[R]):
    """See the module.

    Args:
        counts: whether the owner of a public key is a peer whose reports count.
    """

    def __init__(self, counts: Callable[[bytes], bool]) -> None:
        self._counts = counts
        self._audits: dict[tuple[int, bytes], Audit[R]] = {}
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
        self._keep_only(clients)
        self._contradicted = {key: count for key, count in self._contradicted.items() if key in clients}
        failed = [key for key, count in self._seen.items() if count.failed and key not in clients]
        kept = {*clients, *failed[-MAX_FAILED:]}
        self._seen = {key: count for key, count in self._seen.items() if key in kept}
        return settled

    @abstractmethod
    def _keep_only(self, clients: Collection[bytes]) -> None:
        """Forgets what else was kept of those that are not in the epoch."""

    # -- reports -------------------------------------------------------------------------------------------------------

    def expects(self, auditor: bytes, report: R) -> bool:
        """Whether a report is about an audit that is under way, of one of its auditors."""
        audit = self._audits.get((report.step, report.trainer))
        return audit is not None and audit.epoch == report.epoch and auditor in audit.auditors

    def has(self, auditor: bytes, report: R) -> bool:
        """Whether this auditor has reported on it already."""
        audit = self._audits.get((report.step, report.trainer))
        return audit is not None and auditor in audit.reports

    def add(self, auditor: bytes, report: R) -> Settled | None:
        """Keeps a report that is expected and new; what came of the audit if this was the last that is waited for."""
        key = report.step, report.trainer
        audit = self._audits[key]
        audit.reports[auditor] = report
        return None if audit.reports.keys() < set(audit.auditors) else self._settle(key)

    def settle_before(self, step: int | None) -> list[Settled]:
        """Settles the audits of earlier steps by what there is; None settles all."""
        old = sorted(key for key in self._audits if step is None or key[0] < step)
        return [settled for key in old if (settled := self._settle(key)) is not None]

    def _settle(self, key: tuple[int, bytes]) -> Settled | None:
        (step, trainer), audit = key, self._audits.pop(key)
        return self._decide(step, trainer, {a: report for a, report in audit.reports.items() if self.has_weight(a)})

    @abstractmethod
    def _decide(self, step: int, trainer: bytes, reports: dict[bytes, R]) -> Settled | None:
        """What reports of auditors with weight say of a result; None if that is nothing new."""

    # -- what is known -------------------------------------------------------------------------------------------------

    def has_weight(self, auditor: bytes) -> bool:
        """Whether an auditor's reports count."""
        return self._counts(auditor) and self._contradicted.get(auditor, 0) < CONTRADICTIONS

    def seen(self) -> dict[bytes, AuditCount]:
        """Audits of each peer, by public key."""
        return dict(self._seen)

    def _note(self, auditor: bytes, *, contradicted: bool) -> None:
        """Others have contradicted an auditor, or confirmed it."""
        count = self._contradicted.get(auditor, 0) + (1 if contradicted else -1)
        if count > 0:
            self._contradicted[auditor] = count
        else:
            self._contradicted.pop(auditor, None)

    def _verdict(self, trainer: bytes, step: int, words: str, *, passed: bool) -> Settled:
        """Counts one."""
        before = self._seen.get(trainer, AuditCount())
        self._seen[trainer] = AuditCount(passed=before.passed + passed, failed=before.failed + (not passed))
        if not passed:
            self._failed.add(trainer)
        return Settled(trainer=trainer, step=step, passed=passed, words=words)
