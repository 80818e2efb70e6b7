"""All peers have found their weights to be wrong: the first of them gives its own, and the others take them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from distro_optim.coordinator.model import P2P
from distro_optim.coordinator.types import RunState

from .scripts import Script, equal_weights
from .world import SessionWorld

MakeWorld = Callable[..., SessionWorld]


def lose_faith(world: SessionWorld) -> None:
    """Each peer has other weights, and knows that they are wrong."""
    for number, port in enumerate(world.ports, start=1):
        assert port.member is not None
        with torch.no_grad():
            for tensor in port.script.weights:
                tensor += number
        rounds = port.member.rounds
        assert rounds._latest is not None
        rounds._phases.desync(rounds._latest, "the test says so")
        port.member.do(rounds._outbox.take())


@pytest.mark.slow
def test_they_go_on_with_those_of_the_first(make_world: MakeWorld) -> None:
    world = make_world(total_steps=60, epoch_time=40, warmup_time=30, min_clients=1)
    scripts = [Script(seed=number) for number in range(3)]
    for number, script in enumerate(scripts, start=1):
        world.run(world.port(number), script)
    # Nobody trains in the last two rounds of an epoch, and so nobody is dropped.
    world.until(lambda state: state.epoch_state.last_step > 0 and state.run_state is RunState.ROUND_WITNESS)
    lose_faith(world)
    assert not equal_weights(*scripts)
    world.until_phase(RunState.WARMUP, epoch=1)
    assert isinstance(world.state.model.checkpoint, P2P)
    given = tuple(scripts[0].trainer.digests())
    begun = world.until(lambda state: all(port.hashes.get(state.progress.step) == given for port in world.ports))
    assert begun.epoch_state.clients[0].id == world.ports[0].identity
    world.until_all_ended()
    assert equal_weights(*scripts)
    assert all(script.trained[-1] > begun.progress.step for script in scripts)
    said = [[line for line in script.news if line.startswith("nobody else has the weights")] for script in scripts]
    assert [len(lines) for lines in said] == [1, 0, 0]
