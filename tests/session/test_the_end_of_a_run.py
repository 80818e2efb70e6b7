"""A run that is hosted ends when everything that was trained is in the weights, and not before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

from distro_optim import DisTrO
from distro_optim.compress import CompressedUpdate
from distro_optim.coordinator.types import RunState
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.frameworks.hosting_defaults import complete_config
from distro_optim.strategy.model.checkpoint import CheckpointStore
from distro_optim.strategy.model.resuming import state_to_resume
from distro_optim.strategy.model.trainer import SwarmTrainer
from distro_optim.strategy.rounds import actions as act
from distro_optim.strategy.sample_order import sample_indices, shuffle_seed
from distro_optim.strategy.session import SwarmSession

from .scripts import SAMPLES, Script, equal_weights, new_model, new_optimizer, samples
from .world import SessionWorld, SimulatedPort

MakeWorld = Callable[..., SessionWorld]
STEPS = 9
PROMPT = {"round_witness_time": 0, "total_steps": STEPS + 3, "epoch_time": 400, "init_min_clients": 1, "min_clients": 1}


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> dict[SwarmTrainer, dict[int, int]]:
    """By trainer: how many results were applied at each step."""
    seen: dict[SwarmTrainer, dict[int, int]] = {}
    apply = SwarmTrainer.apply

    def note(trainer: SwarmTrainer, action: act.ApplyResults) -> None:
        seen.setdefault(trainer, {})[action.step] = len(action.updates)
        apply(trainer, action)

    monkeypatch.setattr(SwarmTrainer, "apply", note)
    return seen


def assert_in_order_of_the_run(count: int, *scripts: Script) -> None:
    """Together they have trained the run's first ``count`` samples, none of them twice but with the next pass."""
    seen = [index for script in scripts for index in script.samples_seen]
    assert sorted(seen) == sorted(sample_indices(range(count), SAMPLES, shuffle_seed("run")))


def twin_of(script: Script, updates: dict[int, CompressedUpdate]) -> list[Tensor]:
    """The weights that all of ``updates`` make, one after the other, without a run."""
    model = new_model(script.seed)
    optimizer = new_optimizer(model, **script.optimizer_settings)
    for step in sorted(updates):
        optimizer.apply([updates[step]], [group["lr"] for group in optimizer.param_groups])
    return [p.detach() for p in model.parameters()]


