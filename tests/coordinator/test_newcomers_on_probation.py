"""Identities cost nothing: who has not finished a round is not waited for, has small work, and is in no quorum."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from distro_optim.coordinator.formats.text import from_json, to_json
from distro_optim.coordinator.messages import (
    CheckpointMessage,
    HealthCheckMessage,
    Join,
    WarmupStep,
    WitnessMessage,
    WitnessStep,
)
from distro_optim.coordinator.model import Hub, HubRepo
from distro_optim.coordinator.rules.assignment import assign_data
from distro_optim.coordinator.rules.checkpoints import SHARED_BY_PEERS
from distro_optim.coordinator.rules.committee import CommitteeSelection
from distro_optim.coordinator.rules.probation import marked, newcomers_report, newcomers_share, on_probation
from distro_optim.coordinator.server.holding import (
    NEWCOMER_SECONDS,
    NEWCOMERS_COUNT,
    NEWCOMERS_SHARE,
    SHORT_HOLD_SECONDS,
)
from distro_optim.coordinator.server.host import Refused, RunHost
from distro_optim.coordinator.server.probation import OWN_SECONDS, RESULTS_TO_EARN
from distro_optim.coordinator.server.purses import SHARE, Purse
from distro_optim.coordinator.types import Client, Coordinator, NodeIdentity, RunState, WitnessProof
from distro_optim.testing.coordinator import metadata
from runs import client, clients, elected, ready, report, waiting_run

SEED = 7
ROUND_SECONDS = 0.5
HOST = client(1)


class Run:
    """A run of our own kind in which time passes as we say; its clients do their work unless we say otherwise.

    Args:
        count: clients with which the first epoch begins.
        with_host: whether the first one lives in the host's own process.
    """

    def __init__(self, count: int, *, with_host: bool = True, **settings: int) -> None:
        wanted: dict[str, Any] = {
            "round_witness_time": 0,
            "witness_nodes": 0,
            "init_min_clients": 1,
            "min_clients": 1,
            "max_round_train_time": 40,
            "warmup_time": 40,
            "epoch_time": 3600,
            "total_steps": 100_000,
            "global_batch_size_start": 16,
            "global_batch_size_end": 16,
        }
        state = waiting_run("run", **{**wanted, **settings})
        state = replace(state, model=replace(state.model, checkpoint=Hub(SHARED_BY_PEERS)))
        self.host = RunHost(state, joiner_wait_time=5)
        self.now = 10.0
        if with_host:
            self.host.trust(HOST)
        self.join(*clients(*range(1, count + 1)))
        self.pass_time(20)
        self.everybody_is_ready()

    @property
    def state(self) -> Coordinator:
        return self.host.state

    @property
    def listed(self) -> list[NodeIdentity]:
        return [listed.id for listed in self.state.epoch_state.clients]

    @property
    def newcomers(self) -> set[NodeIdentity]:
        return {self.listed[place] for place in on_probation(self.state)}

    def join(self, *who: NodeIdentity, place: str | None = None) -> None:
        for identity in who:
            if place is not None:
                self.host.came_from(identity, place)
            self.host.receive(identity, Join("run"), self.now, SEED)

    def pass_time(self, seconds: float) -> None:
        for _ in range(round(seconds / ROUND_SECONDS)):
            self.now += ROUND_SECONDS
            self.host.tick(self.now, SEED)

    def everybody_is_ready(self, but: NodeIdentity | None = None) -> None:
        for place, identity in enumerate(self.listed):
            if identity != but:
                self.host.receive(identity, WitnessMessage(WarmupStep(ready(place))), self.now, SEED)

    def say(self, who: NodeIdentity, seen: list[NodeIdentity]) -> None:
        proof = dict(elected(self.state))[who]
        self.host.receive(who, WitnessMessage(WitnessStep(report(proof, seen), metadata(1))), self.now, SEED)

    def finish(self, newcomer: NodeIdentity, state: Coordinator | None = None) -> None:
        state = state or self.state
        place = [listed.id for listed in state.epoch_state.clients].index(newcomer)
        selection = CommitteeSelection.for_round(state, state.current_round)
        report = newcomers_report(selection.get_witness(place), selection.seed)
        self.host.receive(newcomer, WitnessMessage(WitnessStep(report, metadata(1))), self.now, SEED)

    def round(self, *, idle: Iterable[NodeIdentity] = (), late: Iterable[NodeIdentity] = ()) -> float:
        """A round in which nothing comes of ``idle``, and no report of ``late`` in time; returns its seconds."""
        began, step = self.now, self.state.progress.step
        self.now += ROUND_SECONDS
        seen = [identity for identity in self.listed if identity not in idle]
        for newcomer in self.newcomers - {*idle, *late}:
            self.finish(newcomer)
        for identity in dict(elected(self.state)):
            if identity not in {*idle, *late} and self.state.progress.step == step:
                self.say(identity, seen)
        while self.state.progress.step == step:
            assert self.now < began + 600
            self.pass_time(ROUND_SECONDS)
        return self.now - began

    def next_epoch(self, *, idle: Iterable[NodeIdentity] = ()) -> None:
        while self.state.run_state in (RunState.ROUND_TRAIN, RunState.ROUND_WITNESS):
            self.round(idle=idle)
        while self.state.run_state is not RunState.WARMUP:
            self.pass_time(ROUND_SECONDS)


def test_friends_who_begin_together_are_alike() -> None:
    run = Run(3)
    for _ in range(5):
        assert run.newcomers == set()
        assert run.round() == ROUND_SECONDS
    assert run.newcomers == set()


def test_who_comes_later_is_on_probation_until_two_rounds_of_it_were_seen() -> None:
    run = Run(2)
    for _ in range(8):
        run.round()
    run.join(client(3))
    run.pass_time(10)
    run.next_epoch()
    assert run.listed == clients(1, 2, 3)
    assert run.newcomers == {client(3)}
    run.everybody_is_ready()
    assert run.state.run_state is RunState.ROUND_TRAIN
    rounds = 0
    while run.newcomers:
        sizes = {owner: len(batch) for batch, owner in assign_data(run.state).items()}
        assert sizes[client(3)] == 2
        assert sizes[client(1)] + sizes[client(2)] == 14
        assert client(3) not in dict(elected(run.state))
        run.round()
        rounds += 1
    # What comes of a round is reported in the next one, and counts in the one after that.
    assert rounds == RESULTS_TO_EARN + 1
    assert client(3) in dict(elected(run.state))


def test_nobody_waits_for_an_idle_newcomer_and_it_takes_one_sequence_in_eight() -> None:
    run = Run(2)
    for _ in range(8):
        run.round()
    idle = set(clients(3, 4, 5))
    run.join(*idle)
    run.pass_time(10)
    run.next_epoch()
    for place, identity in enumerate(run.listed):
        if identity not in idle:
            run.host.receive(identity, WitnessMessage(WarmupStep(ready(place))), run.now, SEED)
    before = run.now
    while run.state.run_state is RunState.WARMUP:
        run.pass_time(ROUND_SECONDS)
    assert run.now - before <= 40 / 4 + ROUND_SECONDS
    for _ in range(20):
        assert run.round(idle=idle) == ROUND_SECONDS
        assert run.newcomers == idle
        lost = sum(len(batch) for batch, owner in assign_data(run.state).items() if owner in idle)
        assert lost == 16 // 8


@pytest.mark.parametrize("idle", [clients(3), clients(3, 4)])
def test_each_warm_up_that_waited_in_vain_halves_the_wait_of_the_next(idle: list[NodeIdentity]) -> None:
    run = Run(2)
    for _ in range(8):
        run.round()
    waits = []
    run.join(*idle)
    run.pass_time(10)
    for _ in range(3):
        run.next_epoch(idle=idle)
        before = run.now
        for place, identity in enumerate(run.listed):
            if identity in clients(1, 2):
                run.host.receive(identity, WitnessMessage(WarmupStep(ready(place))), run.now, SEED)
        while run.state.run_state is RunState.WARMUP:
            run.pass_time(ROUND_SECONDS)
        waits.append(run.now - before)
        for _ in range(5):
            run.round(idle=idle)
        run.host.state = replace(run.state, epoch_state=replace(run.state.epoch_state, start_timestamp=-9999))
    assert waits == pytest.approx([10, 5, 2.5], abs=ROUND_SECONDS)


def test_who_idles_from_the_start_costs_a_few_short_waits_and_then_none() -> None:
    run = Run(3)
    idle = {client(3)}
    waits = [run.round(idle=idle) for _ in range(8)]
    assert max(waits) <= 40 / 4 + 3 * ROUND_SECONDS
    assert waits[4:] == [ROUND_SECONDS] * 4
    assert run.newcomers == idle


@pytest.mark.parametrize("with_host", [True, False])
def test_who_finishes_each_round_at_the_last_moment_is_soon_not_waited_for(with_host: bool) -> None:
    run = Run(4, with_host=with_host)
    for _ in range(8):
        run.round()
    slow = {client(4)}
    lengths = []
    for _ in range(30):
        is_waited_for = not run.newcomers
        lengths.append(run.round(late=slow if is_waited_for else set()))
    assert sum(length > ROUND_SECONDS for length in lengths) <= 2
    assert sum(lengths) <= 30 * ROUND_SECONDS + OWN_SECONDS + 4
    assert run.newcomers == slow


def test_a_long_pause_of_an_old_member_is_waited_for_and_soon_forgiven() -> None:
    run = Run(4)
    for _ in range(120):
        run.round()
    pausing = {client(4)}
    assert run.round(late=pausing) > OWN_SECONDS
    rounds = 0
    while run.newcomers and rounds < 200:
        run.round()
        rounds += 1
    assert rounds < 100


def test_the_host_is_never_on_probation_and_always_waited_for() -> None:
    run = Run(3)
    for _ in range(6):
        run.round()
    assert run.round(late={HOST}) >= 40
    assert run.newcomers == set()


def test_fifty_from_one_address_are_not_all_taken_in() -> None:
    run = Run(2)
    for _ in range(8):
        run.round()
    crowd = clients(*range(10, 60))
    run.join(*crowd, place="192.0.2.1")
    run.join(client(3), place="192.0.2.2")
    run.pass_time(10)
    run.next_epoch()
    assert run.listed[:2] == clients(1, 2)
    assert client(3) in run.listed
    assert sum(identity in crowd for identity in run.listed) == 24


def test_who_has_finished_rounds_stands_before_newcomers_in_the_list() -> None:
    run = Run(2)
    for _ in range(8):
        run.round()
    run.host.disconnect(client(2))
    run.join(client(9))
    run.join(client(2))
    run.pass_time(10)
    run.next_epoch()
    assert run.listed == clients(1, 2, 9)


def test_a_run_of_psyches_knows_no_probation() -> None:
    state = waiting_run("run", round_witness_time=2, witness_nodes=0)
    marked_state = replace(
        state,
        epoch_state=replace(
            state.epoch_state, clients=marked([Client(id=who) for who in clients(1, 2, 3)], clients(3))
        ),
    )
    assert on_probation(marked_state) == frozenset()


def test_the_mark_travels_in_the_list_of_clients() -> None:
    run = Run(2)
    for _ in range(8):
        run.round()
    run.join(client(3))
    run.pass_time(10)
    run.next_epoch()
    assert on_probation(from_json(Coordinator, to_json(run.state))) == on_probation(run.state) == {2}


def test_a_selection_without_newcomers_is_psyches() -> None:
    with_newcomer = CommitteeSelection(0, 0, 0, 40, 9, newcomers=frozenset({3}))
    psyches = CommitteeSelection(0, 0, 0, 40, 9)
    places = [place for place in range(40) if place != 3]
    assert not with_newcomer.get_witness(3).witness
    assert sum(with_newcomer.get_witness(place).witness for place in range(40)) == 32
    assert sorted(places, key=lambda place: with_newcomer.get_witness(place).position) == sorted(
        places, key=lambda place: psyches.get_witness(place).position
    )


@pytest.mark.parametrize(
    ("total", "newcomers", "share"),
    [
        (64, 9, (4, 2)),
        (16, 5, (1, 2)),
        (64, 1, (1, 2)),
        (3, 3, (1, 1)),
        (2, 2, (1, 1)),
        (0, 2, (0, 1)),
        (16, 0, (0, 2)),
    ],
)
def test_what_newcomers_have_of_a_round(total: int, newcomers: int, share: tuple[int, int]) -> None:
    assert newcomers_share(total, newcomers, 1) == share


@pytest.mark.parametrize(("total", "lost"), [(4, 1.0), (6, 1.5), (8, 2.0), (15, 2.0), (31, 2.0), (32, 4.0)])
def test_a_quarter_of_a_small_round_at_most_is_a_newcomers(total: int, lost: float) -> None:
    shares = [newcomers_share(total, 3, seed) for seed in range(1600)]
    assert sum(count * each for count, each in shares) == 1600 * lost


def test_a_round_of_one_sequence_is_seldom_a_newcomers() -> None:
    assert sum(newcomers_share(1, 3, seed)[0] for seed in range(800)) == 100


def test_a_purse_fills_by_a_tenth_of_the_time() -> None:
    purse = Purse(OWN_SECONDS, 100.0)
    purse.take(OWN_SECONDS, 100.0)
    assert purse.left(100.0) == 0
    assert purse.left(110.0) == pytest.approx(10 * SHARE)
    assert purse.left(10_000.0) == 60


def test_a_host_that_trains_alone_waits_for_no_newcomer_either() -> None:
    run = Run(1)
    for _ in range(5):
        run.round()
    run.join(client(2))
    run.pass_time(10)
    run.next_epoch(idle=[client(2)])
    run.host.receive(HOST, WitnessMessage(WarmupStep(ready(0))), run.now, SEED)
    while run.state.run_state is RunState.WARMUP:
        run.pass_time(ROUND_SECONDS)
    assert [run.round(idle=[client(2)]) for _ in range(6)] == [ROUND_SECONDS] * 6


def with_newcomers(*newcomers: NodeIdentity) -> Run:
    """A run in whose training they have just come."""
    run = Run(2)
    for _ in range(8):
        run.round()
    run.join(*newcomers)
    run.pass_time(10)
    run.next_epoch()
    run.everybody_is_ready()
    assert run.newcomers == set(newcomers)
    return run


def test_who_has_just_come_is_waited_for_while_it_is_a_little_behind() -> None:
    newcomer = client(3)
    run = with_newcomers(newcomer)
    while run.newcomers:
        step = run.state.progress.step
        run.now += ROUND_SECONDS
        for identity in clients(1, 2):
            run.say(identity, run.listed)
        run.pass_time(3 * ROUND_SECONDS)
        assert run.state.progress.step == step
        run.finish(newcomer)
        assert run.state.progress.step == step + 1
    assert run.round() == ROUND_SECONDS


def behind(
    run: Run, newcomers: Iterable[NodeIdentity], seconds: float, pace: float = ROUND_SECONDS, *, in_vain: bool = False
) -> float:
    """A round in which ``newcomers`` finish so long after the others, if they are waited for; returns its seconds.

    Nobody has seen anything of their work if it was ``in_vain``.
    """
    began, step = run.now, run.state.progress.step
    seen = [identity for identity in run.listed if not in_vain or identity not in run.newcomers]
    run.now += pace
    for identity in dict(elected(run.state)):
        if run.state.progress.step == step:
            run.say(identity, seen)
    until = run.now + seconds
    while run.state.progress.step == step and run.now < until:
        run.pass_time(ROUND_SECONDS)
    for newcomer in newcomers:
        if run.state.progress.step == step and newcomer in run.newcomers:
            run.finish(newcomer)
    while run.state.progress.step == step:
        assert run.now < began + 600
        run.pass_time(ROUND_SECONDS)
    return run.now - began


@pytest.mark.parametrize("seconds", [1.0, 2.5, 4.5])
def test_a_newcomer_that_is_behind_in_every_round_is_waited_for_five_seconds_in_all(seconds: float) -> None:
    """As one does that has a flood to send beside its work."""
    newcomer = client(3)
    run = with_newcomers(newcomer)
    held = [behind(run, [newcomer], seconds) - ROUND_SECONDS for _ in range(20)]
    assert 0 <= held[0] - min(seconds, SHORT_HOLD_SECONDS) <= ROUND_SECONDS
    assert sum(held) <= NEWCOMER_SECONDS + ROUND_SECONDS
    assert held[6:] == [0.0] * 14


def test_several_newcomers_that_are_behind_by_turns_are_waited_for_half_as_long_again_in_all() -> None:
    several = clients(*range(3, 9))
    run = with_newcomers(*several)
    held, began = [], run.now
    for late in several * 3:
        for newcomer in set(several) - {late}:
            run.finish(newcomer)
        held.append(behind(run, [late], SHORT_HOLD_SECONDS - ROUND_SECONDS) - ROUND_SECONDS)
    at_once = NEWCOMERS_COUNT * NEWCOMER_SECONDS
    assert NEWCOMER_SECONDS < sum(held) <= at_once + NEWCOMERS_SHARE * (run.now - began) + 2 * ROUND_SECONDS


@pytest.mark.parametrize("pace", [2.0, 4.0, 8.0])
def test_a_newcomer_that_takes_half_as_long_again_comes_off_probation(pace: float) -> None:
    newcomer = client(3)
    run = with_newcomers(newcomer)
    held = []
    while run.newcomers:
        held.append(behind(run, [newcomer], pace / 2, pace) - pace)
    assert held == [pace / 2] * (RESULTS_TO_EARN + 1)


@pytest.mark.parametrize("rounds", [1, 4])
def test_a_newcomer_that_was_in_time_is_waited_for_as_long_as_those_rounds_took(rounds: int) -> None:
    newcomer = client(3)
    run = with_newcomers(newcomer)
    in_vain = behind(run, [], 0, in_vain=True)
    assert SHORT_HOLD_SECONDS < in_vain <= SHORT_HOLD_SECONDS + 2 * ROUND_SECONDS
    assert behind(run, [newcomer], ROUND_SECONDS, in_vain=True) == ROUND_SECONDS
    for _ in range(rounds):
        run.finish(newcomer)
        assert behind(run, [], 0, in_vain=True) == ROUND_SECONDS
    waited = behind(run, [], 0, in_vain=True) - ROUND_SECONDS
    assert rounds * ROUND_SECONDS <= waited <= (rounds + 1) * ROUND_SECONDS
    assert behind(run, [], 0, in_vain=True) == ROUND_SECONDS


def test_what_a_newcomer_says_of_another_round_counts_for_nothing() -> None:
    newcomer = client(3)
    run = with_newcomers(newcomer)
    stale = run.state
    later = replace(stale.current_round, random_seed=SEED + 1)
    head, rounds = stale.epoch_state.rounds_head, stale.epoch_state.rounds
    rounds = (*rounds[:head], later, *rounds[head + 1 :])
    run.host.state = replace(stale, epoch_state=replace(stale.epoch_state, rounds=rounds))
    for identity in clients(1, 2):
        run.say(identity, run.listed)
    step = run.state.progress.step
    run.finish(newcomer, stale)
    assert run.state.progress.step == step
    run.finish(newcomer)
    assert run.state.progress.step == step + 1


def test_nothing_of_a_newcomers_report_is_in_the_state() -> None:
    newcomer = client(3)
    run = with_newcomers(newcomer)
    before = run.state
    run.finish(newcomer)
    assert run.state is before
    run.finish(newcomer)
    assert run.state is before


def test_newcomers_that_idle_by_turns_cost_a_purse_and_a_twentieth_of_the_time() -> None:
    run = Run(2)
    for _ in range(8):
        run.round()
    began, lengths = run.now, []
    for turn in range(8):
        idle = clients(*range(100, 104 + 4 * turn))
        run.join(*idle[-4:])
        run.host.state = replace(run.state, epoch_state=replace(run.state.epoch_state, start_timestamp=-9999))
        run.next_epoch(idle=idle)
        run.everybody_is_ready(idle[0])
        while run.state.run_state is RunState.WARMUP:
            run.pass_time(ROUND_SECONDS)
        lengths += [run.round(idle=idle) for _ in range(20)]
    held = sum(lengths) - ROUND_SECONDS * len(lengths)
    at_once = NEWCOMERS_COUNT * NEWCOMER_SECONDS
    assert 0 < held <= at_once + NEWCOMERS_SHARE * (run.now - began) + 8 * 2 * ROUND_SECONDS


@pytest.mark.slow
def test_an_epoch_does_not_end_early_for_more_newcomers_while_it_is_full_of_idle_ones() -> None:
    run = Run(2)
    for _ in range(8):
        run.round()
    crowd = clients(*range(10, 60))
    run.join(*crowd, place="192.0.2.1")
    run.pass_time(10)
    run.next_epoch(idle=crowd)
    run.everybody_is_ready()
    epoch = run.state.progress.epoch
    for _ in range(100):  # the rest of the crowd waits all the time
        run.round(idle=crowd)
    assert run.state.progress.epoch == epoch


def test_an_epoch_ends_early_for_somebody_who_has_finished_rounds_even_then() -> None:
    run = Run(3)
    for _ in range(8):
        run.round()
    run.host.disconnect(client(3))
    crowd = clients(*range(10, 60))
    run.join(*crowd)
    run.pass_time(10)
    run.next_epoch(idle=crowd)
    run.everybody_is_ready()
    run.join(client(3))
    run.next_epoch(idle=crowd)
    assert client(3) in run.listed


def with_a_newcomer() -> Run:
    run = Run(2)
    for _ in range(8):
        run.round()
    run.join(client(3))
    run.pass_time(10)
    run.next_epoch(idle=[client(3)])
    run.everybody_is_ready()
    for _ in range(3):
        run.round(idle=[client(3)])
    assert run.newcomers == {client(3)}
    return run


def test_a_newcomer_may_not_report_as_a_witness() -> None:
    run = with_a_newcomer()
    before = run.state
    proof = WitnessProof(position=0, index=run.listed.index(client(3)), witness=True)
    (event,) = run.host.receive(
        client(3), WitnessMessage(WitnessStep(report(proof, run.listed), metadata(1))), run.now, SEED
    )
    assert isinstance(event, Refused)
    assert run.state is before


def test_a_newcomer_may_neither_send_nor_be_named_in_health_checks() -> None:
    run = with_a_newcomer()
    selection = CommitteeSelection.for_round(run.state, run.state.previous_round)
    checks = tuple((client(3), selection.get_committee(place)) for place in [run.listed.index(client(3))])
    for sender in clients(2, 3):
        (event,) = run.host.receive(sender, HealthCheckMessage(checks), run.now, SEED)
        assert isinstance(event, Refused)
        assert "probation" in event.reason


def test_nobody_may_say_that_the_weights_of_a_run_of_our_own_kind_are_elsewhere() -> None:
    run = with_a_newcomer()
    before = run.state
    for sender in clients(1, 2, 3):
        (event,) = run.host.receive(sender, CheckpointMessage(Hub(HubRepo("liars/weights"))), run.now, SEED)
        assert isinstance(event, Refused)
    assert run.state is before


def test_no_round_waits_for_who_was_dropped_until_it_was_in_time() -> None:
    dropped = client(3)
    run = Run(3)
    for _ in range(8):
        run.round()
    run.host._book.dropped(dropped, run.now)
    run.round()
    assert run.newcomers == {dropped}
    assert behind(run, [], 0, in_vain=True) == ROUND_SECONDS
    for _ in range(2):
        run.finish(dropped)
        assert behind(run, [], 0, in_vain=True) == ROUND_SECONDS
    assert behind(run, [dropped], ROUND_SECONDS, in_vain=True) == 2 * ROUND_SECONDS


@pytest.mark.parametrize("others", [[], clients(4, 5)])
def test_no_round_waits_for_who_was_not_ready_until_it_was_in_time(others: list[NodeIdentity]) -> None:
    late = client(3)
    run = Run(2)
    for _ in range(8):
        run.round()
    run.join(late, *others)
    run.pass_time(10)
    run.next_epoch(idle=[late, *others])
    for place, identity in enumerate(run.listed):
        if identity in clients(1, 2):
            run.host.receive(identity, WitnessMessage(WarmupStep(ready(place))), run.now, SEED)
    while run.state.run_state is RunState.WARMUP:
        run.pass_time(ROUND_SECONDS)
    assert late in run.host.idle
    assert behind(run, [late], ROUND_SECONDS, in_vain=True) == ROUND_SECONDS
    for _ in range(2):
        run.finish(late)
        assert behind(run, [], 0, in_vain=True) == ROUND_SECONDS
    assert run.host.idle == set(others)
    assert behind(run, [late], ROUND_SECONDS, in_vain=True) == 2 * ROUND_SECONDS


def test_newcomers_that_say_they_are_ready_leave_room_for_the_others_reports() -> None:
    run = Run(2)
    for _ in range(8):
        run.round()
    crowd = clients(*range(10, 60))
    run.join(*crowd)
    run.pass_time(10)
    run.next_epoch(idle=crowd)
    for place, identity in reversed(list(enumerate(run.listed))):
        run.host.receive(identity, WitnessMessage(WarmupStep(ready(place))), run.now, SEED)
    assert run.state.run_state is RunState.ROUND_TRAIN


def test_who_was_not_ready_hears_of_the_run_with_the_ticks_only() -> None:
    run = Run(2)
    for _ in range(8):
        run.round()
    run.join(*clients(3, 4, 5))
    run.pass_time(10)
    run.next_epoch(idle=clients(3, 4, 5))
    for place, identity in enumerate(run.listed):
        if identity in clients(1, 2, 3):
            run.host.receive(identity, WitnessMessage(WarmupStep(ready(place))), run.now, SEED)
    while run.state.run_state is RunState.WARMUP:
        run.pass_time(ROUND_SECONDS)
    assert run.host.idle == set(clients(4, 5))
