"""The run as a server keeps it, without any network: joins, departures and messages.

A :class:`RunHost` owns the state. Messages of clients whose keys are proved, ticks and departures go in, with ``now``
and fresh random seeds; what happened comes out as events. A server puts connections in front of it, and participants of
the same process reach it directly.

Rules: PsycheFoundation/psyche, ``architectures/centralized/server/src/app.rs``. Ours differ where Psyche's hurt:
clients are listed in the order in which they joined, not in a random one, and a refused message leaves nothing behind
that it had changed half-way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Final

from ...errors import ConfigurationError, CoordinatorError
from ..messages import (
    CheckpointMessage,
    ClientToServerMessage,
    HealthCheckMessage,
    HealthChecks,
    Join,
    WarmupStep,
    WitnessMessage,
    WitnessStep,
)
from ..rules import machine
from ..rules.checkpoints import is_shared_by_peers
from ..rules.points import Account, ClientAccount, EpochAccount
from ..rules.probation import on_probation
from ..rules.steps import is_complete, is_done, is_epoch_due
from ..rules.transitions import is_active, is_halted
from ..types import (
    ROUND_PHASES,
    Client,
    ClientState,
    Coordinator,
    CoordinatorEpochState,
    CoordinatorProgress,
    NodeIdentity,
    RunState,
    WitnessMetadata,
)
from .joiner_patience import JoinerPatience
from .probation import ProbationBook

__all__ = [
    "EpochAbandoned",
    "EpochEnded",
    "Event",
    "Joined",
    "Left",
    "PhaseChanged",
    "Refused",
    "RunHost",
    "restartable",
]

BETWEEN_EPOCHS: Final = frozenset(
    {RunState.UNINITIALIZED, RunState.WAITING_FOR_MEMBERS, RunState.FINISHED, RunState.PAUSED}
)

_TICKS_OF_A_ROUND: Final = 2
"""From training to reports, and to the next round."""

NEWCOMERS: Final = 96
"""Clients on probation that an epoch takes in. Chosen arbitrarily, so that most of its 256 places remain."""

NEWCOMERS_PER_ADDRESS: Final = 24
"""Of those, from one place in the network: a class room behind one router. The others have their turn in the next
epoch. Chosen arbitrarily."""


@dataclass(frozen=True, kw_only=True)
class Joined:
    """A client will be in the epochs from now on."""

    client: NodeIdentity


@dataclass(frozen=True, kw_only=True)
class Left:
    """A client will not be in further epochs."""

    client: NodeIdentity


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A message was not taken; the state is as if it had never come."""

    client: NodeIdentity
    reason: str


@dataclass(frozen=True, kw_only=True)
class PhaseChanged:
    """The run went from one phase to another, or to the next round."""

    before: RunState
    after: RunState


@dataclass(frozen=True, kw_only=True)
class EpochEnded:
    """An epoch is complete: the time to keep a :meth:`RunHost.snapshot`.

    Attributes:
        account: what its clients did, if the host keeps accounts.
    """

    account: EpochAccount | None = None


@dataclass(frozen=True, kw_only=True)
class EpochAbandoned:
    """Too few clients were left in warm-up."""


Event = Joined | Left | Refused | PhaseChanged | EpochEnded | EpochAbandoned


