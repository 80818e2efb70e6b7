from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from distro_optim.strategy.model.audits import keeper

from .auditing import AuditedRun, InlineJobs
from .scripts import Script
from .world import SessionWorld


@pytest.fixture
def make_world() -> Iterator[Callable[..., SessionWorld]]:
    """Makes worlds, and ends their threads after the test."""
    made: list[SessionWorld] = []

    def make(**settings: Any) -> SessionWorld:
        made.append(SessionWorld(**settings))
        return made[-1]

    yield make
    for world in made:
        world.release()


@pytest.fixture
def audited_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., AuditedRun]]:
    """Runs scripts that audit each other for some steps, and ends their threads after the test."""
    monkeypatch.setattr(keeper, "SideJobs", InlineJobs)
    worlds: list[AuditedRun] = []

    def start(scripts: list[Script], *, steps: int, **settings: Any) -> AuditedRun:
        world = AuditedRun(4 * len(scripts), **settings)  # a norm over a batch needs more than one sample
        worlds.append(world)
        for number, script in enumerate(scripts, start=1):
            world.run(world.port(number), script)
        world.until(lambda state: state.progress.step > steps)
        return world

    yield start
    for world in worlds:
        world.release()
