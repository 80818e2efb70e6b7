"""A run without seconds for reports: phases end when there is nothing more to wait for, and not before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from distro_optim.coordinator.messages import Join, WarmupStep, WitnessMessage, WitnessStep
from distro_optim.coordinator.rules import machine
from distro_optim.coordinator.rules.steps import DRAIN_ROUNDS, last_trained_step
from distro_optim.coordinator.rules.validation import check_run
from distro_optim.coordinator.server.host import PhaseChanged, RunHost, restartable
from distro_optim.coordinator.types import ClientState, Coordinator, NodeIdentity, RunState
from distro_optim.errors import ConfigurationError
from distro_optim.testing.coordinator import metadata
from runs import clients, elected, ready, report, waiting_run

SEED = 7


def host_of(count: int, **settings: Any) -> RunHost:
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


# A round that begins at the very end of second 10 has had its 15 seconds not before 26.
TIME_IS_OVER = 10 + 15 + 1


def test_who_is_silent_is_waited_for_until_the_time_of_the_round_is_over() -> None:
    host = warmed_up(3)
    first, second, _ = (client.id for client in host.state.epoch_state.clients)
    say(host, first, 10)
    say(host, second, 10)
    host.tick(TIME_IS_OVER - 1, SEED)
    assert phase(host.state) == (RunState.ROUND_TRAIN, 1)
    host.tick(TIME_IS_OVER, SEED)
    assert phase(host.state) == (RunState.ROUND_WITNESS, 1)


def test_after_a_round_that_ran_out_of_time_there_are_seconds_for_reports_all_the_same() -> None:
    host = warmed_up(3)
    host.tick(TIME_IS_OVER, SEED)
    assert phase(host.state) == (RunState.ROUND_WITNESS, 1)
    host.tick(TIME_IS_OVER + machine.REPORT_SECONDS - 1, SEED)
    finish_round(host, TIME_IS_OVER + machine.REPORT_SECONDS - 1)
    assert phase(host.state) == (RunState.ROUND_TRAIN, 2)


def test_nobody_reporting_at_all_ends_the_epoch_after_those_seconds() -> None:
    host = warmed_up(3)
    host.tick(TIME_IS_OVER, SEED)
    host.tick(TIME_IS_OVER + machine.REPORT_SECONDS, SEED)
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
    assert phase(host.state)[0] is RunState.ROUND_TRAIN


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
    assert last == host.state.progress.step + DRAIN_ROUNDS
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


def train_until(host: RunHost, is_enough: Callable[[list[int]], bool], now: int = 10) -> tuple[list[int], list[int]]:
    """The steps that are trained until they are enough, and where their data begin."""
    steps: list[int] = []
    places: list[int] = []
    while not is_enough(steps):
        state = host.state
        if state.run_state is RunState.ROUND_TRAIN:
            if not state.epoch_state.last_step:
                steps.append(state.progress.step)
                places.append(state.current_round.data_index)
            finish_round(host, now)
        elif state.run_state is RunState.WARMUP:
            for index, client in enumerate(state.epoch_state.clients):
                host.receive(client.id, WitnessMessage(WarmupStep(ready(index))), now, SEED)
        now += 1
        host.tick(now, SEED)
    return steps, places


def test_rounds_at_the_end_of_an_epoch_leave_no_data_out() -> None:
    host = warmed_up(2, epoch_time=20, cooldown_time=1, waiting_for_members_extra_time=1)
    _, trained = train_until(host, lambda steps: len(steps) >= 30)
    size = host.state.config.global_batch_size_end
    assert host.state.progress.epoch >= 1
    assert trained == list(range(0, size * len(trained), size))


def test_who_is_dropped_and_joins_again_before_the_next_tick_waits_for_the_next_epoch() -> None:
    host = warmed_up(3, joiner_wait_time=5)
    first, second, third = host.state.epoch_state.clients
    clients_now = (first, second, replace(third, state=ClientState.DROPPED))
    host.state = replace(host.state, epoch_state=replace(host.state.epoch_state, clients=clients_now))
    say(host, first.id, 10)
    say(host, second.id, 10)
    assert [client.id for client in host.state.epoch_state.clients] == [first.id, second.id]
    host.receive(third.id, Join("run"), 10, SEED)
    host.tick(11, SEED)
    assert third.id in host.pending
    for now in range(15, 40):
        if host.state.run_state is RunState.ROUND_TRAIN:
            finish_round(host, now)
        host.tick(now, SEED)
    assert third.id in [client.id for client in host.state.epoch_state.clients]


# -- the end of a run -------------------------------------------------------------------------------------------------


def through_the_run(host: RunHost, now: int = 10) -> tuple[list[int], list[int]]:
    """To its end."""
    return train_until(host, lambda _: host.state.run_state is RunState.FINISHED, now)


def test_a_run_ends_with_two_rounds_in_which_nobody_trains() -> None:
    host = warmed_up(2, total_steps=9, epoch_time=1000)
    steps, places = through_the_run(host)
    assert steps == [1, 2, 3, 4, 5, 6] == list(range(1, last_trained_step(host.state.config) + 1))
    assert host.state.epoch_state.last_step == host.state.progress.step == 9
    size = host.state.config.global_batch_size_end
    assert host.state.progress.epoch_start_data_index == places[-1] + size


def test_a_run_of_one_step_trains_it_and_has_its_end() -> None:
    host = warmed_up(2, total_steps=4)
    assert through_the_run(host)[0] == [1]
    assert host.state.progress.step == 4


@pytest.mark.parametrize("epoch_time", [16, 17, 18, 19, 20, 23, 26])
def test_however_epochs_fall_nothing_is_trained_in_vain(epoch_time: int) -> None:
    host = warmed_up(2, total_steps=40, epoch_time=epoch_time, cooldown_time=1, waiting_for_members_extra_time=1)
    steps, places = through_the_run(host)
    epochs = host.state.progress.epoch
    assert len(steps) + DRAIN_ROUNDS * epochs == host.state.progress.step - 1
    size = host.state.config.global_batch_size_end
    assert places == list(range(0, size * len(places), size))
    assert steps[-1] <= 37


@pytest.mark.parametrize(("step", "ends_for_joiner"), [(4, True), (5, True), (6, True), (7, False), (8, False)])
def test_an_epoch_ends_for_a_joiner_only_if_there_is_something_left_for_the_next(
    step: int, ends_for_joiner: bool
) -> None:
    host = warmed_up(2, joiner_wait_time=1, epoch_time=1000, total_steps=11)
    (joiner,) = clients(9)
    while host.state.progress.step < step - 1:
        finish_round(host, 10)
    host.receive(joiner, Join("run"), 10, SEED)
    finish_round(host, 100)
    assert host.state.progress.step == step
    assert host.state.epoch_state.last_step == (step + 2 if ends_for_joiner else 0)
    steps, _ = through_the_run(host, 100)
    assert steps[-1] == 8
    assert (joiner in [client.id for client in host.state.epoch_state.clients]) == ends_for_joiner


def test_an_epoch_that_would_have_nothing_to_train_does_not_begin() -> None:
    host = warmed_up(3, total_steps=9, min_clients=3, epoch_time=1000)
    while host.state.progress.step < 7:
        finish_round(host, 10)
    host.disconnect(host.state.epoch_state.clients[2].id)
    for now in (20, 30, 40, 50):
        host.tick(now, SEED)
    assert host.state.run_state is RunState.FINISHED
    assert host.state.progress.step < 9
    assert restartable(host.state, 60).run_state is RunState.FINISHED
    longer = replace(host.state, config=replace(host.state.config, total_steps=host.state.progress.step + 3))
    assert restartable(longer, 60).run_state is RunState.WAITING_FOR_MEMBERS


def test_with_seconds_for_reports_a_run_ends_as_with_psyche() -> None:
    host = warmed_up(2, round_witness_time=1, total_steps=9, epoch_time=1000)
    steps, _ = through_the_run(host)
    assert steps == list(range(1, 9))
    assert host.state.epoch_state.last_step == 0
    assert host.state.progress.step == 9


def test_a_run_needs_room_for_its_end() -> None:
    check_run(waiting_run("run", round_witness_time=0, total_steps=4), prompt=True)
    with pytest.raises(ConfigurationError, match=r"total_steps is 3, but must be at least 4"):
        check_run(waiting_run("run", round_witness_time=0, total_steps=3), prompt=True)
    check_run(waiting_run("run", total_steps=3))
