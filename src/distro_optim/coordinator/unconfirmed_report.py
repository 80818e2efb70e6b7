"""A report that a coordinator may never have got. No I/O.

A coordinator does not answer, but its state lists the reports that it holds. A report that is under way when the link
breaks is lost. If we are back before the coordinator has missed us, it still waits for that report, and the round could
stand still until its time is over. The first state on a new link shows whether this has happened. While a link lasts
nothing is lost, and nothing must be sent twice: a report does not name its round, so one that comes too late may count
for the next round.
"""

from __future__ import annotations

from .messages import WitnessMessage
from .types import ROUND_PHASES, Coordinator, RunState

__all__ = ["UnconfirmedReport"]

_Phase = tuple[bool, int, int]


class UnconfirmedReport:
    """The latest report; there is one in each warm-up and each round."""

    def __init__(self) -> None:
        self._message: WitnessMessage | None = None
        self._phase: _Phase | None = None

    def sent(self, message: WitnessMessage, state: Coordinator) -> None:
        """A report is under way, or would be if there were a link; ``state`` is the state that it is about."""
        self._message, self._phase = message, _phase_of(state)

    def missing_in(self, state: Coordinator) -> WitnessMessage | None:
        """The report that has to be sent again, given the first state on a new link; None if there is none."""
        if self._message is None or self._phase is None or _phase_of(state) != self._phase:
            return None
        index = self._message.data.witness.proof.index
        is_held = any(report.proof.index == index for report in state.current_round.witnesses)
        return None if is_held else self._message


def _phase_of(state: Coordinator) -> _Phase | None:
    """Which warm-up or round it is; None if no reports are wanted."""
    if state.run_state is RunState.WARMUP:
        return True, state.progress.epoch, state.epoch_state.start_timestamp
    if state.run_state in ROUND_PHASES:
        return False, state.progress.epoch, state.progress.step
    return None
