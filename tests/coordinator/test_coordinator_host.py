"""The run as a server keeps it: who joins, who leaves, and what a restart goes on with."""

from __future__ import annotations

from dataclasses import replace

import pytest

from distro_optim.comm.postcard import encode
from distro_optim.coordinator.messages import (
    CheckpointMessage,
    HealthCheckMessage,
    Join,
    WarmupStep,
    WitnessMessage,
    WitnessStep,
)
from distro_optim.coordinator.rules import machine
from distro_optim.coordinator.server.host import (
    EpochAbandoned,
    EpochEnded,
    Joined,
    Left,
    PhaseChanged,
    Refused,
    RunHost,
    restartable,
)
from distro_optim.coordinator.types import (
    P2P,
    ClientState,
    Committee,
    CommitteeProof,
    Coordinator,
    Hub,
    HubRepo,
    NodeIdentity,
    RunState,
    Witness,
    WitnessMetadata,
    WitnessProof,
)
from distro_optim.errors import ConfigurationError, CoordinatorError
from runs import client, clients, elected, ready, report, waiting_run

METADATA = WitnessMetadata(1, 100.0, 0.0, 2.5, (), (), 0, 0.5)
RUN = "run"


class Stage:
    """A host with a clock, and clients known by number."""

    def __init__(self, state: Coordinator | None = None, **options: object) -> None:
        self.host = RunHost(state or waiting_run(RUN, P2P(HubRepo("org/model"))), **options)  # type: ignore[arg-type]
        self.now = self.host.state.run_state_start_unix_timestamp
        self.seed = 0

    @property
    def state(self) -> Coordinator:
        return self.host.state

    def say(self, number: int, message: object) -> list[object]:
        self.seed += 1
        return list(self.host.receive(client(number), message, self.now, self.seed))  # type: ignore[arg-type]

    def join(self, *numbers: int) -> None:
        for number in numbers:
            self.say(number, Join(RUN))

    def tick(self, seconds: int) -> list[object]:
        """Ticks every second of the next ``seconds``."""
        events: list[object] = []
        for _ in range(seconds):
            self.now += 1
            self.seed += 1
            events += self.host.tick(self.now, self.seed)
        return events

    def warm_up(self, *numbers: int) -> None:
        self.join(*numbers)
        self.tick(3)
        assert self.state.run_state is RunState.WARMUP

    def train(self, *numbers: int) -> None:
        self.warm_up(*numbers)
        self.say(numbers[0], WitnessMessage(WarmupStep(ready(0))))
        assert self.state.run_state is RunState.ROUND_TRAIN

    def witness(self) -> None:
        """The elected report that all took part."""
        members = [member.id for member in self.state.epoch_state.clients]
        for identity, proof in elected(self.state):
            message = WitnessMessage(WitnessStep(report(proof, members), METADATA))
            self.host.receive(identity, message, self.now, 0)

    def members(self) -> list[NodeIdentity]:
        return [member.id for member in self.state.epoch_state.clients]

    def run_epoch(self) -> list[object]:
        """Rounds with all reports until the epoch is over."""
        events: list[object] = []
        while not any(isinstance(event, EpochEnded) for event in events):
            if self.state.run_state is RunState.ROUND_TRAIN:
                self.witness()
            events += self.tick(1)
        return events


def test_clients_are_listed_in_the_order_of_joining() -> None:
    stage = Stage()
    assert stage.say(3, Join(RUN)) == [Joined(client=client(3))]
    stage.join(1, 2)
    assert stage.say(1, Join(RUN)) == []
    events = stage.tick(3)
    assert PhaseChanged(before=RunState.WAITING_FOR_MEMBERS, after=RunState.WARMUP) in events
    assert stage.members() == clients(3, 1, 2)


def test_a_join_to_another_run_is_refused() -> None:
    stage = Stage()
    (event,) = stage.say(1, Join("other"))
    assert isinstance(event, Refused)
    assert "another run" in event.reason
    assert not stage.host.pending


