"""Which clients of a run of our own kind are on probation, and for whom a round does not wait. No I/O, no clock.

Identities cost nothing, and everybody waits for everybody. So:

- a client is on probation until a quorum has seen some results of it (``rules/probation.py`` says what that means), and
  again when it was dropped;
- a round that waits for a client longer than its work is worth takes those seconds out of two purses, that client's
  own and one for all. Each holds a few seconds and a tenth of the time that goes by. When one of them is empty, the
  round goes on without the client, and it is on probation until both have filled up again. So one peer that evaluates
  its model for a minute is waited for, and one that is slow in every round is not, nor are many by turns.

What a client's work is worth: without one of n, the others take n / (n - 1) times as long for its part of the data.

- when all others have reported, a round is held for a few seconds for those on probation that have not said yet that
  they have finished (:mod:`.holding`), and so is the warm-up (:mod:`.warming_up`).

The host's own participants are never on probation, and are waited for. Until somebody has finished rounds, as in the
first epoch, nobody is on probation.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Mapping
from typing import Final

from ..rules.committee import CommitteeSelection
from ..rules.consensus import trainer_scores, witness_quorum
from ..rules.probation import NOBODY, Probation, has_probation, newcomers_report, on_probation, regular_clients
from ..rules.steps import is_complete
from ..types import ROUND_PHASES, ClientState, Coordinator, NodeIdentity, RunState, Witness
from .holding import MAX_REMEMBERED, HeldRounds
from .joiner_patience import EPOCH_SHARE
from .purses import Purse
from .warming_up import WarmingUp

__all__ = ["RESULTS_TO_EARN", "ProbationBook"]

RESULTS_TO_EARN: Final = 2
"""Rounds in which a quorum saw work of a client, after which it is not on probation. As for votes on weights."""

OWN_SECONDS: Final = 5.0
"""What a client's purse holds when it comes off probation: as long as peers wait for a result that nobody announced
(``strategy/rounds/waiting.py``)."""

SHARED_SECONDS: Final = 10.0
"""What the purse for all holds at first. Chosen arbitrarily."""

FREE_SHARE: Final = 0.25
"""Of the time that the others needed, a client may take longer for nothing, however many others there are."""

FREE_SECONDS: Final = 0.1
"""And so many seconds: the noise of a busy machine. Chosen arbitrarily."""

FIRST_ROUNDS_SHARE: Final = 0.25
"""Of a round's time, to wait for others while nobody has finished a round: first steps take longer. Not charged."""


class _Record:
    """What is known of a client."""

    __slots__ = ("purse", "results", "waits")

    def __init__(self) -> None:
        self.results = 0
        self.purse: Purse | None = None
        self.waits = False  # its purse was empty, and has not filled up again


