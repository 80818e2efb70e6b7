"""Everything at once for two hundred rounds: loss, delay, crashes, newcomers, a slow member and a liar."""

from __future__ import annotations

import pytest

from distro_optim.coordinator.types import RunState
from distro_optim.strategy.rounds import actions as act
from rounds import liars
from rounds.liars import Liar
from rounds.simulator import Member, Weather, World

pytestmark = pytest.mark.slow

ROUNDS = 200
TROUBLE_EVERY_STEPS = 7


def until_step(world: World, step: int) -> None:
    world.until(lambda s: s.progress.step >= step or s.run_state is RunState.FINISHED)


def test_two_hundred_rounds_of_trouble_leave_the_honest_with_equal_weights() -> None:
    weather = Weather(gossip_loss=0.3, fetch_loss=0.1, state_loss=0.1, delay=(0.05, 1.0))
    world = World(
        seed=5,
        weather=weather,
        total_steps=ROUNDS,
        epoch_time=250,
        max_round_train_time=12,
        min_clients=2,
        init_min_clients=2,
        witness_nodes=0,
    )
    honest = [Member(world, number) for number in range(1, 5)]
    honest[3].train_seconds = 9.0
    liar = Liar(world, 9, liars.not_a_number)
    crashes = restarts = 0
    steps = range(TROUBLE_EVERY_STEPS, ROUNDS, TROUBLE_EVERY_STEPS)
    for number, step in enumerate(steps):
        until_step(world, step)
        down = [member for member in honest if not member.alive]
        if down:
            down[0].restart()
            restarts += 1
        elif number % 3 == 1:
            world.rng.choice(honest[:3]).crash()
            crashes += 1
        elif number == 8:
            honest.append(Member(world, 6))
    world.until_finished()

    assert crashes >= 5
    assert restarts >= 5
    assert liar.lies
    assert world.state.progress.epoch >= 3
    world.members = honest
    world.assert_every_difference_was_noticed()
    world.assert_healed()
    trained = {action.step for member in honest for action in member.of(act.TrainBatch)}
    applied = {step for member in honest for step, count in member.applied.items() if count}
    assert len(trained) > ROUNDS / 2
    assert len(applied) > ROUNDS / 2
