"""Processes on one machine that run the same script in one folder do not get in each other's way."""

from __future__ import annotations

from pathlib import Path

import pytest

from distro_optim.coordinator.types import RunState
from distro_optim.strategy.model import checkpoint_place
from distro_optim.strategy.model.checkpoint import CheckpointStore
from distro_optim.strategy.model.checkpoint_place import CheckpointPlace

from .scripts import Script
from .test_resuming import SETTINGS, MakeWorld


def test_each_has_a_folder_and_finds_it_again(tmp_path: Path) -> None:
    first, second = CheckpointPlace.take(tmp_path), CheckpointPlace.take(tmp_path)
    assert (first.directory, second.directory) == (tmp_path, tmp_path / "peer-2")
    first.release()
    first.release()
    again, third = CheckpointPlace.take(tmp_path), CheckpointPlace.take(tmp_path)
    assert (again.directory, third.directory) == (tmp_path, tmp_path / "peer-3")
    for place in (second, again, third):
        place.release()


def test_where_nothing_can_be_locked_the_folder_is_used_as_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_place, "lock_file", lambda path: None)
    assert CheckpointPlace.take(tmp_path).directory == tmp_path
    (tmp_path / "file").write_text("")
    assert CheckpointPlace.take(tmp_path / "file" / "inside").directory == tmp_path / "file" / "inside"


def test_two_peers_with_one_folder_save_in_one_each_and_say_so(make_world: MakeWorld, tmp_path: Path) -> None:
    world = make_world(**SETTINGS)
    scripts = [Script(session_settings={"checkpoint_dir": tmp_path}, seed=number) for number in (0, 1)]
    for number, script in enumerate(scripts, start=1):
        world.run(world.port(number), script)
    world.until_phase(RunState.ROUND_TRAIN, epoch=1, height=2)
    for port in world.ports:
        world.kill(port)
    saved = [CheckpointStore(folder).latest() for folder in (tmp_path, tmp_path / "peer-2")]
    assert saved[0] is not None
    assert saved[1] is not None
    assert saved[0].identity.weights == saved[1].identity.weights
    (told,) = [text for text in scripts[1].news if "another process" in text]
    assert told.endswith(f"saves checkpoints in {tmp_path}: this one has {tmp_path / 'peer-2'}")
