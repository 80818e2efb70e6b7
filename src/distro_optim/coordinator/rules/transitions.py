"""Which input and which change of phase is legal: two tables, and the errors for what is not in them.

The phases and their changes are those of PsycheFoundation/psyche, ``shared/coordinator/src/coordinator.rs``;
``docs/coordinator.md`` draws them.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from typing import Final

from ...errors import CoordinatorError, CoordinatorErrorCode
from ..types import ROUND_PHASES, Coordinator, RunState

__all__ = ["ACCEPTS", "LEADS_TO", "Input", "enter", "expect", "is_active", "is_halted", "refusal"]


class Input(Enum):
    """What can happen to a run."""

    TICK = "tick"
    WARMUP_WITNESS = "warmup_witness"
    WITNESS = "witness"
    HEALTH_CHECK = "health_check"
    CHECKPOINT = "checkpoint"
    WITHDRAW = "withdraw"
    PAUSE = "pause"
    RESUME = "resume"


_S = RunState
_HALTED: Final = frozenset({_S.UNINITIALIZED, _S.FINISHED, _S.PAUSED})
_RUNNING: Final = frozenset(_S) - _HALTED
_ACTIVE: Final = ROUND_PHASES | {_S.COOLDOWN}

ACCEPTS: Final[dict[Input, frozenset[RunState]]] = {
    Input.TICK: _RUNNING,
    Input.WARMUP_WITNESS: frozenset({_S.WARMUP, _S.ROUND_TRAIN}),
    Input.WITNESS: ROUND_PHASES,
    Input.HEALTH_CHECK: _RUNNING,
    Input.CHECKPOINT: frozenset(_S),
    Input.WITHDRAW: frozenset(_S),
    Input.PAUSE: _RUNNING,
    Input.RESUME: frozenset({_S.PAUSED}),
}

LEADS_TO: Final[dict[RunState, frozenset[RunState]]] = {
    _S.UNINITIALIZED: frozenset(),
    _S.WAITING_FOR_MEMBERS: frozenset({_S.WARMUP, _S.PAUSED}),
    _S.WARMUP: frozenset({_S.ROUND_TRAIN, _S.WAITING_FOR_MEMBERS, _S.FINISHED, _S.PAUSED}),
    # To WaitingForMembers or Finished only within the tick that ends a warm-up with too few clients.
    _S.ROUND_TRAIN: frozenset({_S.ROUND_WITNESS, _S.WAITING_FOR_MEMBERS, _S.FINISHED}),
    _S.ROUND_WITNESS: frozenset({_S.ROUND_TRAIN, _S.COOLDOWN}),
    _S.COOLDOWN: frozenset({_S.WAITING_FOR_MEMBERS, _S.FINISHED, _S.PAUSED}),
    _S.PAUSED: frozenset({_S.WAITING_FOR_MEMBERS, _S.FINISHED}),
    _S.FINISHED: frozenset(),
}


def is_halted(state: Coordinator) -> bool:
    """Whether time passes without effect."""
    return state.run_state in _HALTED


def is_active(state: Coordinator) -> bool:
    """Whether the run is between the start of a training and the end of a cooldown."""
    return state.run_state in _ACTIVE


def expect(state: Coordinator, input_: Input) -> None:
    """Raises CoordinatorError unless the present phase accepts this input."""
    if state.run_state in ACCEPTS[input_]:
        return
    if input_ is Input.RESUME:
        code = CoordinatorErrorCode.CANNOT_RESUME
    elif state.run_state in _HALTED:
        code = CoordinatorErrorCode.HALTED
    else:
        code = CoordinatorErrorCode.INVALID_RUN_STATE
    accepted = ", ".join(sorted(accepting.name for accepting in ACCEPTS[input_]))
    raise refusal(state, input_, code, f"it is taken in {accepted}")


def refusal(state: Coordinator, input_: Input, code: CoordinatorErrorCode, message: str) -> CoordinatorError:
    """The error that says what was refused, where and why."""
    return CoordinatorError(code, message, run_state=state.run_state, input=input_.value)


def enter(state: Coordinator, run_state: RunState, now: int) -> Coordinator:
    """Begins a phase at Unix time ``now``. Raises CoordinatorError if the present phase cannot lead there."""
    if run_state not in LEADS_TO[state.run_state]:
        raise CoordinatorError(
            CoordinatorErrorCode.INVALID_RUN_STATE, f"no way leads to {run_state.name}", run_state=state.run_state
        )
    return replace(state, run_state=run_state, run_state_start_unix_timestamp=now)