@pytest.mark.slow
def test_the_last_update_is_in_the_weights(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    updates: dict[int, CompressedUpdate] = {}
    trained = SimulatedPort.trained

    def keep(port: SimulatedPort, step: int, update: CompressedUpdate, own: object, **more: Any) -> None:
        updates[step] = update
        trained(port, step, update, own, **more)

    monkeypatch.setattr(SimulatedPort, "trained", keep)
    world = make_world(**PROMPT)
    script = Script(optimizer_settings={"weight_decay": 0.0})
    world.run(world.port(1), script)
    world.until_all_ended()
    assert sorted(updates) == script.trained == list(range(1, STEPS + 1))
    twin = twin_of(script, updates)
    assert all(torch.equal(mine, other) for mine, other in zip(script.weights, twin, strict=True))
    del updates[STEPS]
    twin = twin_of(script, updates)
    assert not all(torch.equal(mine, other) for mine, other in zip(script.weights, twin, strict=True))


@pytest.mark.slow
def test_as_many_results_are_applied_as_were_trained(
    make_world: MakeWorld, applied: dict[SwarmTrainer, dict[int, int]]
) -> None:
    world = make_world(**{**PROMPT, "init_min_clients": 3})
    scripts = [Script(seed=n) for n in range(3)]
    for number, script in enumerate(scripts, start=1):
        world.run(world.port(number), script)
    world.until_all_ended()
    assert all(script.trained == list(range(1, STEPS + 1)) for script in scripts)
    assert equal_weights(*scripts)
    world.assert_equal_hashes()
    for counts in applied.values():
        assert counts == dict.fromkeys(range(3, STEPS + 3), 3)
    assert_in_order_of_the_run(STEPS * 8, *scripts)


def test_a_schedule_of_as_many_steps_as_the_run_follows_it_to_its_end(make_world: MakeWorld) -> None:
    rates: dict[int, float] = {}

    def script(port: SimulatedPort) -> None:
        model = new_model()
        optimizer, data = new_optimizer(model), samples(torch.float32)
        with SwarmSession(model, optimizer, port=port, dataset_size=SAMPLES) as session:
            session.follow(OneCycleLR(optimizer, max_lr=0.1, total_steps=STEPS, cycle_momentum=False))
            assert session.total_steps == STEPS
            for round_ in session.rounds():
                rates[round_.step] = optimizer.param_groups[0]["lr"]
                model(data[round_.indices]).pow(2).mean().backward()
                round_.finish()

    world = make_world(**PROMPT)
    world.run(world.port(1), script)
    world.until_all_ended()
    plain = DisTrO(torch.nn.Linear(2, 2).parameters(), lr=1e-2)
    plain_schedule = OneCycleLR(plain, max_lr=0.1, total_steps=STEPS, cycle_momentum=False)
    plain._opt_called = True  # type: ignore[attr-defined]
    for step in range(1, STEPS + 1):
        assert rates[step] == plain.param_groups[0]["lr"]
        plain_schedule.step()


@pytest.mark.slow
def test_who_comes_for_the_last_epoch_has_the_weights_of_the_others(make_world: MakeWorld) -> None:
    world = make_world(**{**PROMPT, "total_steps": 31, "epoch_time": 20})
    scripts = [Script(seed=n) for n in range(2)]
    world.run(world.port(1), scripts[0])
    world.until_phase(RunState.ROUND_TRAIN, epoch=0, height=3)
    world.run(world.port(2), scripts[1])
    world.until_all_ended()
    assert scripts[1].trained
    assert scripts[0].trained[-1] == scripts[1].trained[-1]
    assert equal_weights(*scripts)
    assert_in_order_of_the_run(8 * len(scripts[0].trained), *scripts)


@pytest.mark.slow
def test_a_finished_run_that_is_given_more_steps_goes_on_with_the_data_that_come_next(
    make_world: MakeWorld, tmp_path: Path
) -> None:
    world = make_world(**PROMPT)
    first = Script(session_settings={"checkpoint_dir": tmp_path, "resume": True})
    world.run(world.port(1), first)
    world.until_all_ended()
    saved = CheckpointStore(tmp_path).latest()
    assert saved is not None
    assert saved.step == STEPS + 3

    longer = RunConfig(total_steps=saved.step + 4, epoch_time=400, warmup_time=30, max_round_train_time=15)
    state = state_to_resume(saved, longer)
    assert state is not None
    assert state.config.total_steps == saved.step + 7
    world = make_world(resumed=state)
    again = Script(session_settings={"checkpoint_dir": tmp_path, "resume": True})
    world.run(world.port(1), again)
    world.until_all_ended()
    assert again.trained == list(range(saved.step, saved.step + 5))
    assert_in_order_of_the_run(8 * (STEPS + 5), first, again)


@pytest.mark.slow
def test_a_run_that_is_resumed_without_a_length_keeps_its_own(make_world: MakeWorld, tmp_path: Path) -> None:
    world = make_world(**{**PROMPT, "total_steps": 43, "epoch_time": 20})
    world.run(world.port(1), Script(session_settings={"checkpoint_dir": tmp_path}))
    world.until_phase(RunState.ROUND_TRAIN, epoch=1, height=1)
    world.kill(world.ports[0])
    saved = CheckpointStore(tmp_path).latest()
    prompt = state_to_resume(saved, RunConfig())
    unhurried = state_to_resume(saved, RunConfig(round_witness_time=2))
    assert prompt is not None
    assert prompt.config.total_steps == 43, "40 steps are trained"
    assert unhurried is not None
    assert unhurried.config.total_steps == 41, "the same, as Psyche counts"


@pytest.mark.parametrize(("witness_time", "expected"), [(0, 13), (2, 11)])
def test_what_a_script_wants_to_train_is_trained(witness_time: int, expected: int) -> None:
    config = complete_config(RunConfig(round_witness_time=witness_time), batch_size=4, max_steps=10)
    assert config.coordinator_state("run").config.total_steps == expected


@pytest.mark.slow
def test_who_was_outside_when_the_run_ended_is_told(make_world: MakeWorld) -> None:
    world = make_world(**PROMPT)
    inside, late = Script(), Script()
    world.run(world.port(1), inside)
    world.until_phase(RunState.ROUND_TRAIN, epoch=0, height=3)
    world.run(world.port(2), late)
    world.until_all_ended()
    assert late.trained == []
    assert [text for text in late.news if "not those it ended with" in text]
    assert not [text for text in inside.news if "not those it ended with" in text]
