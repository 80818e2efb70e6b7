"""A run without seconds for reports: phases end when there is nothing more to wait for, and not before."""

from __future__ import annotations

import pytest

from distro_optim.coordinator import machine
from distro_optim.coordinator.host import PhaseChanged, RunHost
from distro_optim.coordinator.messages import Join, WarmupStep, WitnessMessage, WitnessStep
from distro_optim.coordinator.types import Coordinator, NodeIdentity, RunState
from distro_optim.coordinator.validation import check_run
from distro_optim.errors import ConfigurationError
from distro_optim.testing.coordinator import metadata
from runs import clients, elected, ready, report, waiting_run

SEED = 7


def host_of(count: int, **settings: int | None) -> RunHost:
    joiner_wait_time = settings.pop("joiner_wait_time", None)
    defaults = {"round_witness_time": 0, "witness_nodes": 0, "init_min_clients": count, "min_clients": 1}
    host = RunHost(waiting_run("run", **{**defaults, **settings}), joiner_wait_time=joiner_wait_time)
    for identity in clients(*range(1, count + 1)):
        host.receive(identity, Join("run"), 0, SEED)
    host.tick(10, SEED)
    assert host.state.run_state is RunState.WARMUP
    return host


def warmed_up(count: int, **settings: int | None) -> RunHost:
    host = host_of(count, **settings)
    for index, client in enumerate(host.state.epoch_state.clients):
        host.receive(client.id, WitnessMessage(WarmupStep(ready(index))), 10, SEED)
    assert host.state.run_state is RunState.ROUND_TRAIN
    return host


def say(host: RunHost, who: NodeIdentity, now: int) -> list[object]:
    proof = dict(elected(host.state))[who]
    everybody = [client.id for client in host.state.epoch_state.clients]
    return list(host.receive(who, WitnessMessage(WitnessStep(report(proof, everybody), metadata(1))), now, SEED))


def finish_round(host: RunHost, now: int) -> None:
    for client in host.state.epoch_state.clients:
        say(host, client.id, now)


def phase(state: Coordinator) -> tuple[RunState, int]:
    return state.run_state, state.progress.step


def test_the_next_round_begins_with_the_last_report_in_the_same_second() -> None:
    host = warmed_up(3)
    first, second, third = (client.id for client in host.state.epoch_state.clients)
    assert say(host, first, 10) == say(host, second, 10) == []
    assert phase(host.state) == (RunState.ROUND_TRAIN, 1)
    assert say(host, third, 10) == [PhaseChanged(before=RunState.ROUND_TRAIN, after=RunState.ROUND_TRAIN)]
    assert phase(host.state) == (RunState.ROUND_TRAIN, 2)


def test_many_rounds_fit_in_one_second() -> None:
    host = warmed_up(3)
    for _ in range(20):
        finish_round(host, 10)
    assert phase(host.state) == (RunState.ROUND_TRAIN, 21)


def test_with_seconds_for_reports_a_round_lasts_them_as_with_psyche() -> None:
    host = warmed_up(3, round_witness_time=2)
    finish_round(host, 10)
    assert phase(host.state) == (RunState.ROUND_WITNESS, 1)
    host.tick(11, SEED)
    assert phase(host.state) == (RunState.ROUND_WITNESS, 1)
    host.tick(12, SEED)
    assert phase(host.state) == (RunState.ROUND_TRAIN, 2)


def test_who_has_left_is_not_waited_for() -> None:
    host = warmed_up(3)
    first, second, third = (client.id for client in host.state.epoch_state.clients)
    say(host, first, 10)
    say(host, second, 10)
    host.disconnect(third)
    host.tick(10, SEED)  # from training to reports
    host.tick(10, SEED)
    assert phase(host.state) == (RunState.ROUND_TRAIN, 2)
    assert [client.id for client in host.state.epoch_state.clients] == [first, second]