def test_only_keys_on_the_list_may_join() -> None:
    stage = Stage(allowed=[client(1).signer])
    stage.join(1, 2)
    assert list(stage.host.pending) == clients(1)
    assert stage.host.is_allowed(client(1).signer)
    assert not stage.host.is_allowed(client(2).signer)


def test_who_is_banned_or_taken_off_the_list_may_not_join() -> None:
    stage = Stage()
    stage.host.ban(client(1).signer)
    stage.join(1, 2)
    assert list(stage.host.pending) == clients(2)
    stage.host.unban(client(1).signer)
    stage.host.let_in([client(1).signer])
    stage.join(1, 3)
    assert list(stage.host.pending) == clients(2, 1)
    stage.host.let_in(None)
    stage.join(3)
    assert list(stage.host.pending) == clients(2, 1, 3)


def test_who_is_kicked_leaves_its_epoch_also_where_it_could_have_come_back() -> None:
    stage = Stage(withdraw_on_disconnect=False)
    stage.train(1, 2)
    assert stage.host.kick(client(2)) == [Left(client=client(2))]
    assert stage.state.epoch_state.clients[1].state is ClientState.WITHDRAWN
    assert stage.host.kick(client(2)) == []
    stage.join(2)
    assert client(2) in stage.host.pending


def test_health_checks_are_looked_at_once_a_round_from_each_and_name_nobody_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[int] = []

    def look(state: Coordinator, checks: tuple[object, ...]) -> tuple[Coordinator, int]:
        looked.append(len(checks))
        return state, 0

    stage = Stage()
    stage.train(1, 2)
    monkeypatch.setattr(machine, "health_check", look)
    proofs = [CommitteeProof(Committee.TRAINER, 0, index) for index in range(2)]
    many = HealthCheckMessage(((client(2), proofs[1]),) * 256)
    (event,) = stage.say(1, many)
    assert isinstance(event, Refused)
    assert "more than once" in event.reason
    for _ in range(3):
        stage.say(1, HealthCheckMessage(((client(2), proofs[1]),)))
    stage.say(2, HealthCheckMessage(((client(1), proofs[0]),)))
    assert looked == [1, 1]
    stage.host.kick(client(1))
    stage.say(1, HealthCheckMessage(()))
    assert looked == [1, 1]
    stage.witness()
    stage.tick(20)
    stage.say(2, HealthCheckMessage(()))
    assert looked == [1, 1, 0]


def test_the_waiting_list_is_bounded() -> None:
    stage = Stage(max_pending=2)
    stage.join(1, 2, 3)
    assert list(stage.host.pending) == clients(1, 2)
    with pytest.raises(ConfigurationError, match="max_pending"):
        Stage(max_pending=0)


def test_who_disconnects_leaves_its_epoch_and_the_next() -> None:
    stage = Stage()
    stage.train(1, 2, 3)
    assert stage.host.disconnect(client(2)) == [Left(client=client(2))]
    assert stage.state.epoch_state.clients[1].state is ClientState.WITHDRAWN
    assert list(stage.host.pending) == clients(1, 3)
    assert stage.host.disconnect(client(2)) == []


def test_withdrawal_on_disconnect_can_be_turned_off() -> None:
    stage = Stage(withdraw_on_disconnect=False)
    stage.train(1, 2, 3)
    stage.host.disconnect(client(2))
    assert stage.state.epoch_state.clients[1].state is ClientState.HEALTHY


def test_a_dropped_client_has_to_join_again() -> None:
    stage = Stage()
    stage.train(1, 2, 3)
    epoch = stage.state.epoch_state
    exited = (replace(epoch.clients[0], state=ClientState.DROPPED),)
    stage.host.state = replace(stage.state, epoch_state=replace(epoch, exited_clients=exited))
    stage.tick(1)
    assert list(stage.host.pending) == clients(2, 3)