class ProbationBook:
    """See the module. Give it every state of the run, by :meth:`follow`. Times are seconds of one clock.

    Args:
        newcomers: clients on probation that an epoch takes in at most.
        per_address: of those, from one place in the network.
    """

    def __init__(self, newcomers: int, per_address: int) -> None:
        self._newcomers = newcomers
        self._per_address = per_address
        self._trusted: set[NodeIdentity] = set()
        self._records: OrderedDict[NodeIdentity, _Record] = OrderedDict()
        self._shared: Purse | None = None
        # The round under way, when it began, who has reported when, and when those had that set its pace.
        self._round: tuple[int, int, int] | None = None
        self._began = 0.0
        self._reported: dict[NodeIdentity, float] = {}
        self._paced: float | None = None
        self._holds = HeldRounds()
        self._warmup = WarmingUp()
        # Clients on probation for whom the warm-up waited in vain, and who have not been in time since.
        self._unready: frozenset[NodeIdentity] = frozenset()

    def trust(self, client: NodeIdentity) -> None:
        """A participant of the host's own process is never on probation."""
        self._trusted.add(client)

    def take_over(self, state: Coordinator) -> None:
        """Begins in the midst of a run, with what its state tells: who is not on probation has finished rounds."""
        if has_probation(state):
            for client in regular_clients(state):
                self._record(client).results = RESULTS_TO_EARN

    def dropped(self, client: NodeIdentity, now: float) -> None:
        """A client was taken off the list, since it did nothing: others have waited for it in vain."""
        self._holds.use_up_all(client)
        record = self._records.get(client)
        if record is None:
            return
        if record.purse is not None and not record.waits:
            self._charge(client, OWN_SECONDS, now)
            self._purse(now).take(OWN_SECONDS, now)
        record.results = 0

    # -- what it decides -----------------------------------------------------------------------------------------------

    def decide(self, state: Coordinator, now: float) -> Probation:
        """Who is on probation from the next round on, and who is not waited for in this one."""
        if not has_probation(state):
            return NOBODY
        listed = [client.id for client in state.epoch_state.clients]
        newcomers = self._on_probation(listed, state, now)
        if state.run_state in ROUND_PHASES:
            late = self._late(state, now)
            if not self._holds.is_held and is_complete(state, late):
                self._holds.complete(now)
            return Probation(newcomers, late=late, holds=self._holds.holds(state, now))
        return Probation(newcomers, is_over=self._warmup.is_given_up(state, now))

    def admit(
        self, pending: Iterable[NodeIdentity], places: Mapping[NodeIdentity, str], state: Coordinator, now: float
    ) -> tuple[tuple[NodeIdentity, ...], Probation]:
        """Those of ``pending`` that an epoch takes in: who is not on probation comes first.

        Args:
            pending: clients that want to be in it, in the order of joining.
            places: where they are in the network, as far as that is known.
            state: of the run.
            now: in seconds.
        """
        waiting = list(pending)
        if not has_probation(state):
            return tuple(waiting), NOBODY
        newcomers = self._on_probation(waiting, state, now)
        taken: list[NodeIdentity] = []
        counts: Counter[str] = Counter()
        for client in waiting:
            if client not in newcomers or len(taken) >= self._newcomers:
                continue
            place = places.get(client)
            if place is not None and counts[place] >= self._per_address:
                continue
            counts.update([] if place is None else [place])
            taken.append(client)
        regular = [client for client in waiting if client not in newcomers]
        return (*regular, *taken), Probation(newcomers.intersection(taken))

    def idle(self, state: Coordinator) -> frozenset[NodeIdentity]:
        """Clients on probation that were not ready when the epoch's training began, and have not been in time since."""
        clients = state.epoch_state.clients
        if state.run_state not in ROUND_PHASES or not self._unready:
            return frozenset()
        return self._unready.intersection(clients[place].id for place in on_probation(state))

    def may_end_for(
        self, pending: Collection[NodeIdentity], places: Mapping[NodeIdentity, str], state: Coordinator, now: float
    ) -> frozenset[NodeIdentity]:
        """Those of ``pending`` for whom the present epoch may end early: not for clients on probation that the next one
        would not take in, nor while half of those that this one took in have done nothing yet.

        That ends with the quarter of an epoch after which clients that were dropped may end one again.
        """
        admitted, probation = self.admit(pending, places, state, now)
        idle, regular = len(on_probation(state)), len(regular_clients(state) & set(pending))
        if 2 * idle > regular and now < state.epoch_state.start_timestamp + state.config.epoch_time // EPOCH_SHARE:
            return frozenset(admitted) - probation.newcomers
        return frozenset(admitted)

    def _on_probation(
        self, clients: Collection[NodeIdentity], state: Coordinator, now: float
    ) -> frozenset[NodeIdentity]:
        # Until somebody's work was seen, nobody is better than others; and where the operator wants more witnesses than
        # there are regular clients, nobody can be spared.
        if not any(self._results(client) >= RESULTS_TO_EARN for client in clients):
            return frozenset()
        regular = {client for client in clients if client in self._trusted or self._has_earned(client, now)}
        if len(regular) < max(1, state.config.witness_nodes):
            return frozenset()
        return frozenset(client for client in clients if client not in regular)

    def _has_earned(self, client: NodeIdentity, now: float) -> bool:
        record = self._records.get(client)
        if record is None or record.results < RESULTS_TO_EARN:
            return False
        shared = self._purse(now)
        if record.purse is None:
            if shared.left(now) < shared.first / 2:
                return False  # others have misused it; it is a tenth of the time until it has filled up
            record.purse = Purse(OWN_SECONDS, now)
        if record.waits and min(record.purse.left(now) * 2, shared.left(now)) >= record.purse.first:
            record.waits = False
        return not record.waits

    def _has_anybody_worked(self, state: Coordinator) -> bool:
        return any(self._results(client.id) >= RESULTS_TO_EARN for client in state.epoch_state.clients)

    def _results(self, client: NodeIdentity) -> int:
        record = self._records.get(client)
        return 0 if record is None else record.results

    # -- what it sees --------------------------------------------------------------------------------------------------

    def heard(self, client: NodeIdentity, index: int, report: Witness, state: Coordinator, now: float) -> bool:
        """A client on probation, at this place of the list, says that it has finished; False if another round."""
        if state.run_state not in ROUND_PHASES:
            return False
        selection = CommitteeSelection.for_round(state, state.current_round)
        if report != newcomers_report(selection.get_witness(index), selection.seed):
            return False
        self._holds.heard(client, now)
        return True

    def follow(self, before: Coordinator, after: Coordinator, now: float) -> None:
        """The run went from one state to another."""
        if before is after or not has_probation(after):
            return
        in_round = after.run_state in ROUND_PHASES
        which = (after.progress.epoch, after.epoch_state.start_timestamp, after.progress.step) if in_round else None
        if which != self._round:
            if self._round is not None:
                self._end_round(before, now)
            self._round, self._began, self._paced, self._reported = which, now, None, {}
            self._holds.begin(now)
        if in_round:
            if before.run_state is RunState.WARMUP:
                self._unready = self._warmup.end(before)
                for client in self._unready:
                    self._holds.use_up_all(client)
            self._note_reports(after, now)
        else:
            self._warmup.follow(after, now)

    def _note_reports(self, state: Coordinator, now: float) -> None:
        clients = state.epoch_state.clients
        for witness in state.current_round.witnesses:
            if witness.proof.index < len(clients):
                self._reported.setdefault(clients[witness.proof.index].id, now)
        if self._paced is None and self._reported and self._is_pace_set(state, now):
            self._paced = now

    def _is_pace_set(self, state: Coordinator, now: float) -> bool:
        """Whether those have reported whose time counts: the host's, and half of those that are not on probation."""
        elected = self._elected(state)
        trusted = self._trusted & elected
        if not self._reported.keys() >= trusted:
            return False
        setting = trusted | {client for client in elected if self._has_earned(client, now)} or elected
        count = 2 * len(setting & self._reported.keys())
        return count >= len(setting) if trusted else count > len(setting)

    def _late(self, state: Coordinator, now: float) -> frozenset[NodeIdentity]:
        if self._paced is None:
            return frozenset()
        missing = self._elected(state) - self._reported.keys() - self._trusted
        if not missing:
            return frozenset()
        waited = now - self._free_until(state)
        if not self._has_anybody_worked(state):
            longest = FIRST_ROUNDS_SHARE * state.config.max_round_train_time
            return frozenset(missing) if waited >= longest else frozenset()
        shared = self._purse(now).left(now)
        late = set()
        for client in missing:
            record = self._records.get(client)
            own = OWN_SECONDS if record is None or record.purse is None else record.purse.left(now)
            if waited >= min(own, shared):
                late.add(client)
        return frozenset(late)

    def _free_until(self, state: Coordinator) -> float:
        """Until when waiting for somebody in this round costs nothing."""
        paced = self._began if self._paced is None else self._paced
        others = len(self._elected(state)) - 1
        share = max(FREE_SHARE, 1 / others if others else 0.0)
        return paced + share * (paced - self._began) + FREE_SECONDS

    def _end_round(self, last: Coordinator, now: float) -> None:
        """The round of ``last`` is over: who was waited for, and whose work was seen."""
        if last.run_state not in ROUND_PHASES:
            return
        if self._paced is not None and self._has_anybody_worked(last):
            self._charge_late(last, now)
        self._unready -= self._holds.end(last, now)
        self._count_results(last, now)

    def _charge_late(self, last: Coordinator, now: float) -> None:
        free_until, longest = self._free_until(last), 0.0
        for client in self._elected(last) - self._trusted:
            waited = self._reported.get(client, now) - free_until
            if waited > 0:
                self._charge(client, waited, now)
                longest = max(longest, waited)
        if longest:
            self._purse(now).take(longest, now)

    def _charge(self, client: NodeIdentity, seconds: float, now: float) -> None:
        record = self._record(client)
        if record.purse is None:
            record.purse = Purse(OWN_SECONDS, now)
        record.purse.take(seconds, now)
        if min(record.purse.left(now), self._purse(now).left(now) - seconds) <= FREE_SECONDS:
            record.waits = True
            self._holds.use_up_all(client)

    def _count_results(self, last: Coordinator, now: float) -> None:
        witnesses = last.current_round.witnesses
        if not witnesses:
            return
        quorum = witness_quorum(last.config.witness_nodes, len(witnesses))
        learning = [
            client.id
            for client in last.epoch_state.clients
            if client.state is ClientState.HEALTHY and self._results(client.id) < RESULTS_TO_EARN
        ]
        for client, score in zip(learning, trainer_scores(learning, witnesses), strict=True):
            if score >= quorum:
                self._record(client).results += 1
                self._has_earned(client, now)  # if it has, it gets its purse

    # -- steps ---------------------------------------------------------------------------------------------------------

    def _elected(self, state: Coordinator) -> set[NodeIdentity]:
        """Those whose reports the present round waits for."""
        selection = CommitteeSelection.for_round(state, state.current_round)
        return {
            client.id
            for index, client in enumerate(state.epoch_state.clients)
            if client.state is ClientState.HEALTHY and selection.get_witness(index).witness
        }

    def _purse(self, now: float) -> Purse:
        if self._shared is None:
            self._shared = Purse(SHARED_SECONDS, now)
        return self._shared

    def _record(self, client: NodeIdentity) -> _Record:
        record = self._records.setdefault(client, _Record())
        self._records.move_to_end(client)
        if len(self._records) > MAX_REMEMBERED:
            self._records.popitem(last=False)
        return record
