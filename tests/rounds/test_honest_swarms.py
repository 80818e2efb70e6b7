"""Swarms without liars: whatever the network does, weights are equal, or the peer that differs knows it and heals."""

from __future__ import annotations

from dataclasses import replace

import pytest

from distro_optim.coordinator.server.host import RunHost, restartable
from distro_optim.coordinator.types import RunState
from distro_optim.strategy.rounds import actions as act
from distro_optim.strategy.rounds.rounds import Stage
from distro_optim.strategy.rounds.warm_up import MAX_LOADS
from rounds.simulator import LR, NAMES, PLAN, Member, Weather, World, run_of


@pytest.mark.slow
def test_three_epochs_without_trouble_end_with_equal_weights_and_every_batch_applied() -> None:
    world, members = run_of(4, total_steps=44, epoch_time=60)
    world.until_finished()
    assert world.state.progress.epoch >= 3
    world.assert_equal_weights()
    for member in members:
        assert member.rounds.stage is Stage.ENDED
        assert member.rounds.fault is None
        assert not member.of(act.Desynced)
        assert member.of(act.RunEnded)[-1].error is None
        assert set(member.applied.values()) == {4}


BAD_WEATHER = Weather(gossip_loss=0.3, fetch_loss=0.2, state_loss=0.2, delay=(0.05, 2.0))


def honest_faults(world: World) -> list[act.Desynced]:
    return [fault for member in world.members for fault in member.of(act.Desynced)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_loss_and_delay_leave_the_weights_equal(seed: int) -> None:
    weather = replace(BAD_WEATHER, gossip_loss=0.1)
    world, _ = run_of(4, seed=seed, weather=weather, total_steps=60, epoch_time=150, max_round_train_time=30)
    world.until_finished()
    assert world.seen["lost messages"] > 100
    assert world.seen["failed downloads"] > 20
    assert not honest_faults(world)
    world.assert_equal_weights()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [3])
def test_under_heavy_loss_every_difference_is_noticed_named_and_healed(seed: int) -> None:
    weather = replace(BAD_WEATHER, gossip_loss=0.7)
    world, members = run_of(4, seed=seed, weather=weather, total_steps=60, epoch_time=150, max_round_train_time=30)
    world.until_finished()
    named = [fault for fault in honest_faults(world) if fault.tensors]
    assert named, "the weather was not bad enough"
    assert all(set(fault.tensors) <= set(NAMES) for fault in named)
    assert sum(len(member.of(act.Initialize)) for member in members) > len(members)
    world.assert_every_difference_was_noticed()
    world.assert_healed()


@pytest.mark.slow
def test_members_crash_come_back_and_join_late_in_three_epochs() -> None:
    world, members = run_of(4, total_steps=60, epoch_time=100, max_round_train_time=10)
    world.until_phase(RunState.ROUND_TRAIN, height=4)
    members[3].crash()
    late = Member(world, 9)
    world.until_phase(RunState.ROUND_TRAIN, epoch=1, height=2)
    assert late.in_step
    members[3].restart()
    members[0].crash()
    world.until_phase(RunState.ROUND_TRAIN, epoch=2, height=2)
    assert members[3].in_step
    world.until_finished()
    world.assert_equal_weights()
    assert all(not member.of(act.Desynced) for member in (members[1], members[2], late))


@pytest.mark.slow
def test_results_of_a_newcomer_are_left_out_by_all_while_its_optimizer_is_cold() -> None:
    world, members = run_of(3, cold_start=3, total_steps=40, epoch_time=80)
    world.until_phase(RunState.ROUND_TRAIN, height=2)
    late = Member(world, 9)
    begun = world.until_phase(RunState.ROUND_TRAIN, epoch=1).progress.step
    world.until_phase(RunState.ROUND_TRAIN, epoch=1, height=8)
    world.assert_equal_weights()
    assert late.in_step
    # Applied at height 2 is what was trained at height 0.
    assert [members[0].applied[begun + height] for height in range(2, 7)] == [3, 3, 3, 4, 4]
    assert late.applied == {step: n for step, n in members[0].applied.items() if step in late.applied}


def test_a_trainer_that_is_too_slow_is_cancelled_and_its_weights_stay_equal() -> None:
    world, members = run_of(4, total_steps=12, epoch_time=1000, max_round_train_time=6)
    members[3].train_seconds = 8.0
    world.until_phase(RunState.ROUND_WITNESS, height=2)
    assert len(members[3].of(act.CancelTraining)) >= 2
    assert members[3].in_step
    assert {1, 2, 3} <= members[3].hashes.keys()
    world.until_phase(RunState.ROUND_TRAIN, height=4)
    assert members[3].of(act.Rejoin), "a member that never delivers is taken off the list"
    assert "nothing of ours came in time" in members[3].of(act.Desynced)[-1].reason, "and is told why"
    world.assert_equal_weights()


@pytest.mark.slow
def test_a_member_that_is_loading_while_training_begins_waits_for_the_next_epoch() -> None:
    world, members = run_of(3, total_steps=40, epoch_time=60, max_round_train_time=8)
    members[2].load_seconds = 25.0
    world.until_phase(RunState.ROUND_TRAIN, height=4)
    (fault,) = members[2].of(act.Desynced)
    assert "only after training had begun" in fault.reason
    members[2].load_seconds = 1.0
    world.until_phase(RunState.ROUND_TRAIN, epoch=1, height=2)
    assert members[2].in_step
    assert members[2].of(act.Initialize)[-1].providers
    world.assert_equal_weights()


