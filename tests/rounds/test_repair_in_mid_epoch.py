"""A tensor that is wrong is fetched again in mid-epoch, and its peer trains on in the next round."""

from __future__ import annotations

from typing import Any

import pytest

from distro_optim.comm import postcard
from distro_optim.coordinator.types import RunState
from distro_optim.strategy.rounds import actions as act
from distro_optim.strategy.rounds.broadcasts import WeightsReport
from distro_optim.strategy.rounds.repair import MAX_REPAIRS
from rounds.simulator import Member, World, run_of

SETTINGS: dict[str, Any] = {"total_steps": 40, "epoch_time": 60, "init_min_clients": 2, "min_clients": 2}
BIAS, WEIGHT = 0, 1


def flip(member: Member, *tensors: int) -> None:
    """As a bit that flips in memory."""
    for number in tensors:
        member.trainer.weights[number].view(-1)[0] += 0.5


def flip_before(world: World, member: Member, *tensors: int, height: int = 4) -> int:
    """The step that the others report on with other weights."""
    step = world.until_phase(RunState.ROUND_TRAIN, height=height).progress.step
    flip(member, *tensors)
    return step + 1


def reports(member: Member) -> list[WeightsReport]:
    """On its weights, as it sent them."""
    return [postcard.decode(WeightsReport, said.data) for said in member.of(act.AnnounceWeights)]


def trained(member: Member) -> list[int]:
    return [action.step for action in member.of(act.TrainBatch)]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 5])
def test_one_wrong_tensor_is_replaced_in_the_next_round(count: int) -> None:
    world, members = run_of(count, **SETTINGS)
    broken = members[-1]
    step = flip_before(world, broken, WEIGHT)
    epoch = world.state.progress.epoch
    state = world.until(lambda s: s.current_round.height >= 9 or s.progress.epoch > epoch)
    assert state.progress.epoch == epoch, "the epoch was lost"
    assert not broken.of(act.Desynced)
    assert broken.repaired == {step + 1: [WEIGHT]}
    assert broken.rounds.fault is None
    # It has trained in every round, and all have the same weights.
    first, last = trained(broken)[0], trained(broken)[-1]
    assert trained(broken) == list(range(first, last + 1))
    assert last >= step + 3
    differing = [s for s in broken.hashes if s in members[0].hashes and broken.hashes[s] != members[0].hashes[s]]
    assert differing == [step]
    for member in members[:-1]:
        assert not member.repaired
        assert not member.of(act.Desynced)


@pytest.mark.slow
def test_the_host_is_repaired_as_any_other_peer() -> None:
    world, members = run_of(3, **SETTINGS)
    step = flip_before(world, members[0], BIAS)
    world.until_phase(RunState.ROUND_TRAIN, height=9)
    assert members[0].repaired == {step + 1: [BIAS]}
    assert not members[0].of(act.Desynced)


@pytest.mark.slow
def test_a_peer_known_to_be_wrong_does_not_say_what_its_weights_are() -> None:
    world, members = run_of(3, **SETTINGS)
    step = flip_before(world, members[2], BIAS)
    world.until_phase(RunState.ROUND_TRAIN, height=9)
    assert members[2].repaired == {step + 1: [BIAS]}
    right = {report.step: report.root for report in reports(members[1])}
    # That of the next round was said as well, before it was known; and not again.
    is_right = [report.root == right[report.step] for report in reports(members[2]) if report.step > step]
    assert len(is_right) > 3
    assert all(is_right[1:]), "a hash that was known to be wrong was announced"


@pytest.mark.slow
def test_a_model_of_which_most_is_wrong_is_loaded_again_as_a_whole() -> None:
    world, members = run_of(3, **SETTINGS)
    flip_before(world, members[2], BIAS, WEIGHT)
    world.until(lambda _: bool(members[2].of(act.Desynced)))
    assert not members[2].of(act.RepairWeights)
    world.until_finished()
    world.assert_healed()


@pytest.mark.slow
def test_whoever_needs_a_repair_again_and_again_loads_the_model_as_a_whole() -> None:
    world, members = run_of(3, **SETTINGS | {"epoch_time": 200})
    world.until_phase(RunState.ROUND_TRAIN, height=4)
    heights = iter(range(4, 40))

    def and_flip(state: Any) -> bool:
        height = state.current_round.height
        if height >= next_height[0]:
            flip(members[2], BIAS)
            next_height[0] = height + 1
        return bool(members[2].of(act.Desynced))

    next_height = [next(heights)]
    world.until(and_flip)
    assert len(members[2].of(act.RepairWeights)) == MAX_REPAIRS
    assert len(members[2].repaired) <= MAX_REPAIRS


@pytest.mark.slow
def test_a_repair_that_nobody_serves_is_left_to_the_next_warm_up() -> None:
    world, members = run_of(3, **SETTINGS | {"epoch_time": 200})
    flip_before(world, members[2], BIAS)
    world.cut_off.add(members[2])
    world.until(lambda _: bool(members[2].of(act.Desynced)), steps=400)
    asked = members[2].of(act.RepairWeights)
    assert len(asked) <= MAX_REPAIRS
    assert not members[2].repaired
    world.cut_off.clear()
    world.until_finished()
    world.assert_healed()


@pytest.mark.slow
def test_one_that_is_left_alone_before_it_was_repaired_does_not_wait_for_ever() -> None:
    world, members = run_of(2, **SETTINGS | {"epoch_time": 10_000, "init_min_clients": 1, "min_clients": 1})
    flip_before(world, members[1], BIAS)
    world.until(lambda _: members[1].rounds.fault is not None)
    assert not members[1].of(act.Desynced)
    members[0].crash()
    left_at = world.state.progress.step
    world.until_finished()
    assert members[1].of(act.Desynced)
    assert len(set(trained(members[1])) & set(range(left_at, 40))) > 40 - left_at - 15


def test_an_answer_that_nobody_waits_for_changes_nothing() -> None:
    world, members = run_of(2, **SETTINGS)
    world.until_phase(RunState.ROUND_TRAIN, height=4)
    rounds = members[0].rounds
    assert rounds.weights_repaired(world.state.progress.step, [bytes(32)] * 2, world.now) == []
    assert rounds.repair_failed(world.state.progress.step, world.now) == []
    assert rounds.fault is None