@pytest.mark.slow
def test_an_epoch_runs_to_its_end_and_the_next_begins_with_the_same_clients() -> None:
    stage = Stage()
    stage.train(1, 2)
    assert EpochEnded() in stage.run_epoch()
    assert stage.state.progress.epoch == 1
    stage.tick(3)
    assert stage.state.run_state is RunState.WARMUP
    assert stage.members() == clients(1, 2)


def test_a_warm_up_that_loses_its_clients_is_abandoned() -> None:
    stage = Stage()
    stage.warm_up(1, 2)
    stage.host.disconnect(client(2))
    assert EpochAbandoned() in stage.tick(1)
    assert stage.state.run_state is RunState.WAITING_FOR_MEMBERS


def test_reports_for_people_are_kept_while_the_client_is_there() -> None:
    stage = Stage()
    stage.train(1, 2)
    stage.witness()
    (reporter,) = stage.host.reports
    assert stage.host.reports[reporter] == METADATA
    stage.host.disconnect(reporter)
    assert not stage.host.reports


def test_the_first_warm_up_can_be_given_another_length() -> None:
    stage = Stage(init_warmup_time=30)
    stage.warm_up(1, 2)
    stage.tick(29)
    assert stage.state.run_state is RunState.WARMUP
    assert stage.host.snapshot(stage.now).config.warmup_time == 10
    stage.tick(1)
    assert stage.host.state.run_state is RunState.ROUND_TRAIN
    assert stage.state.config.warmup_time == 10


def test_the_first_epoch_waits_for_everybody_and_later_ones_go_on_with_fewer() -> None:
    stage = Stage(waiting_run(RUN, P2P(HubRepo("org/model")), init_min_clients=2, min_clients=2), peers_to_start=3)
    stage.join(1, 2)
    stage.tick(30)
    assert stage.state.run_state is RunState.WAITING_FOR_MEMBERS
    assert stage.host.missing == 1
    stage.join(3)
    assert stage.host.missing == 0
    stage.tick(3)
    assert stage.host.state.run_state is RunState.WARMUP
    stage.host.disconnect(client(2))
    stage.host.disconnect(client(3))
    stage.tick(3)
    assert stage.state.run_state is RunState.WAITING_FOR_MEMBERS
    assert stage.host.missing == 1
    stage.join(2)
    stage.tick(3)
    assert stage.host.state.run_state is RunState.WARMUP


def test_a_run_pauses_and_goes_on() -> None:
    stage = Stage()
    stage.warm_up(1, 2)
    assert stage.host.pause(stage.now) == [PhaseChanged(before=RunState.WARMUP, after=RunState.PAUSED)]
    assert stage.tick(5) == []
    with pytest.raises(CoordinatorError):
        stage.host.pause(stage.now)
    stage.host.resume(stage.now)
    assert stage.state.run_state is RunState.WAITING_FOR_MEMBERS


# -- messages that do harm elsewhere -------------------------------------------------------------------------------


def refused(stage: Stage, number: int, message: object) -> None:
    before = encode(stage.state)
    (event,) = stage.say(number, message)
    assert isinstance(event, Refused)
    assert encode(stage.state) == before


def test_another_clients_witness_is_refused_without_a_trace() -> None:
    stage = Stage()
    stage.train(1, 2, 3)
    ((identity, proof),) = elected(stage.state)
    other = next(number for number in (1, 2, 3) if client(number) != identity)
    refused(stage, other, WitnessMessage(WitnessStep(report(proof, stage.members()), METADATA)))
    assert not stage.host.reports


def test_a_replayed_witness_is_refused_without_a_trace() -> None:
    stage = Stage(waiting_run(RUN, witness_nodes=2))
    stage.warm_up(1, 2, 3)
    for number in (1, 2):
        stage.say(number, WitnessMessage(WarmupStep(ready(number - 1))))
    identity, proof = elected(stage.state)[0]
    message = WitnessMessage(WitnessStep(report(proof, stage.members()), METADATA))
    number = next(number for number in (1, 2, 3) if client(number) == identity)
    assert stage.say(number, message) == []
    refused(stage, number, message)


