"""A report that a coordinator may never have got. No I/O.

A coordinator answers nothing, but its state names those whose reports it holds. What is under way when a link breaks is
lost, while the coordinator, to whom we come back before it has missed us, still waits for it: a round could stand still
until its time is over. The first state on a new link tells whether that has happened. On one and the same link nothing
is lost, and nothing must be said again: a report names no round, and one that comes too late may count as one about the
next.
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
        """A report is under way, or would be if there were a link; ``state`` is the one that it is about."""
        self._message, self._phase = message, _phase_of(state)

    def missing_in(self, state: Coordinator) -> WitnessMessage | None:
        """What has to be said again, if ``state`` is the first one on a new link."""
        if self._message is None or self._phase is None or _phase_of(state) != self._phase:
            return None
        index = self._message.data.witness.proof.index
        is_held = any(report.proof.index == index for report in state.current_round.witnesses)
        return None if is_held else self._message


def _phase_of(state: Coordinator) -> _Phase | None:
    """Warm-up or round; None: nobody wants reports."""
    if state.run_state is RunState.WARMUP:
        return True, state.progress.epoch, state.epoch_state.start_timestamp
    if state.run_state in ROUND_PHASES:
        return False, state.progress.epoch, state.progress.step
    return None