class RunHost:
    """The run and its participants.

    Args:
        state: where it begins, such as :func:`restartable` returns it.
        allowed: public keys that may join; None lets everybody in.
        banned: public keys that may not, whatever the list says.
        why_not: why the owner of a public key cannot take part, for another reason; None if it can.
        withdraw_on_disconnect: whether a client that goes leaves its epoch at once.
        init_warmup_time: seconds of the first warm-up, in place of the configured ones.
        max_pending: clients that may wait for epochs; each costs some memory and a place in every tick.
        joiner_wait_time: seconds after which an epoch ends early if a client waits for the next one, with the
            exceptions of :mod:`.joiner_patience`; None makes it wait until the epoch's time is over, as Psyche does.
        newcomers: clients on probation (:mod:`.probation`) that an epoch takes in, in a run of our own kind.
        newcomers_per_address: of those, from one place in the network.
        peers_to_start: the first epoch needs at least so many clients, whatever the run's own rule. For later epochs
            only that rule counts, so that the run goes on when some clients have left.
        account: follows what clients do, for :class:`EpochEnded`; None keeps no accounts.
        may_begin: asked before the first epoch begins, with the clients that want to be in it; while it says no, they
            wait.
        may_end_round: asked before a round ends, with the state; while it says no, the round goes on.

    Attributes:
        state: the run. It is replaced at each change, and no state is ever modified.
        reports: what each client last reported, for people to look at.

    Raises:
        ConfigurationError: ``max_pending`` is below 1.
    """

    def __init__(
        self,
        state: Coordinator,
        *,
        allowed: Collection[bytes] | None = None,
        banned: Collection[bytes] = (),
        why_not: Callable[[bytes], str | None] = lambda public: None,
        withdraw_on_disconnect: bool = True,
        init_warmup_time: int | None = None,
        max_pending: int = 1024,
        joiner_wait_time: int | None = None,
        peers_to_start: int = 1,
        newcomers: int = NEWCOMERS,
        newcomers_per_address: int = NEWCOMERS_PER_ADDRESS,
        account: Account | None = None,
        may_begin: Callable[[Collection[NodeIdentity]], bool] = lambda clients: True,
        may_end_round: Callable[[Coordinator], bool] = lambda state: True,
    ) -> None:
        if max_pending < 1:
            raise ConfigurationError(
                f"max_pending must be at least 1, got {max_pending}", name="max_pending", value=max_pending
            )
        self.state = state
        self.reports: dict[NodeIdentity, WitnessMetadata] = {}
        self._allowed = None if allowed is None else frozenset(allowed)
        self._banned = frozenset(banned)
        self._why_not = why_not
        self._withdraw_on_disconnect = withdraw_on_disconnect
        self._max_pending = max_pending
        self._patience = (
            JoinerPatience(joiner_wait_time, state.config.epoch_time) if joiner_wait_time is not None else None
        )
        self._peers_to_start = peers_to_start
        self._book = ProbationBook(newcomers, newcomers_per_address)
        self._places: dict[NodeIdentity, str] = {}
        self._account = account
        self._may_begin = may_begin
        self._may_end_round = may_end_round
        # In the order of joining, with the time of it.
        self._pending: dict[NodeIdentity, int] = {}
        self._dropped: frozenset[NodeIdentity] = frozenset()
        # Who has sent health checks in the present round, and which that is.
        self._checkers: set[NodeIdentity] = set()
        self._checked_in: tuple[int, int] | None = None
        self._configured_warmup_time: int | None = None
        if init_warmup_time is not None:
            self._configured_warmup_time = state.config.warmup_time
            self._set_warmup_time(init_warmup_time)

    @property
    def pending(self) -> Collection[NodeIdentity]:
        """The clients that want to be in the next epoch, in the order of joining."""
        return self._pending.keys()

    @property
    def missing(self) -> int:
        """Clients that have still to come before an epoch can begin."""
        return max(0, max(self.state.config.init_min_clients, self._peers_to_start) - len(self._pending))

    def is_pending(self, public: bytes) -> bool:
        """Whether the owner of this key wants to be in the next epoch."""
        return NodeIdentity.from_single_key(public) in self._pending

    def trust(self, client: NodeIdentity) -> None:
        """A participant of the host's own process: it is never on probation, and always waited for."""
        self._book.trust(client)

    def take_over(self, gone: NodeIdentity | None, now: int) -> None:
        """The state is that of another host, at any point of the run: its clients are ours, without that host's own,
        and without those that may not be in it.

        Call it once, before anything else.

        Args:
            gone: the other host, as a client.
            now: Unix time in seconds.
        """
        self._book.take_over(self.state)
        for client in self.state.epoch_state.clients:
            if client.state is ClientState.HEALTHY:
                self._pending[client.id] = now
        turned_away = [client for client in self._pending if not self.is_allowed(client.signer)]
        for left in [*turned_away, *([] if gone is None else [gone])]:
            self._remove(left, withdraw=True)

    def go_on_from(self, progress: CoordinatorProgress, first: NodeIdentity) -> bool:
        """Before the first epoch: the run goes on from there, and ``first``, which has the weights, is the first of its
        list. False if it cannot, as the run would be over, or has begun."""
        state = replace(self.state, progress=progress)
        if self.state.run_state is not RunState.WAITING_FOR_MEMBERS or is_done(state) or first not in self._pending:
            return False
        self.state = state
        self._pending = {first: self._pending.pop(first), **self._pending}
        return True

    def came_from(self, client: NodeIdentity, place: str) -> None:
        """Where a client is in the network, as far as its connection shows; for the bound for each address."""
        self._places[client] = place

    @property
    def idle(self) -> frozenset[NodeIdentity]:
        """Clients on probation that were not ready when the epoch's training began, as those who do nothing: a state
        twice a second is enough for them."""
        return self._book.idle(self.state)

    @property
    def allowed(self) -> Collection[bytes] | None:
        """Public keys that may join; None lets everybody in that is not banned."""
        return self._allowed

    @property
    def banned(self) -> Collection[bytes]:
        """Public keys that may not join."""
        return self._banned

    def is_allowed(self, public: bytes) -> bool:
        """Whether the owner of this key may take part."""
        return public not in self._banned and (self._allowed is None or public in self._allowed)

    @property
    def points(self) -> dict[bytes, ClientAccount] | None:
        """What each client has done so far, by public key; None if nobody keeps accounts."""
        return None if self._account is None else self._account.so_far(self.state)

    def audited(self, client: NodeIdentity, *, passed: bool) -> None:
        """Most auditors of a client say so: it goes into the account."""
        if self._account is not None:
            self._account.audited(client.signer, passed=passed)

    def let_in(self, allowed: Collection[bytes] | None) -> None:
        """From now on only the owners of these keys may join; None lets everybody in that is not banned."""
        self._allowed = None if allowed is None else frozenset(allowed)

    def ban(self, *keys: bytes) -> None:
        """The owners of these keys may not join any more, whatever the list says."""
        self._banned |= frozenset(keys)

    def unban(self, *keys: bytes) -> None:
        """Takes a ban back."""
        self._banned -= frozenset(keys)

    def snapshot(self, now: int) -> Coordinator:
        """What to save of the present state; see :func:`restartable`."""
        state = self.state
        if self._configured_warmup_time is not None:
            state = replace(state, config=replace(state.config, warmup_time=self._configured_warmup_time))
        return restartable(state, now)

    # -- inputs --------------------------------------------------------------------------------------------------------

    def tick(self, now: float, seed: int) -> list[Event]:
        """Time passes. Call it about twice a second.

        Args:
            now: Unix time in seconds; must not go backwards. The rules of a run know whole seconds; parts of them
                tell who is slow.
            seed: 64 fresh random bits, for the round that may start.
        """
        if is_halted(self.state):
            return []
        before = self.state
        self.state, result = self._ticked(now, seed)
        self._forget_dropped(now)
        events = self._phase_events(before)
        if result is machine.TickResult.EPOCH_END:
            account = None if self._account is None else self._account.end(before)
            events.append(EpochEnded(account=account))
        elif result is machine.TickResult.EPOCH_ABANDONED:
            events.append(EpochAbandoned())
        return events

    def receive(self, client: NodeIdentity, message: ClientToServerMessage, now: float, seed: int) -> list[Event]:
        """A message of a client. It never raises, whatever the message: a refusal is an event."""
        before = self.state
        try:
            match message:
                case Join(run_id):
                    return self._join(client, run_id, int(now))
                case WitnessMessage(WitnessStep(report, metadata)) if self._index_of(client) in on_probation(before):
                    if not self._book.heard(client, self._index_of(client), report, before, now):
                        return [Refused(client=client, reason="it is on probation, and the report is of another round")]
                    self.reports[client] = metadata
                case WitnessMessage(WitnessStep(report, metadata)):
                    holds = bool(on_probation(before)) and self._book.decide(before, now).holds
                    self.state = machine.witness(before, client, report, int(now), holds=holds)
                    self.reports[client] = metadata
                case WitnessMessage(WarmupStep(report)):
                    self.state = machine.warmup_witness(before, client, report, int(now), seed)
                case HealthCheckMessage(checks):
                    reason = self._why_not_check(client, checks)
                    if reason is not None:
                        return [Refused(client=client, reason=f"health check refused: {reason}")]
                    self.state, _ = machine.health_check(before, checks)
                case CheckpointMessage() if is_shared_by_peers(before.model.checkpoint):
                    # Where the weights are says what kind of run it is, and whose word about them counts.
                    return [Refused(client=client, reason="checkpoint refused: this run's weights are with its peers")]
                case CheckpointMessage(checkpoint):
                    self.state = machine.checkpoint(before, client, self._index_of(client), checkpoint)
        except CoordinatorError as error:
            return [Refused(client=client, reason=str(error))]
        self._book.follow(before, self.state, now)
        if self.state.run_state in ROUND_PHASES and self._is_over(now):
            # All reports of this round are in: the next one begins at once, not with the next tick.
            for _ in range(_TICKS_OF_A_ROUND):
                self.state, _ = self._ticked(now, seed)
            # Now, because a client that was dropped hears of it and joins again before the next tick.
            self._forget_dropped(now)
        return self._phase_events(before)

    def _is_over(self, now: float) -> bool:
        """Whether all that the round waits for is in."""
        decided = self._book.decide(self.state, now)
        return is_complete(self.state, decided.late) and not decided.holds

    def disconnect(self, client: NodeIdentity) -> list[Event]:
        """A client is gone."""
        return self._remove(client, withdraw=self._withdraw_on_disconnect)

    def kick(self, client: NodeIdentity) -> list[Event]:
        """The operator takes a client out of the run. It may join again, unless it is banned or not on the list."""
        return self._remove(client, withdraw=True)

    def _remove(self, client: NodeIdentity, *, withdraw: bool) -> list[Event]:
        known = client in self._pending
        self._pending.pop(client, None)
        self._places.pop(client, None)
        self.reports.pop(client, None)
        if withdraw:
            try:
                self.state = machine.withdraw(self.state, self._index_of(client))
            except CoordinatorError:
                pass  # it is not in this epoch, or has already left it
        return [Left(client=client)] if known else []

    def pause(self, now: int) -> list[Event]:
        """Stops the run, after the present epoch if one is under way.

        Raises:
            CoordinatorError: it has already stopped.
        """
        before = self.state
        self.state = machine.pause(before, now)
        return self._phase_events(before)

    def resume(self, now: int) -> list[Event]:
        """Goes on after a pause.

        Raises:
            CoordinatorError: it is not paused.
        """
        before = self.state
        self.state = machine.resume(before, now)
        return self._phase_events(before)

    # -- steps ---------------------------------------------------------------------------------------------------------

    def _ticked(self, moment: float, seed: int) -> tuple[Coordinator, machine.TickResult]:
        now = int(moment)
        pending: Collection[NodeIdentity] = self._pending.keys()
        before, patience = self.state, self._patience
        if before.run_state is RunState.ROUND_WITNESS and not self._may_end_round(before):
            return before, machine.TickResult.TICKED
        if before.run_state is RunState.WAITING_FOR_MEMBERS:
            if len(pending) < self._peers_to_start or not self._may_begin(pending):
                pending = ()
            pending, probation = self._book.admit(pending, self._places, before, moment)
        else:
            probation = self._book.decide(before, moment)
        end_epoch = False
        if patience is not None and before.run_state in ROUND_PHASES:
            wanted = self._book.may_end_for(self._pending, self._places, before, moment)
            waiting = {client: since for client, since in self._pending.items() if client in wanted}
            end_epoch = patience.is_due(waiting, before.epoch_state, now)
        state, result = machine.tick(before, pending, now, seed, end_epoch=end_epoch, probation=probation)
        self._book.follow(before, state, moment)
        if patience is not None:
            was_ended = bool(state.epoch_state.last_step) and not before.epoch_state.last_step
            if was_ended and not is_epoch_due(before, now):
                patience.ended_early(now)
            if result is machine.TickResult.EPOCH_END:
                patience.stayed(c.id for c in before.epoch_state.clients if c.state is ClientState.HEALTHY)
        if self._account is not None:
            self._account.see(before)  # one tick may go from one round to the next
            self._account.see(state)
        if state.run_state is RunState.WARMUP:
            self._peers_to_start, self._may_begin = 1, lambda clients: True
        return state, result

    def _join(self, client: NodeIdentity, run_id: str, now: int) -> list[Event]:
        if run_id != self.state.run_id:
            return [Refused(client=client, reason="join refused: another run is hosted here")]
        if not self.is_allowed(client.signer):
            return [Refused(client=client, reason="join refused: the key is not on the list of this run")]
        if client in self._pending:
            return []
        if (reason := self._why_not(client.signer)) is not None:
            return [Refused(client=client, reason=f"join refused: {reason}")]
        if len(self._pending) >= self._max_pending:
            return [Refused(client=client, reason=f"join refused: {self._max_pending} clients are waiting already")]
        self._pending[client] = now
        return [Joined(client=client)]

    def _why_not_check(self, client: NodeIdentity, checks: HealthChecks) -> str | None:
        """Why the health checks of ``client`` are not looked at; None if they are, for the one time in this round.

        Psyche takes them from anybody, and each makes us look into the filters of every witness.
        """
        index = self._index_of(client)
        if index < 0 or self.state.epoch_state.clients[index].state is not ClientState.HEALTHY:
            return "it is not in this epoch"
        newcomers = on_probation(self.state)
        if index in newcomers:
            return "it is on probation, and so no witness"
        named = {proof.index for _, proof in checks}
        if named & newcomers:
            return "it names a client on probation, for which nobody waits"
        if len(named) < len(checks):
            return "it names a client more than once"
        progress = self.state.progress
        which = (progress.epoch, progress.step)
        if which != self._checked_in:
            self._checked_in, self._checkers = which, set()
        if client in self._checkers:
            return "it has sent some in this round"
        self._checkers.add(client)
        return None

    def _forget_dropped(self, now: float) -> None:
        """A client that was dropped has to join again; once it has, it is pending like any other.

        (At each tick Psyche's server forgets everyone in the list of exited clients. After an epoch without witnesses
        that is everyone, and the run waits forever although all of its members join again.)
        """
        removed = (ClientState.DROPPED, ClientState.EJECTED)
        dropped = frozenset(client.id for client in self.state.epoch_state.exited_clients if client.state in removed)
        for client in dropped - self._dropped:
            self._pending.pop(client, None)
            self._book.dropped(client, now)
            if self._patience is not None:
                self._patience.dropped(client)
        self._dropped = dropped

    def _index_of(self, client: NodeIdentity) -> int:
        """Its place in the epoch, or -1, which the machine refuses, if it has none."""
        for index, member in enumerate(self.state.epoch_state.clients):
            if member.id == client:
                return index
        return -1

    def _phase_events(self, before: Coordinator) -> list[Event]:
        if self._configured_warmup_time is not None and is_active(self.state):
            self._set_warmup_time(self._configured_warmup_time)
            self._configured_warmup_time = None
        after = self.state
        if before.run_state is after.run_state and before.progress.step == after.progress.step:
            return []
        return [PhaseChanged(before=before.run_state, after=after.run_state)]

    def _set_warmup_time(self, seconds: int) -> None:
        self.state = replace(self.state, config=replace(self.state.config, warmup_time=seconds))


