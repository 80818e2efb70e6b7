from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

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
