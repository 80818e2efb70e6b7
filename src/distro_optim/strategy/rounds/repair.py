"""A few of our tensors are wrong: when to fetch them again, and from whom, so that no epoch is lost. No I/O.

A bit flips, a disk lies: then one tensor differs, not the whole model, and all that is applied to it later is right.
The peers that are right have the weights of a step at hand only while its round goes on. So this begins with the round
after the one in which we learned of it::

    round s        our report differs; what we train is sent all the same: nobody's weights depend on how it was made
    round s+1      apply · hash · wait for the others' reports · RepairWeights · train

While we wait, the round waits for us, for as long as it would wait for a lost message. Whose weights are right is
decided by the reports of that round, as ever; what is fetched must have the hashes of which their root is made. What
cannot be repaired so, or not for long, is left to the next warm-up, which loads the whole model.
"""

from __future__ import annotations

import enum
from typing import Final

from ...comm.live_weights import MAX_WRONG_SHARE
from .actions import Desynced, Outbox, RepairWeights
from .trust.votes import Electorate
from .weights import Finding, Verdict, WeightsWatch

__all__ = ["MAX_FETCH_SECONDS", "MAX_REPAIRS", "Repair"]

MAX_REPAIRS: Final = 4
"""Rounds in an epoch that begin with a repair, or with the attempt. Each may cost all peers some seconds, and a machine
that needs more has a fault that this hides. Chosen arbitrarily."""

MAX_FETCH_SECONDS: Final = 30.0
"""For the repair itself, in which the round waits for us; at most a quarter of its time, too. The embedding of GPT-2
comes in that time at 40 Mbit/s. Chosen arbitrarily."""


class _Stage(enum.Enum):
    NONE = "nothing is known against our weights"
    WANTED = "they are wrong, and the next round begins with the repair"
    WAITING = "the round has begun, and we wait for the others' reports"
    ASKED = "the trainer was asked to repair them"


class Repair:
    """See the module.

    Args:
        watch: has the reports.
        outbox: where what is to be done goes.
    """

    def __init__(self, watch: WeightsWatch, outbox: Outbox) -> None:
        self._watch = watch
        self._outbox = outbox
        self._stage = _Stage.NONE
        self._fault: Desynced | None = None
        self._right: tuple[bytes, ...] = ()
        self._rounds = 0
        self._step = 0  # of the round that waits, or that asked
        self._waits_until: float | None = None

    @property
    def fault(self) -> Desynced | None:
        """What is to be repaired; None if there is nothing."""
        return self._fault

    @property
    def waits_until(self) -> float | None:
        """When :meth:`holds_back` will let the round go on, whatever has come; None if it waits for nothing."""
        return self._waits_until if self._stage is _Stage.WAITING else None

    @property
    def is_hopeless(self) -> bool:
        """Whether something is wrong that was to be repaired, and all rounds in which it might have been are over."""
        return self._stage in (_Stage.WANTED, _Stage.WAITING) and self._rounds >= MAX_REPAIRS

    def begin_epoch(self) -> None:
        """All may be repaired again; and what was to be repaired was loaded, or is given up."""
        self._rounds = 0
        self.give_up()

    def give_up(self) -> None:
        """There is nothing to repair, or no more in this way."""
        self._stage, self._fault, self._waits_until = _Stage.NONE, None, None

    # -- what is found -------------------------------------------------------------------------------------------------

    def takes(self, finding: Finding, step: int, *, final: bool) -> bool:
        """Whether ``finding``, about ``step``, is taken care of here; if not, it stands.

        Args:
            finding: what is wrong with our weights.
            step: at whose start.
            final: the round of that step is over.
        """
        if not finding.right:
            return False
        if self._stage is not _Stage.NONE:
            if not final or (self._stage is _Stage.ASKED and step == self._step):
                return True  # it is known, or its answer is on its way
            return self._rounds < MAX_REPAIRS
        few = 0 < len(finding.tensors) <= MAX_WRONG_SHARE * self._watch.num_tensors
        if not few or self._rounds >= MAX_REPAIRS:
            return False
        self._stage, self._right = _Stage.WANTED, finding.right
        self._fault = Desynced(step=step, reason=finding.reason, tensors=finding.tensors)
        return True

    # -- the round that begins with it ---------------------------------------------------------------------------------

    def holds_back(self, step: int, electorate: Electorate, now: float, *, seconds: float, longest: float) -> bool:
        """Whether the round of ``step``, whose weights are being hashed, must not begin to train yet.

        Args:
            step: of the round.
            electorate: whose reports count.
            now: monotonic time in seconds.
            seconds: to wait for reports at most.
            longest: seconds that fetching may take.
        """
        if self._stage is _Stage.WANTED or (self._stage is _Stage.WAITING and step != self._step):
            self._stage, self._step, self._waits_until = _Stage.WAITING, step, now + seconds
            self._rounds += 1
        if self._stage is not _Stage.WAITING:
            return False
        verdict = self._watch.verdict(step, electorate, final=False)
        if verdict is not None and verdict.confirmed and verdict.certain:
            self.give_up()  # it was not ours that were wrong, or they are not any more
            return False
        if verdict is not None and verdict.report is None and not electorate.deciding:
            verdict = self._as_before(step, electorate)
        if verdict is not None and verdict.report is not None:
            self._ask(step, verdict, longest)
            return False
        if self._waits_until is not None and now < self._waits_until:
            return True
        self._stage = _Stage.WANTED  # in the next round again
        return False

    def _as_before(self, step: int, electorate: Electorate) -> Verdict | None:
        """The verdict by the reports that have come, if they are of most of those that were right before.

        For a run in which nobody has standing yet: of two peers neither is ever a majority.
        """
        verdict = self._watch.verdict(step, electorate, final=True)
        if verdict is None or 2 * len(set(verdict.right).intersection(self._right)) <= len(self._right):
            return None
        return verdict

    def _ask(self, step: int, verdict: Verdict, longest: float) -> None:
        if verdict.report is not None:
            self._stage, self._right = _Stage.ASKED, verdict.right
            self._outbox.put(
                RepairWeights(step=step, root=verdict.report.root, providers=verdict.right, seconds=longest)
            )

    # -- what came of it -----------------------------------------------------------------------------------------------

    def repaired(self, step: int) -> bool:
        """The trainer has repaired the weights of ``step``; False if nobody asked for it."""
        if self._stage is not _Stage.ASKED or step != self._step:
            return False
        self.give_up()
        return True

    def failed(self, step: int) -> Desynced | None:
        """The trainer could not. What stands then, if that was the last attempt."""
        if self._stage is not _Stage.ASKED or step != self._step:
            return None
        self._stage = _Stage.WANTED
        return self._fault if self._rounds >= MAX_REPAIRS else None
