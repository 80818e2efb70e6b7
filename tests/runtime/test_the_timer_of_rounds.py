"""The rounds' timer is set again where its time changes, on any event loop."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from distro_optim.strategy.network.driver import RoundDriver


@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
@pytest.mark.parametrize("ahead", [-1.0, 0.0, 60.0])
def test_a_timer_is_kept_until_its_time_changes_though_it_is_due_at_once(kind: str, ahead: float) -> None:
    """uvloop gives a handle without a time for what is due already."""
    loop: asyncio.AbstractEventLoop = pytest.importorskip(kind).new_event_loop()
    due: float | None = loop.time() + ahead
    driver = object.__new__(RoundDriver)
    driver.rounds = SimpleNamespace(next_timer=lambda: due)  # type: ignore[assignment]
    driver._loop, driver._over, driver._timer, driver._due = loop, loop.create_future(), None, None
    try:
        driver._set_timer()
        first = driver._timer
        assert first is not None
        driver._set_timer()
        assert driver._timer is first
        due = loop.time() + 120.0
        driver._set_timer()
        assert first.cancelled()
        assert driver._timer is not first
        due = None
        driver._set_timer()
        assert driver._timer is None
    finally:
        loop.close()