def test_who_is_silent_is_waited_for_until_the_time_of_the_round_is_over() -> None:
    host = warmed_up(3)
    first, second, _ = (client.id for client in host.state.epoch_state.clients)
    say(host, first, 10)
    say(host, second, 10)
    host.tick(24, SEED)
    assert phase(host.state) == (RunState.ROUND_TRAIN, 1)
    host.tick(25, SEED)
    assert phase(host.state) == (RunState.ROUND_WITNESS, 1)


def test_after_a_round_that_ran_out_of_time_there_are_seconds_for_reports_all_the_same() -> None:
    host = warmed_up(3)
    host.tick(25, SEED)
    assert phase(host.state) == (RunState.ROUND_WITNESS, 1)
    host.tick(25 + machine.REPORT_SECONDS - 1, SEED)
    finish_round(host, 25 + machine.REPORT_SECONDS - 1)
    assert phase(host.state) == (RunState.ROUND_TRAIN, 2)


def test_nobody_reporting_at_all_ends_the_epoch_after_those_seconds() -> None:
    host = warmed_up(3)
    host.tick(25, SEED)
    host.tick(25 + machine.REPORT_SECONDS, SEED)
    assert host.state.run_state is RunState.COOLDOWN


def test_fewer_reports_than_a_quorum_do_not_end_a_round_early() -> None:
    host = warmed_up(4, witness_nodes=3, min_clients=3)
    witnesses = [identity for identity, _ in elected(host.state)]
    say(host, witnesses[0], 10)
    for gone in witnesses[1:]:
        host.disconnect(gone)
    host.tick(11, SEED)
    assert phase(host.state) == (RunState.ROUND_TRAIN, 1)


def test_a_warm_up_does_not_wait_for_somebody_who_has_left() -> None:
    host = host_of(3)
    for index, client in enumerate(host.state.epoch_state.clients[:2]):
        host.receive(client.id, WitnessMessage(WarmupStep(ready(index))), 10, SEED)
    assert host.state.run_state is RunState.WARMUP
    host.disconnect(host.state.epoch_state.clients[2].id)
    host.tick(11, SEED)
    assert host.state.run_state is RunState.ROUND_TRAIN


def test_an_epoch_ends_for_a_joiner_who_has_waited_long_enough() -> None:
    host = warmed_up(2, joiner_wait_time=5, epoch_time=1000)
    (joiner,) = clients(9)
    finish_round(host, 11)
    finish_round(host, 11)
    host.receive(joiner, Join("run"), 12, SEED)
    finish_round(host, 16)
    assert host.state.epoch_state.last_step == 0
    finish_round(host, 17)
    last = host.state.epoch_state.last_step
    assert last == host.state.progress.step + machine.DRAIN_ROUNDS
    while host.state.run_state is RunState.ROUND_TRAIN:
        finish_round(host, 17)
    assert phase(host.state) == (RunState.COOLDOWN, last)
    for now in (25, 30):
        host.tick(now, SEED)
    assert host.state.run_state is RunState.WARMUP
    assert joiner in [client.id for client in host.state.epoch_state.clients]


def test_joiners_cannot_make_epochs_shorter_than_their_own_waiting() -> None:
    host = host_of(2, joiner_wait_time=50, epoch_time=1000)
    (joiner,) = clients(9)
    host.receive(joiner, Join("run"), 10, SEED)
    for index, client in enumerate(host.state.epoch_state.clients):
        host.receive(client.id, WitnessMessage(WarmupStep(ready(index))), 10, SEED)
    for now in range(11, 59):
        finish_round(host, now)
    assert host.state.epoch_state.last_step == 0
    finish_round(host, 60)
    assert host.state.epoch_state.last_step > 0


def test_no_seconds_for_reports_are_allowed_for_our_own_coordinator_only() -> None:
    state = waiting_run("run", round_witness_time=0)
    check_run(state, prompt=True)
    with pytest.raises(ConfigurationError, match="round_witness_time is 0"):
        check_run(state)
