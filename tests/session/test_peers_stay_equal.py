"""Whatever each peer went through, all come out with the same weights, bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from distro_optim.coordinator.types import RunState
from distro_optim.strategy.round import Round

from .scripts import SAMPLES, Script, equal_weights
from .world import SessionWorld

FEWER_SAMPLES_THAN_PEERS = {
    "total_steps": 14,
    "epoch_time": 200,
    "init_min_clients": 3,
    "min_clients": 2,
    "global_batch_size_start": 2,
    "global_batch_size_end": 2,
}

MakeWorld = Callable[..., SessionWorld]


def begin(world: SessionWorld, *scripts: Script) -> None:
    first = len(world.ports) + 1
    for number, script in enumerate(scripts, start=first):
        world.run(world.port(number), script)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_three_peers_with_different_first_weights_end_with_equal_ones(
    make_world: MakeWorld, dtype: torch.dtype
) -> None:
    world = make_world(total_steps=14, epoch_time=200, init_min_clients=3, min_clients=2)
    scripts = [Script(seed=n, dtype=dtype) for n in range(3)]
    begin(world, *scripts)
    world.until_all_ended()
    assert equal_weights(*scripts)
    assert not torch.equal(scripts[0].weights[0], Script().fresh_weights(dtype)[0])
    assert all(len(script.trained) == 13 for script in scripts)
    assert not any(script.news for script in scripts)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_who_has_no_batch_decays_its_weights_as_the_others_do(make_world: MakeWorld, dtype: torch.dtype) -> None:
    world = make_world(**FEWER_SAMPLES_THAN_PEERS)
    scripts = [Script(seed=n, dtype=dtype, norm_in_eval=True) for n in range(3)]
    begin(world, *scripts)
    world.until_all_ended()
    assert equal_weights(*scripts)
    world.assert_equal_hashes()
    assert 0 < min(len(script.trained) for script in scripts) < 13


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_who_is_too_slow_is_cancelled_and_stays_equal(make_world: MakeWorld, dtype: torch.dtype) -> None:
    def seconds(round_: Round) -> float:
        return 40.0 if round_.step in (3, 4) else 1.0

    world = make_world(total_steps=40, epoch_time=100, init_min_clients=3, min_clients=2)
    scripts = [Script(dtype=dtype, seed=1), Script(dtype=dtype, seed=2), Script(dtype=dtype, seed=3, seconds=seconds)]
    begin(world, *scripts)
    world.until_all_ended()
    assert scripts[2].cancelled == [3, 4]
    assert {4, 5} <= set(world.ports[2].hashes), "it was compared after it was cancelled"
    world.assert_equal_hashes()
    assert equal_weights(*scripts)
    assert scripts[2].trained[-1] > 30


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_who_joins_late_or_comes_back_after_a_crash_is_equal_again(make_world: MakeWorld, dtype: torch.dtype) -> None:
    world = make_world(total_steps=60, epoch_time=60, init_min_clients=2, min_clients=2)
    begin(world, *(Script(seed=n, dtype=dtype) for n in range(3)))
    world.until_phase(RunState.ROUND_TRAIN, height=4)
    late = Script(seed=7, dtype=dtype)
    begin(world, late)
    victim = world.ports[1]
    world.kill(victim)
    world.until_phase(RunState.ROUND_TRAIN, epoch=1, height=3)
    again = Script(seed=8, dtype=dtype)
    begin(world, again)
    world.until_all_ended()
    scripts = [port.script for port in world.ports if not port.killed]
    assert len(scripts) == 4
    assert late in scripts
    assert again in scripts
    assert equal_weights(*scripts)
    assert late.trained
    assert again.trained
    assert world.state.progress.epoch >= 2


@pytest.mark.slow
def test_who_writes_to_its_weights_in_mid_round_gets_them_back(make_world: MakeWorld) -> None:
    def clamp(script: Script) -> None:
        with torch.no_grad():
            for param in script.model.parameters():
                if param.requires_grad:
                    param.clamp_(-0.01, 0.01)

    world = make_world(total_steps=8, epoch_time=200, init_min_clients=2, min_clients=2)
    scripts = [Script(during=clamp), Script()]
    begin(world, *scripts)
    world.until_all_ended()
    assert equal_weights(*scripts)
    assert any(float(w.abs().max()) > 0.02 for w in scripts[0].weights)


@pytest.mark.slow
def test_who_skips_or_has_gradients_that_are_not_finite_stays_equal(make_world: MakeWorld) -> None:
    def spoil(script: Script) -> None:
        for param in script.model.parameters():
            if param.grad is not None:
                param.grad.fill_(torch.nan)

    world = make_world(total_steps=10, epoch_time=200, init_min_clients=3, min_clients=2)
    scripts = [Script(), Script(during=spoil), Script(skips=lambda round_: round_.step % 2 == 0)]
    begin(world, *scripts)
    world.until_all_ended()
    assert equal_weights(*scripts)
    assert scripts[1].optimizer.quarantined > 0
    assert scripts[2].trained


@pytest.mark.slow
def test_each_sample_is_trained_once_in_a_pass_by_somebody(make_world: MakeWorld) -> None:
    # 15 rounds of 8 samples are two passes over 60.
    world = make_world(total_steps=16, epoch_time=400, init_min_clients=3, min_clients=2)
    scripts = [Script(seed=n) for n in range(3)]
    begin(world, *scripts)
    world.until_all_ended()
    seen = Counter(sample for script in scripts for sample in script.samples_seen)
    assert seen == dict.fromkeys(range(SAMPLES), 2)


@pytest.mark.slow
def test_statistics_of_batch_norm_are_each_peers_own_but_joiners_begin_with_somebodys(make_world: MakeWorld) -> None:
    begun: list[int] = []

    def note(script: Script, _: Round) -> None:
        if len(script.trained) == 1:
            begun.append(int(script.model.get_buffer("norm.num_batches_tracked")))

    world = make_world(total_steps=40, epoch_time=60, init_min_clients=2, min_clients=2)
    scripts = [Script(seed=n) for n in range(2)]
    begin(world, *scripts)
    world.until_phase(RunState.ROUND_TRAIN, height=4)
    late = Script(after=note)
    begin(world, late)
    world.until_all_ended()
    assert begun[0] > 2, "a fresh model would have counted one or two batches"
    first, second = (script.model.get_buffer("norm.running_mean") for script in scripts)
    assert not torch.equal(first, second)
    assert equal_weights(*scripts, late)


@pytest.mark.slow
def test_learning_rates_of_a_schedule_are_those_of_the_step_for_late_joiners_too(make_world: MakeWorld) -> None:
    rates: list[dict[int, float]] = [{}, {}, {}]

    def scripted(number: int) -> Script:
        def note(script: Script, round_: Round) -> None:
            rates[number][round_.step] = script.optimizer.param_groups[0]["lr"]

        return Script(seed=number, after=note, schedule=lambda step: 1 / (1 + step))

    world = make_world(total_steps=40, epoch_time=60, init_min_clients=2, min_clients=2)
    scripts = [scripted(n) for n in range(3)]
    begin(world, *scripts[:2])
    world.until_phase(RunState.ROUND_TRAIN, height=4)
    begin(world, scripts[2])
    world.until_all_ended()
    assert equal_weights(*scripts)
    assert len(rates[2]) < len(rates[0])
    assert all(rates[0][step] == rate for step, rate in rates[2].items() if step in rates[0])
    assert rates[0][1] == 1e-2
    assert rates[0][11] == pytest.approx(1e-2 / 11)


@pytest.mark.slow
def test_the_last_losses_are_passed_on(make_world: MakeWorld) -> None:
    world = make_world(total_steps=6, epoch_time=200, init_min_clients=2, min_clients=2)
    scripts = [Script(), Script()]
    begin(world, *scripts)
    world.until_all_ended()
    assert sorted(world.ports[0].losses) == scripts[0].trained
    assert world.ports[0].losses[5] < world.ports[0].losses[1]


@pytest.mark.slow
def test_peers_of_the_recipe_stay_equal_with_one_that_has_no_batch_in_some_rounds(make_world: MakeWorld) -> None:
    world = make_world(**FEWER_SAMPLES_THAN_PEERS)
    recipe = {"direction": "orthogonal", "update": "rms"}
    scripts = [Script(seed=n, norm_in_eval=True, optimizer_settings=recipe) for n in range(3)]
    begin(world, *scripts)
    world.until_all_ended()
    assert equal_weights(*scripts)
    world.assert_equal_hashes()
    assert 0 < min(len(script.trained) for script in scripts) < 13
    assert any(script.optimizer.state[script.model.first.weight]["momentum_buffer"].any() for script in scripts)
    assert not any(script.news for script in scripts)
