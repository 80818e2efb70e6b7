"""A run goes on from its checkpoints, with the same peers, fewer, or more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distro_optim.coordinator.types import Coordinator, RunState
from distro_optim.errors import ConfigurationError
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.model.checkpoint import CheckpointStore
from distro_optim.strategy.model.identity import weights_root
from distro_optim.strategy.model.resuming import state_to_resume
from distro_optim.strategy.round import Round

from .scripts import SAMPLES, Net, Script, equal_weights
from .world import SessionWorld

MakeWorld = Callable[..., SessionWorld]
SETTINGS = {"total_steps": 200, "epoch_time": 40, "init_min_clients": 2, "min_clients": 1}


def saving(folder: Path, **settings: Any) -> Script:
    return Script(session_settings={"checkpoint_dir": folder, "resume": True}, **settings)


def run_until_second_epoch(make_world: MakeWorld, *scripts: Script) -> SessionWorld:
    """All are killed in the second epoch, some rounds after the checkpoint at the end of the first."""
    world = make_world(**SETTINGS)
    for number, script in enumerate(scripts, start=1):
        world.run(world.port(number), script)
    world.until_phase(RunState.ROUND_TRAIN, epoch=1, height=4)
    for port in world.ports:
        world.kill(port)
    return world


def state_of(folder: Path, total_steps: int) -> Coordinator:
    config = RunConfig(total_steps=total_steps, epoch_time=40, warmup_time=10, max_round_train_time=15)
    state = state_to_resume(CheckpointStore(folder).latest(), config)
    assert state is not None
    return state


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_killed_run_goes_on_with_fewer_the_same_or_more_peers(
    make_world: MakeWorld, tmp_path: Path, count: int
) -> None:
    folders = [tmp_path / str(n) for n in range(3)]
    run_until_second_epoch(make_world, *(saving(folder, seed=n) for n, folder in enumerate(folders[:2])))
    saved = CheckpointStore(folders[0]).latest()
    assert saved is not None

    begun: list[tuple[int, bytes, bool]] = []

    def note(script: Script, round_: Round) -> None:
        if script.seed == 10 and len(script.trained) == 1:
            begun.append((round_.step, b"", False))

    state = state_of(folders[0], saved.step + 12)
    assert state.progress.step == saved.step
    world = make_world(resumed=state)
    scripts = [saving(folders[n], seed=10 + n, after=note) for n in range(count)]
    for number, script in enumerate(scripts, start=1):
        world.run(world.port(number), script)
    world.until_all_ended()
    assert begun[0][0] == saved.step
    assert world.ports[0].hashes[saved.step]
    assert equal_weights(*scripts)
    world.assert_equal_hashes()
    assert all(script.trained for script in scripts)
    assert state.run_id == saved.run_id


@pytest.mark.slow
def test_weights_and_own_momentum_are_those_of_the_checkpoint(make_world: MakeWorld, tmp_path: Path) -> None:
    folders = [tmp_path / str(n) for n in range(2)]
    run_until_second_epoch(make_world, *(saving(folder, seed=n) for n, folder in enumerate(folders)))
    saved = [CheckpointStore(folder).latest() for folder in folders]
    assert saved[0] is not None
    assert saved[1] is not None
    assert saved[0].identity.weights == saved[1].identity.weights
    checked = []

    def compare(script: Script) -> None:
        number = script.seed - 10
        if number not in checked:
            checked.append(number)
            momentum, expected = script.trainer.momentum(), saved[number].momentum()  # type: ignore[union-attr]
            assert all(torch.equal(momentum[name], expected[name]) for name in expected)
            assert any(bool(delta.any()) for delta in momentum.values())

    world = make_world(resumed=state_of(folders[0], saved[0].step + 5))
    scripts = [saving(folder, seed=10 + n, during=compare) for n, folder in enumerate(folders)]
    for number, script in enumerate(scripts, start=1):
        world.run(world.port(number), script)
    world.until_phase(RunState.WARMUP)
    world.until_all_ended()
    assert sorted(checked) == [0, 1]
    assert not any("other weights" in line for script in scripts for line in script.news)


@pytest.mark.slow
def test_who_comes_back_to_a_run_that_went_on_takes_its_weights_and_says_so(
    make_world: MakeWorld, tmp_path: Path
) -> None:
    world = make_world(**{**SETTINGS, "total_steps": 70})
    others = [Script(seed=n) for n in range(2)]
    for number, script in enumerate([*others, saving(tmp_path, seed=2)], start=1):
        world.run(world.port(number), script)
    world.until_phase(RunState.ROUND_TRAIN, epoch=1, height=2)
    world.kill(world.ports[2])
    world.until_phase(RunState.ROUND_TRAIN, epoch=2, height=2)
    back = saving(tmp_path, seed=3)
    world.run(world.port(4), back)
    world.until_all_ended()
    assert back.trained
    assert equal_weights(*others, back)
    assert any(line.startswith("resuming from") for line in back.news)
    assert any("other weights than our checkpoint" in line and "the run's count" in line for line in back.news)


@pytest.mark.slow
def test_the_data_go_on_where_they_were(make_world: MakeWorld, tmp_path: Path) -> None:
    world = make_world(**{**SETTINGS, "init_min_clients": 1, "total_steps": 500})
    first = saving(tmp_path)
    world.run(world.port(1), first)
    world.until_phase(RunState.ROUND_TRAIN, epoch=1, height=0)
    state = world.state
    world.kill(world.ports[0])
    resumed = state_of(tmp_path, 500)
    assert resumed.progress.epoch_start_data_index == state.progress.epoch_start_data_index > SAMPLES


@pytest.mark.slow
def test_the_end_of_the_run_and_leaving_early_are_saved(make_world: MakeWorld, tmp_path: Path) -> None:
    world = make_world(total_steps=9, epoch_time=200, init_min_clients=1, min_clients=1)
    script = saving(tmp_path / "end")
    world.run(world.port(1), script)
    world.until_all_ended()
    found = CheckpointStore(tmp_path / "end").latest()
    assert found is not None
    assert found.step == 9
    assert found.identity.weights == weights_root(script.trainer.tensors)

    class EnoughError(Exception):
        pass

    def stop(script: Script, round_: Round) -> None:
        if round_.step == 4:
            raise EnoughError

    world = make_world(total_steps=9, epoch_time=200, init_min_clients=1, min_clients=1)
    script = saving(tmp_path / "early", after=stop)
    world.run(world.port(1), script)
    with pytest.raises(EnoughError):
        world.until_all_ended()
    found = CheckpointStore(tmp_path / "early").latest()
    assert found is not None
    assert found.step == 4
    assert found.identity.weights == weights_root(script.trainer.tensors)


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_saved_is_told_and_training_goes_on(
    make_world: MakeWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    world = make_world(total_steps=30, epoch_time=40, init_min_clients=1, min_clients=1)
    script = saving(tmp_path)
    world.run(world.port(1), script)
    world.until_phase(RunState.ROUND_TRAIN, epoch=1)
    monkeypatch.setattr(CheckpointStore, "save", full)
    world.until_all_ended()
    assert CheckpointStore(tmp_path).latest() is not None
    told = [line for line in script.news if "could not be saved" in line]
    assert told
    assert all("No space left on device; make room there" in line for line in told)
    assert script.trained[-1] >= 27


@pytest.mark.slow
def test_resuming_another_model_says_what_differs(make_world: MakeWorld, tmp_path: Path) -> None:
    class Wider(Net):
        def __init__(self) -> None:
            super().__init__()
            self.sometimes = torch.nn.Parameter(torch.zeros(7))

    world = make_world(total_steps=9, epoch_time=200, init_min_clients=1, min_clients=1)
    world.run(world.port(1), saving(tmp_path))
    world.until_all_ended()
    world = make_world(total_steps=9, epoch_time=200, init_min_clients=1, min_clients=1)
    world.run(world.port(1), saving(tmp_path, model_class=Wider))
    with pytest.raises(ConfigurationError, match="shape of sometimes is 7 in the model and 5 in the checkpoint"):
        world.until_all_ended()


def test_there_may_be_nothing_to_resume(make_world: MakeWorld, tmp_path: Path) -> None:
    world = make_world(total_steps=5, epoch_time=200, init_min_clients=1, min_clients=1)
    script = saving(tmp_path)
    world.run(world.port(1), script)
    world.until_all_ended()
    assert script.news == [f"there is no checkpoint in {tmp_path} yet; starting without one"]
