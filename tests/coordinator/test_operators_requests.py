"""An operator pauses a run that is hosted here, changes its settings, and lets it go on."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from distro_optim.cli import main
from distro_optim.coordinator.rules.steps import last_trained_step
from distro_optim.coordinator.server.control import MAX_BYTES, ControlFolder, Request
from distro_optim.coordinator.server.host import RunHost, restartable
from distro_optim.coordinator.server.server import CoordinatorServer
from distro_optim.coordinator.server.service import CoordinatorService
from distro_optim.coordinator.server.store import StateStore
from distro_optim.coordinator.types import RunState
from distro_optim.errors import ConfigurationError, RunError
from distro_optim.operate.asking import ask
from distro_optim.serve.serving import initial_state
from distro_optim.strategy.config import RunConfig
from runs import waiting_run


class Hosted:
    """A server's folder and its host; ``wait`` is a tick of the server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = RunHost(waiting_run("run/1"))
        self.store = StateStore(folder, "run/1")
        self.control = ControlFolder(self.store.directory, self.store.run_id)

    def wait(self, seconds: float) -> None:
        self.control.carry_out(self.host, 100)

    def ask(self, action: str, **settings: Any) -> str:
        return ask(self.folder, "run/1", action, settings, wait=self.wait)


@pytest.fixture
def hosted(tmp_path: Path) -> Any:
    hosted = Hosted(tmp_path)
    yield hosted
    hosted.store.close()


def test_a_run_is_paused_changed_and_resumed(hosted: Hosted) -> None:
    assert hosted.ask("pause") == "run run/1: paused"
    assert hosted.host.state.run_state == RunState.PAUSED
    assert "epoch_time is 77" in hosted.ask("set", epoch_time=77, global_batch_size=24)
    config = hosted.host.state.config
    assert (config.epoch_time, config.global_batch_size_start, config.global_batch_size_end) == (77, 24, 24)
    assert hosted.host.snapshot(100).config == config, "and it is saved"
    hosted.ask("resume")
    now: RunState = hosted.host.state.run_state
    assert now is RunState.WAITING_FOR_MEMBERS


def test_the_number_of_steps_is_that_of_run_config(tmp_path: Path) -> None:
    for witness_time in (0, 5):
        config = RunConfig(total_steps=50, global_batch_size=8, round_witness_time=witness_time)
        host = RunHost(config.coordinator_state("run"))
        with StateStore(tmp_path / str(witness_time), "run") as store:
            control = ControlFolder(store.directory, store.run_id)
            serve = partial(_tick, control, host)
            ask(store.directory, "run", "pause", {}, wait=serve)
            ask(store.directory, "run", "set", {"total_steps": 80}, wait=serve)
        wanted = RunConfig(total_steps=80, global_batch_size=8, round_witness_time=witness_time)
        assert host.state.config == wanted.coordinator_state("run").config
        assert last_trained_step(host.state.config) == wanted.last_step


def _tick(control: ControlFolder, host: RunHost, seconds: float) -> None:
    control.carry_out(host, 100)


def test_a_server_looks_for_requests_and_saves_what_they_change(hosted: Hosted) -> None:
    async def serve() -> None:
        service = CoordinatorService(hosted.host, draw=os.urandom, unix_offset=0)
        async with CoordinatorServer(service, [], store=hosted.store, tick_seconds=0.01):
            for action, settings in (("pause", {}), ("set", {"epoch_time": 78})):
                await asyncio.to_thread(ask, hosted.folder, "run/1", action, settings)

    asyncio.run(serve())
    saved = hosted.store.load()
    assert saved is not None
    assert saved.config.epoch_time == 78


def test_a_pause_is_saved_at_once_whoever_asked_for_it_and_outlives_the_server(hosted: Hosted) -> None:
    async def serve() -> None:
        service = CoordinatorService(hosted.host, draw=os.urandom, unix_offset=0)
        async with CoordinatorServer(service, [], store=hosted.store, tick_seconds=0.01):
            service.note(hosted.host.pause(100), 100)  # as a signal and the page do it
            async with asyncio.timeout(30):
                while not hosted.store.files():
                    await asyncio.sleep(0.01)
            saved = hosted.store.load()
            assert saved is not None
            assert saved.run_state is RunState.PAUSED

    asyncio.run(serve())
    state, note = initial_state(waiting_run("run/1"), hosted.store, resume=True)
    assert RunHost(restartable(state, 200)).state.run_state is RunState.PAUSED
    assert (
        f"it is paused, as it was when it was saved: distro-optim run resume run/1 --save-dir {hosted.folder}" in note
    )


def test_a_state_file_that_says_paused_begins_all_the_same() -> None:
    state, _ = initial_state(replace(waiting_run("run/1"), run_state=RunState.PAUSED), None, resume=False)
    assert state.run_state is RunState.WAITING_FOR_MEMBERS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epoch_tim": 7}, "a run has no setting 'epoch_tim': there are cooldown_time, "),
        ({"verification_percent": 7}, "no setting"),
        ({"epoch_time": -1}, "must be a whole number"),
        ({"epoch_time": 1 << 40}, "must be a whole number"),
        ({"min_clients": 0}, "config.min_clients is 0"),
        ({"round_witness_time": 0}, "what kind of run it is"),
    ],
)
def test_settings_that_cannot_be_change_nothing(hosted: Hosted, settings: dict[str, int], message: str) -> None:
    hosted.ask("pause")
    before = hosted.host.state
    with pytest.raises(ConfigurationError, match=message):
        hosted.ask("set", **settings)
    assert hosted.host.state is before


def test_a_run_that_goes_on_keeps_its_settings(hosted: Hosted) -> None:
    with pytest.raises(ConfigurationError, match="only while it is paused: pause it first"):
        hosted.ask("set", epoch_time=77)
    with pytest.raises(ConfigurationError):
        hosted.ask("resume")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"action": ["pause"]}', "[" * 5000, " " * (MAX_BYTES + 1), "\xff"])
def test_garbage_in_the_folder_is_refused_and_removed(hosted: Hosted, text: str) -> None:
    before = hosted.host.state
    file = hosted.folder / ".run%2F1.request.json"
    file.write_bytes(text.encode("latin-1"))
    assert hosted.control.carry_out(hosted.host, 100) is None
    assert not file.exists()
    assert hosted.host.state is before


def test_who_has_no_server_or_gets_no_answer_is_told(hosted: Hosted, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(RunError, match="has not answered within 30 s"):
        ask(hosted.folder, "run/1", "pause", {}, wait=lambda _: None)
    stranger = Request(number="1", action="pause", settings={})
    (hosted.folder / ".run%2F1.answer.json").write_text(json.dumps({"number": "2", "done": True}))
    assert hosted.control.answer_to(stranger) is None, "the answer to somebody else"
    with pytest.raises(ConfigurationError, match="no server keeps the run 'other'"):
        ask(tmp_path, "other", "pause", {})
    hosted.store.close()
    assert main(["run", "set", "run/1", "epoch_time=9", "--save-dir", str(hosted.folder)]) == 2
    assert "no server keeps the run 'run/1'" in capsys.readouterr().err
