"""In which order a client does what, read from the log of a quiet run of two epochs."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from distro_optim.coordinator.types import RunState
from distro_optim.strategy.rounds import actions as act
from distro_optim.strategy.rounds.rounds import Stage
from distro_optim.verify.bloom import BloomFilter
from rounds.simulator import LR, Member, World, run_of


@cache
def quiet_run() -> tuple[World, list[Member]]:
    world, members = run_of(3, total_steps=200, epoch_time=40)
    world.until_phase(RunState.WARMUP, epoch=2)
    return world, members


def epochs(member: Member) -> list[list[act.Action]]:
    """The log, cut behind each FinishEpoch."""
    parts: list[list[act.Action]] = [[]]
    for action in member.log:
        parts[-1].append(action)
        if isinstance(action, act.FinishEpoch):
            parts.append([])
    return parts[:-1]


def steps_of(kind: type[Any], log: list[act.Action]) -> list[int]:
    return [action.step for action in log if isinstance(action, kind)]


@pytest.mark.slow
def test_results_of_two_rounds_before_are_applied_from_the_third_round_to_the_last() -> None:
    _, members = quiet_run()
    for log in epochs(members[0]):
        (last,) = steps_of(act.FinishEpoch, log)
        first = steps_of(act.TrainBatch, log)[0]
        assert steps_of(act.ApplyResults, log) == list(range(first + 2, last + 1))
        assert all(len(action.updates) == 3 for action in log if isinstance(action, act.ApplyResults))
        assert all(action.lr == LR for action in log if isinstance(action, act.ApplyResults))


@pytest.mark.slow
def test_the_last_two_rounds_of_an_epoch_train_nothing() -> None:
    _, members = quiet_run()
    for member in members:
        for log in epochs(member):
            (last,) = steps_of(act.FinishEpoch, log)
            trained = steps_of(act.TrainBatch, log)
            assert trained == list(range(trained[0], last - 1))
            assert not steps_of(act.DecayWeights, log)


def test_a_round_applies_then_hashes_then_trains() -> None:
    _, members = quiet_run()
    kinds = (act.ApplyResults, act.HashWeights, act.TrainBatch)
    for log in epochs(members[1]):
        order = [(action.step, kinds.index(type(action))) for action in log if isinstance(action, kinds)]
        assert order == sorted(order)


def test_the_own_part_of_the_round_before_goes_back_to_the_trainer() -> None:
    _, members = quiet_run()
    for log in epochs(members[2]):
        batches = [action for action in log if isinstance(action, act.TrainBatch)]
        assert batches[0].own_previous is None
        assert [batch.own_previous for batch in batches[1:]] == [("own", batch.step - 1) for batch in batches[1:]]
        assert all(batch.bounds is None and not batch.zero_optim for batch in batches)


def test_every_sample_is_trained_once_and_the_rounds_that_drain_skip_theirs() -> None:
    world, members = quiet_run()
    samples = sorted(
        index
        for member in members
        for action in member.of(act.TrainBatch)
        for index in range(action.batch.start, action.batch.end + 1)
    )
    assert len(set(samples)) == len(samples)
    drained = 2 * 2 * 8  # two epochs, two rounds each, eight samples
    assert len(samples) == world.state.progress.epoch_start_data_index - drained


def test_a_witness_reports_on_the_round_before() -> None:
    _, members = quiet_run()
    member = members[0]
    first, second, third = [action.witness for action in member.of(act.SendWitness)][:3]
    assert not any(first.participant_bloom.words)
    assert first.broadcast_merkle.inner == bytes(32)
    for witness in (second, third):
        assert any(witness.broadcast_bloom.words)
        assert any(witness.broadcast_merkle.inner)
    assert second.participant_bloom.keys != third.participant_bloom.keys
    assert BloomFilter(second.participant_bloom.keys, second.participant_bloom.words).fill() > 0


def test_rounds_end_as_soon_as_everybody_has_finished() -> None:
    world, members = quiet_run()
    steps = world.state.progress.step - 1
    assert world.now < steps * world.state.config.max_round_train_time
    assert all(not member.of(act.CancelTraining) for member in members)


def test_blobs_are_released_two_steps_later_and_only_clients_are_let_in() -> None:
    _, members = quiet_run()
    member = members[0]
    assert [action.before_step for action in member.of(act.Forget)][:5] == [0, 0, 1, 2, 3]
    others = frozenset(other.key.public for other in members[1:])
    assert {action.peers for action in member.of(act.AllowPeers)} == {others}


def test_a_repeated_state_and_inputs_after_the_end_change_nothing() -> None:
    world, members = run_of(2, total_steps=6)
    world.until_finished()
    rounds = members[0].rounds
    assert rounds.stage is Stage.ENDED
    assert rounds.coordinator_state(world.state, world.now) == []
    assert rounds.tick(world.now) == []
    assert rounds.next_timer() is None
    assert rounds.weights_hashed(6, [bytes(32)] * 2, world.now) == []