@pytest.mark.slow
def test_a_member_that_misses_whole_rounds_says_so_and_heals() -> None:
    world, members = run_of(4, total_steps=40, epoch_time=80, max_round_train_time=8)
    world.until_phase(RunState.ROUND_TRAIN, height=2)
    cut_off, see = members[3], members[3].see
    cut_off.see = lambda state: None  # type: ignore[method-assign]
    world.until_phase(RunState.ROUND_TRAIN, height=5)
    cut_off.see = see  # type: ignore[method-assign]
    world.until_phase(RunState.ROUND_TRAIN, height=6)
    assert [fault.reason for fault in cut_off.of(act.Desynced)]
    world.until_phase(RunState.ROUND_TRAIN, epoch=1, height=2)
    assert cut_off.in_step
    world.assert_equal_weights()


@pytest.mark.slow
def test_weights_that_are_wrong_in_all_tensors_are_named_and_loaded_again() -> None:
    world, members = run_of(4, total_steps=40, epoch_time=60)
    world.until_phase(RunState.ROUND_TRAIN, height=3)
    members[1].trainer.weights[0][0] += LR
    members[1].trainer.weights[1][0, 0] += LR
    world.until_phase(RunState.ROUND_TRAIN, height=5)
    (fault,) = honest_faults(world)
    assert fault in members[1].of(act.Desynced)
    assert fault.tensors == ("bias", "weight")
    world.until_phase(RunState.ROUND_TRAIN, epoch=1, height=1)
    assert all(member.in_step for member in members)
    world.assert_healed()


def test_weights_that_differ_in_warmup_are_loaded_again_before_training_begins() -> None:
    world, members = run_of(4, total_steps=40, epoch_time=60, warmup_time=30)
    load = members[2]._load

    def load_what_is_broken(action: act.Initialize, patience: float | None = None) -> list[act.Action]:
        members[2]._load = load  # type: ignore[method-assign]
        members[2].trainer.weights[0][0] = 99.0
        return members[2].rounds.initialized(PLAN, NAMES, world.now)

    members[2]._load = load_what_is_broken  # type: ignore[method-assign]
    world.until_phase(RunState.ROUND_TRAIN, height=2)
    (fault,) = honest_faults(world)
    assert fault.tensors == ("bias",)
    assert all(member.in_step for member in members)
    world.assert_healed()


@pytest.mark.slow
def test_a_pause_and_its_cold_start_are_the_same_for_all() -> None:
    world, members = run_of(3, cold_start=4, total_steps=30, epoch_time=60)
    world.until_phase(RunState.ROUND_TRAIN, height=4)
    world.host.pause(world.unix_time)
    world.until_phase(RunState.PAUSED)
    world.host.resume(world.unix_time)
    begun = world.until_phase(RunState.ROUND_TRAIN, epoch=1).progress.step
    world.until_phase(RunState.ROUND_TRAIN, epoch=1, height=6)
    world.assert_equal_weights()
    for member in members:
        trained = {action.step: action for action in member.of(act.TrainBatch)}
        assert [trained[begun + n].lr for n in range(6)] == [LR * n / 4 for n in (0, 1, 2, 3, 4, 4)]
        assert [trained[begun + n].zero_optim for n in range(3)] == [True, False, False]
        assert trained[begun].bounds == (begun, begun + 4)


@pytest.mark.slow
def test_a_coordinator_that_starts_again_takes_the_epoch_back_and_weights_stay_equal() -> None:
    world, members = run_of(4, total_steps=40, epoch_time=80)
    world.until_phase(RunState.ROUND_TRAIN, height=4)
    world.host = RunHost(restartable(world.state, world.unix_time))
    for member in members:
        member.join()
    world.until_phase(RunState.ROUND_TRAIN, height=3)
    assert all(member.in_step for member in members)
    assert len({tuple(member.trainer.digests()) for member in members if member.training is None}) <= 1
    world.until_finished()
    world.assert_healed()


def test_a_model_that_cannot_be_loaded_ends_in_an_error_after_a_few_attempts() -> None:
    world, members = run_of(3, total_steps=40, warmup_time=60)
    broken = members[1]

    def fail(action: act.Initialize, patience: float | None = None) -> list[act.Action]:
        return broken.rounds.initialization_failed("no such file", world.now)

    broken._load = fail  # type: ignore[method-assign]
    world.until_phase(RunState.ROUND_TRAIN)
    (ended,) = broken.of(act.RunEnded)
    assert ended.error is not None
    assert "no such file" in ended.error
    assert len(broken.of(act.Initialize)) == MAX_LOADS


@pytest.mark.slow
def test_a_round_of_fewer_samples_than_members_drops_nobody() -> None:
    world, members = run_of(5, total_steps=30, epoch_time=60, global_batch_size_start=3, global_batch_size_end=3)
    world.until_phase(RunState.COOLDOWN)
    assert not any(member.of(act.SendHealthChecks) for member in members)
    assert any(member.of(act.DecayWeights) for member in members)
    world.assert_equal_weights()