def restartable(state: Coordinator, now: int) -> Coordinator:
    """The state from which a server can begin: between two epochs, with nobody connected.

    An epoch that was under way is taken back to its start, since its rounds cannot go on without its members. Its
    healthy members stay listed: if one of them returns, it can share the model with the others (see
    :func:`~distro_optim.coordinator.rules.checkpoints.stored_checkpoint`). A run that was paused, or was to be after
    its epoch, is paused.

    Args:
        state: read from a file, or the present one, to be saved.
        now: Unix time in seconds.
    """
    epoch, progress = state.epoch_state, state.progress
    if state.run_state not in BETWEEN_EPOCHS:
        progress = replace(progress, step=epoch.start_step)
    paused = state.run_state is RunState.PAUSED or bool(state.pending_pause)
    waits = RunState.PAUSED if paused else RunState.WAITING_FOR_MEMBERS
    state = replace(state, progress=progress)
    return replace(
        state,
        run_state=RunState.FINISHED if is_done(state) else waits,
        epoch_state=CoordinatorEpochState(
            clients=tuple(Client(client.id) for client in epoch.clients if client.state is ClientState.HEALTHY),
            cold_start_epoch=epoch.cold_start_epoch or paused,
        ),
        run_state_start_unix_timestamp=now,
        pending_pause=False,
    )
