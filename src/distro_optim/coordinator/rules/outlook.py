"""What a newcomer sees in the state of a run before asking to be in it: whether it can, and what it will wait for."""

from __future__ import annotations

from typing import Final

from ...errors import ConfigurationError
from ..model import AdamW
from ..types import MAX_NUM_CLIENTS, Coordinator, NodeIdentity, RunState
from .steps import is_prompt

__all__ = ["check_newcomer", "first_data_index", "waits_for"]

USUAL_WAIT_SECONDS: Final = 20
"""After which a run that a script hosts lets newcomers in, unless its host says otherwise
(:attr:`~distro_optim.strategy.config.RunConfig.joiner_wait_time`)."""

_UNDER_WAY: Final = frozenset({RunState.WARMUP, RunState.ROUND_TRAIN, RunState.ROUND_WITNESS, RunState.COOLDOWN})
"""An epoch is under way; a client that is not in it waits for the next."""

_ROUND: Final = frozenset({RunState.ROUND_TRAIN, RunState.ROUND_WITNESS})


def check_newcomer(state: Coordinator) -> None:
    """Refuses a run in which nobody can train with this package.

    Raises:
        ConfigurationError: it has verifiers, or an optimizer that exchanges nothing.
    """
    percent = state.config.verification_percent
    if percent:
        raise ConfigurationError(
            f"the run has {percent} % of its clients verify instead of train, which no implementation can: its "
            "coordinator must set verification_percent to 0",
            name="config.verification_percent",
            value=percent,
        )
    if isinstance(state.model.optimizer, AdamW):
        raise ConfigurationError(
            "the run's optimizer is AdamW, which exchanges nothing between peers: only Distro is trained with",
            name="optimizer",
            value="AdamW",
        )


def first_data_index(state: Coordinator) -> int:
    """The first sample that may be ours: of the present round, or of the next one if none is under way."""
    in_round = state.run_state in _ROUND
    return state.current_round.data_index if in_round else state.progress.epoch_start_data_index


def waits_for(state: Coordinator, me: NodeIdentity, now: float, missing: int | None = None) -> str | None:
    """What a client that has joined waits for, in words; None while it is in an epoch.

    Args:
        state: of the run.
        me: the client.
        now: Unix time in seconds, of this machine; the run's own clock may differ.
        missing: how many have still to come before an epoch can begin; None if that is not known, as it is to hosts.
    """
    clients = state.epoch_state.clients
    match state.run_state:
        case RunState.WAITING_FOR_MEMBERS | RunState.UNINITIALIZED:
            if missing is not None:
                return f"{missing} more peer{'s' if missing != 1 else ''} to begin with" if missing else None
            needed = state.config.init_min_clients
            return f"members: an epoch begins with at least {needed} client{'s' if needed != 1 else ''}"
        case RunState.PAUSED:
            return "the coordinator: the run is paused"
        case phase if phase in _UNDER_WAY and all(client.id != me for client in clients):
            if len(clients) >= MAX_NUM_CLIENTS:
                return f"a free place: an epoch has {MAX_NUM_CLIENTS} clients at most"
            are = f"{len(clients)} clients are" if len(clients) != 1 else "1 client is"
            return f"the next epoch{_soon(state)}: {are} in epoch {state.progress.epoch}{_left(state, now)}"
        case _:
            return None


def _soon(state: Coordinator) -> str:
    """When it usually begins, where that is not when the present one's time is over."""
    if not is_prompt(state):
        return ""
    if state.epoch_state.last_step:
        return f", after step {state.epoch_state.last_step}"
    return f", usually within {USUAL_WAIT_SECONDS} s"


def _left(state: Coordinator, now: float) -> str:
    """How long the epoch's time is, at most; a hosted run may end it earlier for us."""
    if state.run_state is RunState.COOLDOWN:
        return ", which is ending"
    left = int(state.epoch_state.start_timestamp + state.config.epoch_time - now)
    return f", for up to {left} s more" if 0 < left <= state.config.epoch_time else ", which is about to end"
