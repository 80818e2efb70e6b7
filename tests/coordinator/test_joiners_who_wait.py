"""For whom an epoch ends before its time, how soon, and how often: friends wait seconds, liars do not rule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distro_optim.coordinator.messages import Join, WarmupStep, WitnessMessage, WitnessStep
from distro_optim.coordinator.server.host import RunHost
from distro_optim.coordinator.server.joiner_patience import EARLY_ENDS, EPOCH_SHARE, MAX_REMEMBERED, JoinerPatience
from distro_optim.coordinator.types import Client, ClientState, CoordinatorEpochState, NodeIdentity, RunState
from distro_optim.testing.coordinator import metadata
from runs import client, clients, elected, ready, report, waiting_run

WAIT = 20
EPOCH = 600
NO_EPOCH = CoordinatorEpochState()


class Run:
    """A hosted run whose members answer at once, second by second."""

    def __init__(self, *members: int, joiner_wait_time: int | None = WAIT) -> None:
        config: dict[str, Any] = {"round_witness_time": 0, "witness_nodes": 0, "init_min_clients": 1, "min_clients": 1}
        config |= {"epoch_time": EPOCH, "cooldown_time": 1, "waiting_for_members_extra_time": 1, "total_steps": 10**6}
        self.host = RunHost(waiting_run("run", **config), joiner_wait_time=joiner_wait_time)
        self.now = 0
        self.epoch_began: list[int] = []
        self.to_drop: set[NodeIdentity] = set()
        self.join(*members)
        self.until(1)

    def join(self, *numbers: int) -> None:
        for identity in clients(*numbers):
            self.host.receive(identity, Join("run"), self.now, 1)

    def second(self) -> None:
        self.now += 1
        epoch = self.host.state.progress.epoch, self.host.state.run_state is RunState.WARMUP
        self.host.tick(self.now, 1)
        state = self.host.state
        if state.run_state is RunState.WARMUP:
            if epoch != (state.progress.epoch, True):
                self.epoch_began.append(self.now)
            for index, member in enumerate(state.epoch_state.clients):
                self.host.receive(member.id, WitnessMessage(WarmupStep(ready(index))), self.now, 1)
        elif state.run_state is RunState.ROUND_TRAIN:
            self._drop()
            everybody = [member.id for member in state.epoch_state.clients]
            for identity, proof in elected(state):
                message = WitnessMessage(WitnessStep(report(proof, everybody), metadata(1)))
                self.host.receive(identity, message, self.now, 1)
        for identity in list(self.to_drop):  # it joins again as soon as it is out
            self.host.receive(identity, Join("run"), self.now, 1)

    def _drop(self) -> None:
        epoch = self.host.state.epoch_state
        if epoch.last_step:
            return
        members = tuple(
            replace(member, state=ClientState.DROPPED) if member.id in self.to_drop else member
            for member in epoch.clients
        )
        self.host.state = replace(self.host.state, epoch_state=replace(epoch, clients=members))

    def until(self, now: int) -> None:
        while self.now < now:
            self.second()

    def lengths(self) -> list[int]:
        return [end - begin for begin, end in zip(self.epoch_began, self.epoch_began[1:], strict=False)]


@pytest.mark.slow
def test_friends_who_come_one_by_one_wait_no_longer_than_the_joiners_time() -> None:
    run = Run(1)
    for number, at in ((2, 5), (3, 70), (4, 140)):
        run.until(at)
        run.join(number)
        run.until(at + WAIT + 10)
        assert client(number) in [member.id for member in run.host.state.epoch_state.clients]


@pytest.mark.slow
def test_who_is_dropped_again_and_again_waits_twice_as_long_each_time() -> None:
    run = Run(1, 2, 3)
    run.to_drop.add(client(3))
    run.until(2000)
    waits = run.lengths()[:4]
    for number, wait in enumerate(waits, 1):
        assert WAIT * 2**number <= wait <= WAIT * 2**number + 10
    assert len(run.epoch_began) < 10, "every 20 seconds there would be a hundred"


@pytest.mark.slow
def test_fresh_keys_end_few_epochs_soon_after_each_other_and_then_one_in_a_quarter() -> None:
    run = Run(1)
    for number in range(100, 190):
        run.join(number)
        run.host.disconnect(client(number - 2))
        run.until(run.now + WAIT)
    allowed = EARLY_ENDS + run.now / (EPOCH / EPOCH_SHARE)
    assert EARLY_ENDS < len(run.lengths()) <= allowed + 1


def test_who_has_stayed_to_the_end_of_an_epoch_is_a_newcomer_again() -> None:
    patience = JoinerPatience(WAIT, EPOCH)
    for _ in range(3):
        patience.dropped(client(1))
    assert patience.wait_time(client(1)) == 8 * WAIT
    patience.stayed(clients(1, 2))
    assert patience.wait_time(client(1)) == WAIT


def test_nobody_waits_longer_than_an_epoch() -> None:
    patience = JoinerPatience(WAIT, EPOCH)
    for _ in range(200):
        patience.dropped(client(1))
    assert patience.wait_time(client(1)) == EPOCH


def test_the_memory_of_the_dropped_is_bounded_and_forgets_the_oldest() -> None:
    patience = JoinerPatience(WAIT, EPOCH)
    for number in range(MAX_REMEMBERED + 1):
        patience.dropped(client(number))
    assert patience.wait_time(client(0)) == WAIT
    assert patience.wait_time(client(1)) == 2 * WAIT


@pytest.mark.slow
def test_without_a_time_for_joiners_epochs_last_their_time_whoever_waits() -> None:
    run = Run(1, 2, joiner_wait_time=None)
    run.to_drop.add(client(2))
    run.until(700)
    assert run.lengths()[0] >= EPOCH


@pytest.mark.slow
def test_an_epoch_whose_time_is_over_costs_none_of_the_early_ends() -> None:
    run = Run(1)
    run.until(3 * EPOCH + 50)
    assert len(run.lengths()) == 3
    run.join(2)
    assert run.host._patience is not None
    assert run.host._patience._left == EARLY_ENDS


@pytest.mark.slow
@given(st.lists(st.integers(0, 3 * EPOCH), max_size=60))
def test_in_any_time_there_are_few_ends_and_one_a_quarter_whenever_they_are_asked_for(moments: list[int]) -> None:
    patience = JoinerPatience(WAIT, EPOCH)
    ends = []
    for now in sorted(moments):
        if patience.is_due({client(now): now - WAIT}, NO_EPOCH, now):
            patience.ended_early(now)
            ends.append(now)
    for first, begin in enumerate(ends):
        for count, end in enumerate(ends[first:], 1):
            assert count <= EARLY_ENDS + (end - begin) // (EPOCH // EPOCH_SHARE) + 1


def thinned(healthy: int, *gone: ClientState) -> CoordinatorEpochState:
    """An epoch that began 1 second ago, with clients from 1 on, of which the last ones have left."""
    everybody = [Client(client(number)) for number in range(1, healthy + len(gone) + 1)]
    left = tuple(replace(member, state=why) for member, why in zip(everybody[healthy:], gone, strict=True))
    return CoordinatorEpochState(clients=tuple(everybody[:healthy]), exited_clients=left, start_timestamp=1)


@pytest.mark.parametrize(
    ("healthy", "gone", "ends"),
    [(2, 1, True), (3, 1, False), (2, 2, True), (4, 1, False), (3, 2, True), (7, 3, False), (6, 4, True)],
)
def test_an_epoch_that_has_lost_a_third_of_its_clients_ends_as_soon_as_one_waits(
    healthy: int, gone: int, ends: bool
) -> None:
    epoch = thinned(healthy, *[ClientState.WITHDRAWN] * gone)
    back = client(healthy + gone)
    assert JoinerPatience(WAIT, EPOCH).is_due({back: 2}, epoch, 2) is ends
    assert not JoinerPatience(WAIT, EPOCH).is_due({}, epoch, 2)
    assert not JoinerPatience(WAIT, EPOCH).is_due({client(1): 2}, epoch, 2), "it is in the epoch"


def test_those_who_have_left_count_before_they_are_moved_to_their_list() -> None:
    epoch = thinned(3)
    withdrawn = (replace(epoch.clients[0], state=ClientState.WITHDRAWN), *epoch.clients[1:])
    assert JoinerPatience(WAIT, EPOCH).is_due({client(9): 2}, replace(epoch, clients=withdrawn), 2)


def test_who_was_dropped_waits_its_time_whoever_else_has_left() -> None:
    patience = JoinerPatience(WAIT, EPOCH)
    patience.dropped(client(3))
    epoch = thinned(2, ClientState.DROPPED)
    assert not patience.is_due({client(3): 2}, epoch, 2)
    assert not patience.is_due({client(3): 2}, epoch, 2 * WAIT + 1)
    assert patience.is_due({client(3): 2}, epoch, 2 * WAIT + 2)
    assert patience.is_due({client(3): 2, client(4): 2}, epoch, 2), "another one waits as well"


def test_leaving_and_coming_back_ends_few_epochs_soon_after_each_other() -> None:
    patience = JoinerPatience(WAIT, EPOCH)
    epoch = thinned(2, ClientState.WITHDRAWN)
    ends = 0
    for now in range(2, EPOCH):
        if patience.is_due({client(3): now}, epoch, now):
            patience.ended_early(now)
            ends += 1
    assert ends == EARLY_ENDS + EPOCH_SHARE - 1


def test_of_five_two_leave_and_the_next_epoch_has_them_again_within_seconds() -> None:
    run = Run(1, 2, 3, 4, 5)
    run.until(60)
    assert run.host.state.run_state is RunState.ROUND_TRAIN
    run.host.disconnect(client(4))
    run.until(62)
    run.join(4)
    run.until(64)
    assert len(run.host.state.epoch_state.clients) == 4, "one of five is no third"
    run.host.disconnect(client(5))
    run.until(75)
    assert [member.id for member in run.host.state.epoch_state.clients] == clients(1, 2, 3, 4)
    assert run.epoch_began[-1] > 64
