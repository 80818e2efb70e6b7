"""For how long a round is held for clients on probation, when all others have reported. No I/O, no clock.

Who has just come is a little behind, and could never catch up with rounds that are short. Each of them has the time of
two rounds for that, and five seconds at least; all together have half as much again, and a twentieth of the time that
goes by comes back to that. A client that let a round or the warm-up wait in vain, or was dropped, has none left, and
each round in which it is in time gives it back as much as the others needed for it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from ..rules.probation import on_probation
from ..types import ClientState, Coordinator, NodeIdentity, RunState
from .purses import Purse

__all__ = ["MAX_REMEMBERED", "HeldRounds"]

NEWCOMER_SECONDS: Final = 5.0
"""For which rounds are held for a client on probation in all. It has none left after a warm-up that it let wait in
vain, so that a stranger has done what harm it can within ten seconds."""

NEWCOMER_ROUNDS: Final = 2.0
"""The same in times that the others need for a round, where those are longer: as it has to be seen in three rounds
(:data:`RESULTS_TO_EARN`), it may be half as slow again as the others."""

NEWCOMERS_COUNT: Final = 1.5
"""All clients on probation together have so many times what one has, so that one does not take it all. Chosen
arbitrarily."""

NEWCOMERS_SHARE: Final = 0.05
"""Of the time that goes by comes back to what all of them have."""

HOLD_SECONDS: Final = 5.0
"""For which one round is held at most. As long as peers wait for a result that nobody announced."""

SHORT_HOLD_SECONDS: Final = 3.0
"""The same for rounds of which the others need less than that: room for a first step that takes longer than the
following ones, and less than what a client has in all, as most that cost so much never come."""

HOLD_SHARE: Final = 0.25
"""Of a round's time at most."""

MAX_REMEMBERED: Final = 1024
"""Clients; beyond it the one of whom nothing was heard for longest is forgotten."""


class HeldRounds:
    """The round under way, and what is left to whom. Times are seconds of one clock."""

    def __init__(self) -> None:
        self._began = 0.0
        # Since when the round is held, and who of those on probation has said when that it has finished.
        self._held: float | None = None
        self._finished: dict[NodeIdentity, float] = {}
        # Which part of the time that rounds are held for each is used up.
        self._used: OrderedDict[NodeIdentity, float] = OrderedDict()
        self._purse: Purse | None = None

    def begin(self, now: float) -> None:
        """A round begins."""
        self._began, self._held, self._finished = now, None, {}

    def complete(self, now: float) -> None:
        """Nothing is missing any more but what clients on probation do."""
        self._held = now

    @property
    def is_held(self) -> bool:
        """Whether that was said."""
        return self._held is not None

    def heard(self, client: NodeIdentity, now: float) -> None:
        """A client on probation says that it has finished this round."""
        self._finished.setdefault(client, now)

    def holds(self, state: Coordinator, now: float) -> bool:
        """Whether the round goes on for somebody on probation."""
        awaited = self._awaited(state) if state.run_state is RunState.ROUND_TRAIN else frozenset()
        if not awaited:
            return False
        each, needed = self._seconds_of_newcomer(now), self._seconds_of_others(now)
        own = each * (1.0 - min(self._used.get(client, 0.0) for client in awaited))
        shared = NEWCOMERS_COUNT * each + self._purse_at(now).left(now)
        longest = min(HOLD_SECONDS, max(SHORT_HOLD_SECONDS, needed), HOLD_SHARE * state.config.max_round_train_time)
        return self._seconds_held(now) < min(longest, own, shared)

    def end(self, last: Coordinator, now: float) -> frozenset[NodeIdentity]:
        """The round of ``last`` is over: it takes what it cost from those who let it wait, and says who was in time."""
        held, awaited, each = self._seconds_held(now), self._awaited(last), self._seconds_of_newcomer(now)
        if self._held is not None and (awaited or any(when > self._held for when in self._finished.values())):
            self._purse_at(now).take(held, now)
        in_time = set()
        for client, when in self._finished.items():
            if self._held is None or when <= self._held:
                self._use_up(client, -self._seconds_of_others(now) / each)
                in_time.add(client)
            else:
                self._use_up(client, (when - self._held) / each)
        if held > 0:
            for client in awaited:
                self.use_up_all(client)
        return frozenset(in_time)

    def use_up_all(self, client: NodeIdentity) -> None:
        """No round is held for this client any more, until it has been in time again."""
        self._use_up(client, 1.0)

    def _use_up(self, client: NodeIdentity, part: float) -> None:
        """Of the time that rounds are held for a client, so much is used up, or given back if it is below 0."""
        used = min(self._used.pop(client, 0.0) + part, 1.0)
        if used > 0:
            self._used[client] = used
        if len(self._used) > MAX_REMEMBERED:
            self._used.popitem(last=False)

    def _awaited(self, state: Coordinator) -> frozenset[NodeIdentity]:
        """Those on probation for whom the round would be held, and who have not finished."""
        clients = [state.epoch_state.clients[place] for place in on_probation(state)]
        listed = {client.id for client in clients if client.state is ClientState.HEALTHY}
        used_up = {client for client, part in self._used.items() if part >= 1.0}
        return frozenset(listed - self._finished.keys() - used_up)

    def _seconds_held(self, now: float) -> float:
        return 0.0 if self._held is None else now - self._held

    def _seconds_of_newcomer(self, now: float) -> float:
        """For how long rounds are held for a client on probation in all, given what the others need for this one."""
        return max(NEWCOMER_SECONDS, NEWCOMER_ROUNDS * self._seconds_of_others(now))

    def _seconds_of_others(self, now: float) -> float:
        return (now if self._held is None else self._held) - self._began

    def _purse_at(self, now: float) -> Purse:
        """Of all clients on probation, beyond what they begin with."""
        if self._purse is None:
            self._purse = Purse(0.0, now, NEWCOMERS_SHARE, most=0.0)
        return self._purse
