"""A server and all its clients are started again: the weights are in checkpoints, and nobody shares them yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distro_optim.coordinator.model import P2P, Hub
from distro_optim.coordinator.rules.checkpoints import SHARED_BY_PEERS
from distro_optim.coordinator.types import Coordinator, RunState
from distro_optim.errors import RunError
from distro_optim.strategy.model.checkpoint import Checkpoint, CheckpointStore
from distro_optim.strategy.model.identity import weights_root

from .scripts import Script, equal_weights, participant_of
from .world import SessionWorld

MakeWorld = Callable[..., SessionWorld]
SETTINGS = {"total_steps": 200, "epoch_time": 40, "init_min_clients": 2, "min_clients": 1}
MORE_ROUNDS = 12


def saving(folder: Path, **settings: Any) -> Script:
    return Script(session_settings={"checkpoint_dir": folder, "resume": True}, **settings)


def saved_at_the_start(folder: Path, state: Coordinator) -> Checkpoint:
    """The checkpoint of the step to which a server goes back; the sessions, which left later, have a newer one."""
    store = CheckpointStore(folder)
    newest, found = store.latest(), store.of_step(state.epoch_state.start_step, state.run_id)
    assert found is not None
    assert newest is not None
    assert newest.step > found.step
    return found


@pytest.fixture
def interrupted(make_world: MakeWorld, tmp_path: Path) -> Coordinator:
    """Two peers with the folders ``0`` and ``1``, and their server, are killed in the second epoch."""
    world = make_world(**SETTINGS)
    for number in range(2):
        world.run(world.port(number + 1), saving(tmp_path / str(number), seed=number))
    world.until_phase(RunState.ROUND_TRAIN, epoch=1, height=4)
    state = world.state  # as the server, which goes first, has saved it
    for port in world.ports:
        world.kill(port)
    assert state.model.checkpoint == P2P(SHARED_BY_PEERS), "they are to ask each other"
    return replace(state, config=replace(state.config, total_steps=state.progress.step + MORE_ROUNDS))


@pytest.mark.slow
def test_those_with_a_checkpoint_of_that_step_go_on_with_it(
    make_world: MakeWorld, tmp_path: Path, interrupted: Coordinator
) -> None:
    saved = [saved_at_the_start(tmp_path / str(number), interrupted) for number in range(2)]
    own = [checkpoint.momentum() for checkpoint in saved]
    momentum: dict[int, dict[str, torch.Tensor]] = {}

    def note(script: Script) -> None:
        momentum.setdefault(script.seed, script.trainer.momentum())

    world = make_world(resumed=interrupted)
    scripts = [saving(tmp_path / str(number), seed=10 + number, during=note) for number in range(2)]
    for number, script in enumerate(scripts, start=1):
        world.run(world.port(number), script)
    world.until_all_ended()
    assert scripts[0].trained[0] == scripts[1].trained[0] == saved[0].step
    assert equal_weights(*scripts)
    world.assert_equal_hashes()
    for number, deltas in enumerate(own):
        assert all(torch.equal(momentum[10 + number][name], delta) for name, delta in deltas.items())
    assert any(line.startswith("nobody shares the model") for script in scripts for line in script.news)


@pytest.mark.slow
def test_who_has_none_gets_the_model_from_who_has(
    make_world: MakeWorld, tmp_path: Path, interrupted: Coordinator
) -> None:
    world = make_world(resumed=interrupted)
    scripts = [saving(tmp_path / "empty", seed=10), saving(tmp_path / "1", seed=11)]
    for number, script in enumerate(scripts, start=1):
        world.run(world.port(number), script)
    step = saved_at_the_start(tmp_path / "1", interrupted).step
    world.until_all_ended()
    assert scripts[0].trained[0] == scripts[1].trained[0] == step
    assert equal_weights(*scripts)


@pytest.mark.slow
def test_what_a_peer_shares_counts_more_than_a_checkpoint(make_world: MakeWorld, tmp_path: Path) -> None:
    world = make_world(**{**SETTINGS, "total_steps": 100})
    scripts = [Script(seed=1), Script(seed=2)]
    for number, script in enumerate(scripts, start=1):
        world.run(world.port(number), script)
    world.until_phase(RunState.COOLDOWN)
    # A checkpoint of this very step of a run of this name, with other weights.
    offered = world.ports[0].offered
    session = scripts[0].session
    values = {name: value + 1 for name, value in participant_of(session).trainer.tensors.copies().items()}
    state = world.state
    identity = participant_of(session)._handover.identity(
        state.progress.epoch, state.progress.step, weights_root(participant_of(session).trainer.tensors, values)
    )
    assert offered is not None
    CheckpointStore(tmp_path).save(
        scripts[0].model,
        values,
        participant_of(session).trainer.momentum(),
        run_id=state.run_id,
        identity=identity,
        state=state,
    )
    late = saving(tmp_path, seed=3)
    world.run(world.port(3), late)
    world.until_phase(RunState.ROUND_TRAIN, epoch=1, height=3)
    world.until_all_ended()
    assert late.trained[0] == state.progress.step
    assert equal_weights(*scripts, late)
    assert any("other weights than our checkpoint" in line for line in late.news)


@pytest.mark.slow
def test_the_first_of_the_list_does_not_begin_anew_what_another_has_saved(
    make_world: MakeWorld, tmp_path: Path, interrupted: Coordinator
) -> None:
    # Nobody of the last epoch returns, so the coordinator no longer says that peers have the model.
    world = make_world(resumed=replace(interrupted, epoch_state=replace(interrupted.epoch_state, clients=())))
    scripts = [Script(seed=10), saving(tmp_path / "1", seed=11)]
    for number, script in enumerate(scripts, start=8):
        world.run(world.port(number), script)
    step = saved_at_the_start(tmp_path / "1", interrupted).step
    begun = world.until_phase(RunState.ROUND_TRAIN)
    assert [client.id for client in begun.epoch_state.clients] == [port.identity for port in world.ports]
    assert begun.model.checkpoint == Hub(SHARED_BY_PEERS)
    world.until_all_ended()
    assert scripts[0].trained[0] == scripts[1].trained[0] == step
    assert equal_weights(*scripts)


@pytest.mark.slow
def test_where_nobody_has_it_all_end_and_say_what_would_help(
    make_world: MakeWorld, tmp_path: Path, interrupted: Coordinator
) -> None:
    world = make_world(resumed=interrupted)
    scripts = [Script(seed=10), saving(tmp_path / "empty", seed=11)]
    for number, script in enumerate(scripts, start=2):
        world.run(world.port(number), script)
    with pytest.raises(RunError, match=r"none of its peers has its weights: start a peer that has a checkpoint"):
        world.until_all_ended()
    assert not any(script.trained for script in scripts)


@pytest.mark.slow
def test_who_has_an_older_checkpoint_goes_on_with_that_if_nobody_has_another(
    make_world: MakeWorld, tmp_path: Path, interrupted: Coordinator
) -> None:
    progress = replace(interrupted.progress, step=interrupted.epoch_state.start_step + 1)
    later = replace(interrupted, run_state=RunState.WAITING_FOR_MEMBERS, progress=progress)
    world = make_world(resumed=replace(later, epoch_state=replace(later.epoch_state, clients=())))
    scripts = [saving(tmp_path / "0", seed=10), Script(seed=11)]
    for number, script in enumerate(scripts, start=2):
        world.run(world.port(number), script)
    world.until_all_ended()
    assert scripts[0].trained
    assert equal_weights(*scripts)


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_not_taken_for_one_of_this(
    make_world: MakeWorld, tmp_path: Path, interrupted: Coordinator
) -> None:
    world = make_world(resumed=replace(interrupted, run_id="another"))
    scripts = [saving(tmp_path / str(number), seed=10 + number) for number in range(2)]
    for number, script in enumerate(scripts, start=2):
        world.run(world.port(number), script)
    world.until(lambda _: all(any("could not be loaded" in line for line in script.news) for script in scripts))
    assert not any(script.trained for script in scripts)