@pytest.mark.parametrize("index", [3, 2**63])
def test_an_index_outside_the_list_is_refused_without_a_trace(index: int) -> None:
    stage = Stage()
    stage.warm_up(1, 2, 3)
    refused(stage, 1, WitnessMessage(WarmupStep(Witness(WitnessProof(0, index, True)))))
    stage.say(1, WitnessMessage(WarmupStep(ready(0))))
    refused(stage, 1, WitnessMessage(WitnessStep(Witness(WitnessProof(0, index, True)), METADATA)))


@pytest.mark.parametrize("message", [HealthCheckMessage(()), CheckpointMessage(Hub(HubRepo("evil/model")))])
def test_messages_of_who_is_not_in_the_epoch_change_nothing(message: object) -> None:
    stage = Stage()
    stage.train(1, 2)
    refused(stage, 9, message)


# -- restarts ------------------------------------------------------------------------------------------------------


def test_a_restart_in_the_middle_of_an_epoch_goes_back_to_its_start() -> None:
    stage = Stage()
    stage.train(1, 2)
    stage.run_epoch()
    boundary = stage.state
    stage.tick(3)
    stage.say(1, WitnessMessage(WarmupStep(ready(0))))
    for _ in range(2):
        stage.witness()
        stage.tick(4)
    assert stage.state.progress.step == boundary.progress.step + 2
    again = restartable(stage.state, now=5000)
    assert again.progress == boundary.progress
    assert again.run_state is RunState.WAITING_FOR_MEMBERS
    assert again.run_state_start_unix_timestamp == 5000
    assert again.epoch_state.rounds == waiting_run().epoch_state.rounds
    assert [member.id for member in again.epoch_state.clients] == clients(1, 2)


def test_a_restart_between_epochs_keeps_everything_that_counts() -> None:
    stage = Stage()
    stage.train(1, 2)
    stage.run_epoch()
    again = restartable(stage.state, now=stage.now)
    assert (again.progress, again.model, again.config) == (stage.state.progress, stage.state.model, stage.state.config)


def test_after_a_restart_members_who_return_can_share_the_model() -> None:
    stage = Stage()
    stage.train(1, 2)
    stage.run_epoch()
    saved = stage.host.snapshot(stage.now)
    back = Stage(saved)
    back.warm_up(2, 7)
    assert back.state.model.checkpoint == P2P(HubRepo("org/model"))
    strangers = Stage(saved)
    strangers.warm_up(7, 8)
    assert strangers.state.model.checkpoint == Hub(HubRepo("org/model"))


def test_a_finished_run_stays_finished() -> None:
    state = waiting_run(RUN, total_steps=5)
    state = replace(state, progress=replace(state.progress, step=5))
    assert restartable(state, now=0).run_state is RunState.FINISHED


@pytest.mark.parametrize("in_an_epoch", [False, True])
def test_a_pause_outlives_a_restart_also_one_that_was_to_come(in_an_epoch: bool) -> None:
    stage = Stage()
    if in_an_epoch:
        stage.train(1, 2)
    stage.host.pause(stage.now)
    assert bool(stage.state.pending_pause) is in_an_epoch
    again = restartable(stage.host.snapshot(stage.now), now=9)
    assert again.run_state is RunState.PAUSED
    assert not again.pending_pause
    assert again.epoch_state.cold_start_epoch
    host = RunHost(again)
    assert host.tick(10_000, 0) == []
    host.resume(10_001)
    assert host.state.run_state is RunState.WAITING_FOR_MEMBERS


def test_the_members_of_a_paused_run_have_left_it() -> None:
    stage = Stage()
    stage.warm_up(1, 2)
    stage.host.pause(stage.now)
    stage.tick(100)
    again = restartable(stage.state, now=9)
    assert again.epoch_state.clients == ()
