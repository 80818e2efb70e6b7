"""For how long the warm-up waits for clients on probation, when all others are ready. No I/O, no clock."""

from __future__ import annotations

from typing import Final

from ..rules.probation import on_probation
from ..types import Coordinator, NodeIdentity, RunState

__all__ = ["WarmingUp"]

WARMUP_SHARE: Final = 0.25
"""Of the warm-up's time, to wait for clients on probation once all others are ready. Halved each time it was in vain,
down to a sixty-fourth of it, and doubled when it was not."""


class WarmingUp:
    """The warm-up under way, and what earlier ones have taught. Times are seconds of one clock."""

    def __init__(self) -> None:
        self._ready: float | None = None  # since when all others are
        self._is_given_up = False
        self._share = WARMUP_SHARE

    def follow(self, state: Coordinator, now: float) -> None:
        """The state of the run while it is in no round."""
        if state.run_state is not RunState.WARMUP:
            self._ready = None
        elif self._ready is None:
            newcomers = on_probation(state)
            if newcomers and _ready(state).issuperset(set(range(len(state.epoch_state.clients))) - newcomers):
                self._ready = now

    def is_given_up(self, state: Coordinator, now: float) -> bool:
        """Whether it has waited for long enough for those who are not ready yet."""
        longest = self._share * state.config.warmup_time
        is_over = self._ready is not None and now - self._ready >= longest
        self._is_given_up = state.run_state is RunState.WARMUP and is_over
        return self._is_given_up

    def end(self, before: Coordinator) -> frozenset[NodeIdentity]:
        """Training begins after the state ``before``; returns those for whom the warm-up waited in vain."""
        newcomers = on_probation(before)
        missing = newcomers - _ready(before)
        # A report that ends a warm-up is not among those that ``before`` has: then the one who is missing has sent it.
        in_vain = self._is_given_up or len(missing) > 1
        clients = before.epoch_state.clients
        if newcomers and self._ready is not None:
            share = self._share * (0.5 if in_vain else 2.0)
            self._share = min(WARMUP_SHARE, max(WARMUP_SHARE / 64, share))
        self._ready, self._is_given_up = None, False
        return frozenset(clients[place].id for place in missing) if in_vain else frozenset()


def _ready(state: Coordinator) -> set[int]:
    """Places of those who have said that they are."""
    return {witness.proof.index for witness in state.current_round.witnesses}
