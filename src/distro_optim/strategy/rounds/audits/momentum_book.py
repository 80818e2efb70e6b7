"""Reports of audits by test 2, and the rule by which they decide about a peer. No I/O.

1. A result is audited by up to three peers. What at least two of them say counts: that the momentum follows from the
   one before, that it does not, or that it was not shown.
2. Auditors report distances, and everybody compares them with the limits of the run, which are learnt from what most
   auditors find in their own momenta (:mod:`~distro_optim.verify.calibrate`). Until there are limits, and where the
   noise of honest peers is beyond all that could be told from a lie, nothing is decided but that nothing was shown.
3. A peer fails with the second of its last eight audits that finds another momentum (:data:`LIES`), or with the sixth
   of them for which it showed none (:data:`NOT_SHOWN`). Nobody honest lies; but a peer may be away, its messages may be
   lost, and a bit of its memory may flip.
4. An auditor that two others contradict is noted, as with test 1 (:data:`~.docket.CONTRADICTIONS`). That one of them
   got an opening and another one did not is no contradiction.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from typing_extensions import override

from ....errors import ConfigurationError
from ....verify.audit import Challenge
from ....verify.calibrate import (
    LOOSEST,
    SAMPLES_OF_A_PEER,
    Limits,
    Noise,
    is_within_reach,
    learn,
    of_the_quieter_half,
)
from .docket import AGREEING, Audit, Docket, Settled
from .momentum_messages import Distances, MomentumReport, Outcome

__all__ = ["LAST_AUDITS", "LIES", "NOT_SHOWN", "MomentumBook"]

LAST_AUDITS: Final = 8
"""Of a peer that count. Chosen arbitrarily."""

LIES: Final = 2
"""Of these, after which a peer fails: one could be an accident of its machine."""

NOT_SHOWN: Final = 6
"""Of these, after which a peer fails. A slow peer is asked in rounds whose result a quorum saw in time, so that it was
there; and it cannot choose which audits it leaves out, since those that it lets happen would find it."""

_WORDS: Final = {
    "jaccard": "Jaccard distance of what was sent",
    "hamming": "Hamming distance of the signs",
    "manhattan": "Manhattan distance of the momentum",
}


@dataclass
class _MomentumAudit(Audit[MomentumReport]):
    challenge: Challenge = field(kw_only=True)


class MomentumBook(Docket[MomentumReport]):
    """See the module.

    Args:
        counts: whether the owner of a public key is a peer whose reports count.
        limits: that were learnt before; None begins without.
    """

    def __init__(self, counts: Callable[[bytes], bool], limits: Limits | None = None) -> None:
        super().__init__(counts)
        self._limits = limits
        self._noise: dict[bytes, deque[Noise]] = {}
        self._of_noise: tuple[Limits | None, bool] | None = None
        self._last: dict[bytes, deque[Outcome | bool]] = {}  # True passed, False lied

    # -- what is audited -----------------------------------------------------------------------------------------------

    @override
    def _keep_only(self, clients: Collection[bytes]) -> None:
        self._noise = {key: noise for key, noise in self._noise.items() if key in clients}
        self._of_noise = None
        self._last = {key: last for key, last in self._last.items() if key in clients}

    def expect(self, epoch: int, step: int, challenge: Challenge) -> None:
        """A result of ``step`` is audited."""
        audit = _MomentumAudit(challenge.auditors, epoch, challenge=challenge)
        self._audits.setdefault((step, challenge.trainer), audit)

    def challenge(self, step: int, trainer: bytes) -> Challenge | None:
        """Of an audit that is under way."""
        audit = self._audits.get((step, trainer))
        return audit.challenge if isinstance(audit, _MomentumAudit) else None

    # -- what is known -------------------------------------------------------------------------------------------------

    @property
    def limits(self) -> Limits | None:
        """Of the run; None while nobody knows what is usual, or if it cannot be told from a lie."""
        return self._learnt()[0]

    @property
    def is_beyond_reach(self) -> bool:
        """Whether honest peers find so much noise that nothing can be decided."""
        return self._learnt()[1]

    def _learnt(self) -> tuple[Limits | None, bool]:
        """Both, computed when there is other noise: whoever shows the run asks at every state."""
        if self._of_noise is None:
            noise = {key: list(found) for key, found in self._noise.items()}
            limits = self._limits
            if noise and not is_within_reach(noise):
                self._of_noise = None, True
                return self._of_noise
            with suppress(ConfigurationError):  # too little of it
                limits = learn(of_the_quieter_half(noise))
            self._of_noise = limits, False
        return self._of_noise

    def samples_of(self, auditor: bytes) -> int:
        """How often an auditor has said what it found in its own momentum."""
        return len(self._noise.get(auditor, ()))

    # -- inside --------------------------------------------------------------------------------------------------------

    @override
    def _decide(self, step: int, trainer: bytes, reports: dict[bytes, MomentumReport]) -> Settled | None:
        limits = self.limits  # before this audit
        for auditor, report in reports.items():
            if report.own is not None:
                self._noise.setdefault(auditor, deque(maxlen=SAMPLES_OF_A_PEER)).append(report.own.noise())
                self._of_noise = None
        said = {auditor: _said_by(report, limits) for auditor, report in reports.items()}
        for verdict in (False, True, Outcome.NOT_SHOWN):
            agreed = [auditor for auditor, each in said.items() if each is verdict]
            if len(agreed) >= AGREEING:
                self._note_contradictions(said, agreed, verdict)
                return self._count(trainer, step, verdict, [reports[auditor] for auditor in agreed], limits)
        return None

    def _note_contradictions(
        self, said: dict[bytes, Outcome | bool | None], agreed: list[bytes], verdict: Outcome | bool
    ) -> None:
        for auditor, each in said.items():
            contradicts = isinstance(verdict, bool) and isinstance(each, bool) and each is not verdict
            if not contradicts and auditor not in agreed:
                continue
            self._note(auditor, contradicted=contradicts)

    def _count(
        self, trainer: bytes, step: int, verdict: Outcome | bool, reports: list[MomentumReport], limits: Limits | None
    ) -> Settled | None:
        if trainer in self._failed:
            return None
        last = self._last.setdefault(trainer, deque(maxlen=LAST_AUDITS))
        last.append(verdict)
        lies, away = last.count(False), last.count(Outcome.NOT_SHOWN)
        if verdict is True:
            return self._verdict(trainer, step, _found(reports, limits), passed=True)
        if lies < LIES and away < NOT_SHOWN:
            return None  # it speaks against it, but not enough yet
        of_its = f"of its last {len(last)} audits by momentum"
        if verdict is False and lies >= LIES:
            words = (
                f"momentum is not what its batch makes of the one before: {_found(reports, limits)} ({lies} {of_its})"
            )
        else:
            words = f"momentum was not shown, though its result was there in time ({away} {of_its})"
        return self._verdict(trainer, step, words, passed=False)


def _said_by(report: MomentumReport, limits: Limits | None) -> Outcome | bool | None:
    """What an auditor says: True that it passed, False that it lied, or that nothing was shown; None says nothing."""
    if report.outcome is Outcome.NOT_SHOWN:
        return Outcome.NOT_SHOWN
    if report.outcome is Outcome.NOT_AS_SAID:
        return False
    return None if limits is None else not _beyond(report.found, limits)


def _beyond(found: Distances, limits: Limits) -> list[tuple[str, float, float]]:
    """Distances that are too large, and their limits."""
    numbers = [(name, getattr(found.noise(), name), getattr(limits, name)) for name in _WORDS]
    return [(name, value, most) for name, value, most in numbers if value > most]


def _found(reports: list[MomentumReport], limits: Limits | None) -> str:
    """The words of one auditor, the one whose numbers are in the middle."""
    compared = [report for report in reports if report.outcome is Outcome.COMPARED]
    if not compared:
        return "what it opened is not what it had committed to"
    middle = sorted(compared, key=lambda report: report.found.manhattan)[(len(compared) - 1) // 2].found
    if beyond := _beyond(middle, limits or LOOSEST):
        return ", ".join(f"{_WORDS[name]} {value:.3f}, at most {most:.3f} expected" for name, value, most in beyond)
    return f"momentum is within {middle.noise().manhattan:.4f} of what its batch makes of the one before"
