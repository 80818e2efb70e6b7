"""No single message that is lost or late, and no member that brings nothing, makes the others stand still.

A round waits for everybody, so whatever is never said again, or is waited for although it will never come, costs all
of ``max_round_train_time``, a minute. By default some messages of each kind are tried; with ``DISTRO_OPTIM_ALL_FAULTS``
set, each message of the reference runs.
"""

from __future__ import annotations

import itertools
import os
import random
from collections import defaultdict
from collections.abc import Callable, Iterator

import pytest

from distro_optim.coordinator.rules.probation import on_probation
from distro_optim.coordinator.types import RunState
from distro_optim.strategy.network.driver import OWNER_SECONDS
from distro_optim.strategy.rounds import actions as act
from distro_optim.strategy.rounds.waiting import UNHEARD_SECONDS
from rounds import liars
from rounds.liars import Liar, Lie
from rounds.simulator import LR
from rounds.single_faults import (
    MAX_ROUND_TRAIN_SECONDS,
    TRAIN_SECONDS,
    Client,
    Fault,
    FaultyWorld,
    Kind,
    friends_who_begin_together,
    friends_who_join_one_by_one,
)

Start = Callable[..., FaultyWorld]

LATE = (0.3, 3.0)
"""Behind the next few messages, and behind the next few rounds."""

PATIENCE = UNHEARD_SECONDS + 2 * TRAIN_SECONDS
"""The longest that a round may last: no fault of one message costs more than what is waited for in vain."""

EACH = 10**9 if os.environ.get("DISTRO_OPTIM_ALL_FAULTS") else 1
"""Messages tried of each kind, in each phase."""

RUNS: dict[str, tuple[Start, int, dict[str, int]]] = {
    "together": (friends_who_begin_together, 6, {}),
    "one_by_one": (friends_who_join_one_by_one, 15, {}),
    "one_witness": (friends_who_begin_together, 6, {"witness_nodes": 1}),
    "two_witnesses": (friends_who_begin_together, 6, {"witness_nodes": 2}),
    "fewer_samples_than_members": (
        friends_who_begin_together,
        6,
        {"global_batch_size_start": 2, "global_batch_size_end": 2},
    ),
}


def faults_of(world: FaultyWorld) -> Iterator[Fault]:
    """Messages of each kind in each phase, each lost and late in all ways that there are."""
    groups: dict[object, list[Fault]] = defaultdict(list)
    for message in world.messages:
        # A client that asks to join asks again when its link breaks, and a trainer always answers.
        can_be_lost = message.kind not in (Kind.JOIN, Kind.ANSWER)
        for late in (None, *LATE) if can_be_lost else LATE:
            groups[message.kind, message.run_state, late].append(Fault(message.number, late))
    rng = random.Random(len(world.messages))
    for group in groups.values():
        yield from rng.sample(group, min(EACH, len(group)))


def until_step(world: FaultyWorld, step: int) -> FaultyWorld:
    world.until(lambda state: state.progress.step >= step)
    return world


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_no_single_message_stops_a_run(name: str) -> None:
    start, steps, settings = RUNS[name]
    reference = until_step(start(**settings), steps)
    for fault in faults_of(reference):
        message = reference.messages[fault.number]
        world = until_step(start(fault, **settings), message.step)
        clients = world.state.epoch_state.clients
        # For those on probation nobody waits: who of them misses a result has other weights, and begins again.
        newcomers = {clients[place].id for place in on_probation(world.state)}
        until_step(world, steps + 2)
        seconds, run_state, step = world.longest_phase()
        assert seconds < PATIENCE, (message, fault, run_state, step)
        for member in world.members:
            for differed in member.of(act.Desynced):
                assert member.id in newcomers, (message, fault)
                del member.hashes[differed.step]
        world.assert_equal_weights()


@pytest.mark.slow
def test_a_download_whose_owner_is_silent_comes_from_another_peer() -> None:
    reference = until_step(friends_who_begin_together(), 5)
    for message in reference.messages:
        if message.kind is Kind.DOWNLOAD and message.step == 3:
            world = until_step(friends_who_begin_together(Fault(message.number)), 6)
            assert world.longest_phase()[0] < OWNER_SECONDS + 2 * TRAIN_SECONDS


def seconds_of_rounds(world: FaultyWorld, after: float) -> list[float]:
    """Of those that began after that time."""
    starts = [(run_state, start) for run_state, _, start in world.phases]
    rounds = itertools.pairwise(starts)
    return [
        end - start for (run_state, start), (_, end) in rounds if run_state is RunState.ROUND_TRAIN and start > after
    ]


@pytest.mark.slow
def test_a_training_that_was_cut_costs_the_next_round_seconds_and_not_all_of_its_time() -> None:
    world = friends_who_begin_together()
    slow = world.members[2]
    until_step(world, 3)
    slow.train_seconds = 1000.0
    world.until(lambda _: bool(slow.of(act.CancelTraining)))
    slow.train_seconds = TRAIN_SECONDS
    cut_at = world.now
    until_step(world, 12)
    assert cut_at < MAX_ROUND_TRAIN_SECONDS  # its purse is empty before
    assert max(seconds_of_rounds(world, cut_at)) < PATIENCE
    world.assert_equal_weights()


@pytest.mark.slow
def test_a_member_with_wrong_weights_that_must_not_share_costs_seconds() -> None:
    world = until_step(friends_who_begin_together(), 3)
    for tensor in world.members[1].trainer.weights:  # more than what is repaired in mid-epoch
        tensor.view(-1)[0] += LR
    until_step(world, 12)
    assert world.members[1].of(act.Desynced)
    assert world.longest_phase()[0] < PATIENCE


@pytest.mark.slow
def test_two_at_a_time_that_bring_nothing_do_not_wait_for_each_other() -> None:
    world = FaultyWorld()
    for _ in range(5):
        world.join()
    until_step(world, 3)
    for number, member in enumerate(world.members[3:], 1):
        for tensor in member.trainer.weights:
            tensor.view(-1)[0] += number * LR
    until_step(world, 12)
    assert all(member.of(act.Desynced) for member in world.members[3:])
    assert world.longest_phase()[0] < PATIENCE


class LyingClient(Liar, Client):
    """See its parents."""


REFUSED_SECONDS = 2.0 + 4.0
"""Of the pauses between three attempts at what nobody has."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "lie", [liars.nothing_to_fetch, liars.far_too_large, liars.garbage, liars.another_blob_than_committed]
)
def test_a_liar_whose_result_never_comes_costs_seconds_a_round(lie: Lie) -> None:
    world = FaultyWorld()
    for _ in range(4):
        world.join()
    world.join(LyingClient(world, 5, lie))
    until_step(world, 10)
    assert world.longest_phase()[0] < REFUSED_SECONDS + 3 * TRAIN_SECONDS
    assert world.members[4].of(act.Rejoin), "it was not dropped"
    world.members.pop()
    world.assert_equal_weights()
