"""When a client should tell the chain that time has passed. No I/O, no clock.

Nothing happens on chain unless somebody sends a transaction: the clients are the clock of a run. In Psyche
(PsycheFoundation/psyche, ``solana-client/src/app.rs``) each client looks whether a tick would change the phase, and
then sends one with a chance of two in the number of clients, so that about two of them do. We keep the chance, so that
mixed runs behave, and use the cluster's clock, since a tick that comes too early changes nothing and costs its fee.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from ....errors import CoordinatorError
from ...rules import machine
from ...rules.transitions import is_halted
from ...types import Coordinator, NodeIdentity

__all__ = ["ALWAYS_UP_TO", "MARGIN_SECONDS", "is_tick_due", "should_tick"]

ALWAYS_UP_TO: Final = 2
"""So many clients leave nothing to chance."""

MARGIN_SECONDS: Final = 1
"""The cluster's clock counts whole seconds, and ours is an estimate of it."""


def is_tick_due(state: Coordinator, pending: Collection[NodeIdentity], now: int) -> bool:
    """Whether a tick at Unix time ``now`` would change the phase of the run.

    Args:
        state: the run.
        pending: the clients that want to be in the next epoch.
        now: seconds, by the cluster's clock.
    """
    return _after_tick(state, pending, now).run_state is not state.run_state


def should_tick(
    state: Coordinator, pending: Collection[NodeIdentity], now: int, draw: float, *, margin: int = MARGIN_SECONDS
) -> bool:
    """Whether this client should send a tick.

    Args:
        state: the run.
        pending: the clients that want to be in the next epoch.
        now: seconds, by the cluster's clock.
        draw: uniform in [0, 1).
        margin: seconds that a phase must be overdue.
    """
    after = _after_tick(state, pending, now - margin)
    if after.run_state is state.run_state:
        return False
    count = len(after.epoch_state.clients)
    return count <= ALWAYS_UP_TO or draw < ALWAYS_UP_TO / count


def _after_tick(state: Coordinator, pending: Collection[NodeIdentity], now: int) -> Coordinator:
    if is_halted(state):
        return state
    try:
        return machine.tick(state, pending, now, seed=0)[0]
    except CoordinatorError:
        return state
