"""A bit that flips in a peer's weights costs one tensor's bytes, and neither a round nor an epoch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from distro_optim.coordinator.types import RunState
from distro_optim.optim.state import WEIGHT
from distro_optim.strategy.rounds import actions as act

from .scripts import Script, equal_weights
from .test_peers_stay_equal import begin
from .world import SessionWorld

MakeWorld = Callable[..., SessionWorld]
WRONG = "first.weight"


def flip_bit(script: Script, name: str) -> None:
    """In the copy that the optimizer keeps aside, which is put back after the training, and in the weights."""
    parameter = script.trainer.tensors.trained[name]
    for tensor in (parameter.data, script.optimizer.state[parameter][WEIGHT]):
        tensor.view(-1).view(torch.int32)[3] ^= 1 << 20


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_only_the_tensor_that_is_wrong_is_fetched_and_the_peer_trains_on(make_world: MakeWorld, count: int) -> None:
    world = make_world(total_steps=14, epoch_time=200, init_min_clients=count, min_clients=2)
    flipped: list[int] = []

    def flip(script: Script) -> None:
        round_ = script.session.round
        if round_ is not None and round_.step == 5 and not flipped:
            flipped.append(round_.step)
            flip_bit(script, WRONG)

    scripts = [Script(seed=n) for n in range(count - 1)] + [Script(seed=9, during=flip)]
    begin(world, *scripts)
    world.until_phase(RunState.ROUND_TRAIN, height=2)
    world.until_all_ended()
    broken = world.ports[-1]
    assert flipped == [5]
    size = scripts[-1].trainer.tensors.trained[WRONG].numel() * 4
    assert broken.fetched_tensors == [(WRONG, size)]
    assert not any(port.fetched_tensors for port in world.ports[:-1])
    # No round is lost, and with it no epoch: all rounds are trained by all, and nobody has loaded the model again.
    assert all(script.trained == list(range(1, 14)) for script in scripts)
    for member in world.members:
        assert len(member.of(act.Initialize)) == 1
        assert not member.of(act.Desynced)
    assert equal_weights(*scripts)
    assert [text for text in scripts[-1].news if WRONG in text and f"{size} bytes" in text]
    assert not any(script.news for script in scripts[:-1])
    # The wrong weights were those of one step alone.
    others = world.ports[0].hashes
    assert [step for step in others if broken.hashes[step] != others[step]] == [6]


@pytest.mark.slow
def test_a_tensor_that_cannot_be_fetched_is_loaded_with_the_whole_model_in_the_next_warm_up(
    make_world: MakeWorld,
) -> None:
    world = make_world(total_steps=60, epoch_time=60, init_min_clients=3, min_clients=2)

    def flip(script: Script) -> None:
        round_ = script.session.round
        if round_ is not None and round_.step == 5:
            flip_bit(script, WRONG)
            for port in world.ports[:-1]:
                port.live = None

    scripts = [Script(seed=0), Script(seed=1), Script(seed=9, during=flip)]
    begin(world, *scripts)
    world.until_all_ended()
    assert not world.ports[-1].fetched_tensors
    assert [text for text in scripts[-1].news if "could not be fetched" in text]
    assert equal_weights(*scripts)
    assert max(scripts[-1].trained) > 40
