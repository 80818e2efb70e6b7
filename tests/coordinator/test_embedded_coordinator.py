"""A coordinator inside the process: it ticks by itself, its time never runs backwards, and its end is heard."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from distro_optim.coordinator.server.embedded import EmbeddedCoordinator
from distro_optim.coordinator.server.host import Event, Joined, PhaseChanged, RunHost
from distro_optim.coordinator.types import RunState
from distro_optim.errors import ConfigurationError, JoinRefusedError
from distro_optim.testing.coordinator import dummy_run
from runs import client, clients

pytestmark = [pytest.mark.waiting]


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def test_it_ticks_in_the_background() -> None:
    async def work() -> None:
        now = [0]
        coordinator = EmbeddedCoordinator(RunHost(dummy_run()), clock=lambda: now[0], tick_seconds=0.001)
        async with coordinator:
            members = [coordinator.client(identity, "dummy") for identity in clients(1, 2, 3)]
            for member in members:
                await member.join()
            now[0] = 3
            async for state in members[2].states():
                if state.run_state is RunState.WARMUP:
                    break
        # With the coordinator the streams end, after what was not read yet.
        assert [state.run_state async for state in members[0].states()][-1] is RunState.WARMUP

    run(work())


def test_its_own_clock_is_unix_time() -> None:
    async def work() -> None:
        coordinator = EmbeddedCoordinator(RunHost(dummy_run()))
        for identity in clients(1, 2, 3):
            await coordinator.client(identity, "dummy").join()
        coordinator.tick()  # the dummy run waits since 1970
        assert coordinator.state.run_state is RunState.WARMUP
        assert coordinator.state.run_state_start_unix_timestamp > 1_700_000_000

    run(work())


def test_a_clock_that_is_set_back_does_not_turn_its_time_back() -> None:
    async def work() -> None:
        now = [1000]
        coordinator = EmbeddedCoordinator(RunHost(dummy_run()), clock=lambda: now[0])
        for identity in clients(1, 2, 3):
            await coordinator.client(identity, "dummy").join()
        coordinator.tick()
        now[0] = 0
        coordinator.tick()
        await coordinator.client(client(4), "dummy").join()
        assert coordinator.state.run_state_start_unix_timestamp == 1000
        now[0] = 1010
        coordinator.tick()
        assert coordinator.state.run_state is RunState.ROUND_TRAIN

    run(work())


def test_it_tells_what_happens() -> None:
    async def work() -> None:
        told: list[Event] = []
        now = [0]
        coordinator = EmbeddedCoordinator(RunHost(dummy_run()), clock=lambda: now[0], on_events=told.extend)
        for identity in clients(1, 2, 3):
            await coordinator.client(identity, "dummy").join()
        now[0] = 3
        coordinator.tick()
        assert told[:3] == [Joined(client=identity) for identity in clients(1, 2, 3)]
        assert told[3:] == [PhaseChanged(before=RunState.WAITING_FOR_MEMBERS, after=RunState.WARMUP)]

    run(work())


def test_a_failure_inside_reaches_whoever_reads_the_states() -> None:
    async def work() -> None:
        def broken() -> float:
            if joined:
                raise RuntimeError("no clock")
            return 0.0

        joined: list[bool] = []
        coordinator = EmbeddedCoordinator(RunHost(dummy_run()), clock=broken, tick_seconds=0.001)
        member = coordinator.client(client(1), "dummy")
        await member.join()
        joined.append(True)
        async with coordinator:
            with pytest.raises(RuntimeError, match="no clock"):
                async for _ in member.states():
                    pass

    run(work())


def test_the_same_client_cannot_be_in_twice() -> None:
    async def work() -> None:
        coordinator = EmbeddedCoordinator(RunHost(dummy_run()))
        first = coordinator.client(client(1), "dummy")
        await first.join()
        with pytest.raises(ConfigurationError, match="already"):
            await coordinator.client(client(1), "dummy").join()
        await first.close()
        await coordinator.client(client(1), "dummy").join()

    run(work())


def test_a_key_that_is_not_on_the_list_is_refused() -> None:
    async def work() -> None:
        coordinator = EmbeddedCoordinator(RunHost(dummy_run(), allowed=[client(1).signer]))
        await coordinator.client(client(1), "dummy").join()
        with pytest.raises(JoinRefusedError, match="not on the list") as caught:
            await coordinator.client(client(2), "dummy").join()
        assert caught.value.hosted is None

    run(work())


def test_a_tick_that_takes_no_time_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="tick_seconds"):
        EmbeddedCoordinator(RunHost(dummy_run()), tick_seconds=0.0)
