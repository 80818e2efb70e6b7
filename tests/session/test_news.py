"""News reaches the user of a script: by its own function, or where there is none, by the log as Python shows it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from distro_optim import logs
from distro_optim.logs import LogOptions
from distro_optim.strategy.environment import RunEnvironment
from distro_optim.strategy.news import News
from distro_optim.strategy.rounds import actions as act

from .scripts import Script
from .world import SessionWorld

SENTENCE = "the checkpoint of step 3 could not be saved"


def levels(log: pytest.LogCaptureFixture) -> list[int]:
    return [record.levelno for record in log.records if record.name.startswith("distro_optim")]


def test_without_a_function_of_the_scripts_they_are_warnings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "distro_optim")
    news = News(None, RunEnvironment())
    news.tell(SENTENCE)
    news.event(act.Desynced(step=3, reason="missed", tensors=()))
    assert SENTENCE in caplog.text
    assert levels(caplog) == [logging.WARNING] * 2


def test_what_happens_all_the_time_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "distro_optim")
    News(None, RunEnvironment()).event(act.ResultMissing(step=3, batches=()))
    assert levels(caplog) == [logging.INFO]


def test_what_the_script_is_told_is_not_shown_twice(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "distro_optim")
    told: list[str] = []
    News(told.append, RunEnvironment()).tell(SENTENCE)
    News(None, RunEnvironment(), quiet=True).tell(SENTENCE)  # another process of this machine
    assert told == [SENTENCE]
    assert levels(caplog) == [logging.INFO] * 2


def test_a_script_logs_to_the_file_that_the_environment_names(
    make_world: Callable[..., SessionWorld], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = LogOptions(file=tmp_path / "run.log", form="json")
    for name, value in log.variables().items():
        monkeypatch.setenv(name, value)
    world = make_world(total_steps=6, epoch_time=200, init_min_clients=1, min_clients=1)
    world.run(world.port(1), Script(session_settings={"checkpoint_dir": tmp_path / "here"}))
    try:
        world.until_all_ended()
    finally:
        logs._end(log)
    lines = [json.loads(line)["message"] for line in log.file.read_text().splitlines()]
    assert any(line.startswith("saved ") for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("error", [BrokenPipeError, ValueError])
def test_a_function_that_fails_stops_neither_the_start_nor_the_rounds(
    error: type[Exception], make_world: Callable[..., SessionWorld], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[str] = []

    def fail(text: str) -> NoReturn:
        told.append(text)
        raise error(text)

    world = make_world(total_steps=8, epoch_time=200, init_min_clients=1, min_clients=1)
    port = world.port(1)
    # An empty folder to resume from is news before the run begins.
    script = Script(session_settings={"on_event": fail, "checkpoint_dir": tmp_path, "resume": True})

    def after(script: Script, _: object) -> None:
        script.session._news.tell(SENTENCE)

    script.after = after
    world.run(port, script)
    world.until_all_ended()
    assert len(script.trained) == 7
    assert len(told) > len(script.trained)
    assert SENTENCE in told
    assert [r.name for r in caplog.records if "on_event raised" in r.message] == ["distro_optim.callbacks"]
