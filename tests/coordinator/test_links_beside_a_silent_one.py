"""When nothing comes from a coordinator, a link is opened beside the old one, which is left when the new one stands."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from coordinator.test_coordinator_link_failures import ScriptedServer, client_of, state_frame
from distro_optim.comm.streams import Stream
from distro_optim.coordinator.client.remote import RemoteCoordinator
from distro_optim.coordinator.types import RunState
from distro_optim.testing.coordinator import dummy_run

pytestmark = [pytest.mark.waiting]

SECONDS = 20.0
BESIDE = 0.05
NEWS = replace(dummy_run(), run_state=RunState.WARMUP)

Script = Callable[[ScriptedServer, Stream], Awaitable[None]]


async def until_it_goes(stream: Stream) -> None:
    while await stream.read(4096):
        pass


async def greet(server: ScriptedServer, stream: Stream) -> None:
    """Lets a client in, as a coordinator does: two states show that its join was taken."""
    await server.welcome(stream)
    await stream.write(state_frame(dummy_run()) + state_frame(dummy_run()))


@asynccontextmanager
async def joined(
    *scripts: Script, beside: float | None = BESIDE
) -> AsyncGenerator[tuple[ScriptedServer, RemoteCoordinator]]:
    server = ScriptedServer(*scripts)
    client = client_of(server, silence=SECONDS, beside=beside)
    async with asyncio.timeout(SECONDS):
        await client.join()
        yield server, client
        await client.close()
        await server.stop()


async def until_seen(client: RemoteCoordinator, state: RunState) -> None:
    async for seen in client.states():
        if seen.run_state is state:
            return


def test_a_link_that_falls_silent_is_replaced_and_then_closed() -> None:
    closed = asyncio.Event()

    async def falls_silent(server: ScriptedServer, stream: Stream) -> None:
        await greet(server, stream)
        await until_it_goes(stream)
        closed.set()

    async def goes_on(server: ScriptedServer, stream: Stream) -> None:
        assert not closed.is_set()  # beside it, not after it
        await greet(server, stream)
        while True:
            await stream.write(state_frame(NEWS))
            await asyncio.sleep(BESIDE / 5)

    async def scenario() -> None:
        async with joined(falls_silent, goes_on) as (server, client):
            await until_seen(client, RunState.WARMUP)
            await closed.wait()
            assert server.connections == 2

    asyncio.run(scenario())


def test_a_coordinator_that_is_only_slow_is_not_left_while_no_new_link_stands() -> None:
    speaks = asyncio.Event()

    async def slow(server: ScriptedServer, stream: Stream) -> None:
        await greet(server, stream)
        await speaks.wait()
        await stream.write(state_frame(NEWS))
        await until_it_goes(stream)

    async def dead_end(server: ScriptedServer, stream: Stream) -> None:
        speaks.set()
        await until_it_goes(stream)

    async def scenario() -> None:
        async with joined(slow, dead_end) as (server, client):
            await until_seen(client, RunState.WARMUP)
            assert client.connected
            assert server.connections == 2

    asyncio.run(scenario())


def test_an_old_link_that_the_coordinator_closes_for_the_new_one_costs_no_third() -> None:
    taken = asyncio.Event()
    clients: list[RemoteCoordinator] = []

    async def replaced(server: ScriptedServer, stream: Stream) -> None:
        await greet(server, stream)
        await taken.wait()

    async def takes_over(server: ScriptedServer, stream: Stream) -> None:
        await server.welcome(stream)
        clients[0].beside = None  # this one may be silent
        taken.set()
        await asyncio.sleep(0)
        await stream.write(state_frame(dummy_run()) + state_frame(NEWS))
        await until_it_goes(stream)

    async def scenario() -> None:
        async with joined(replaced, takes_over) as (server, client):
            clients.append(client)
            await until_seen(client, RunState.WARMUP)
            assert server.connections == 2

    asyncio.run(scenario())


def test_attempts_beside_a_silent_link_become_rarer() -> None:
    async def falls_silent(server: ScriptedServer, stream: Stream) -> None:
        await greet(server, stream)
        await until_it_goes(stream)

    async def closes(server: ScriptedServer, stream: Stream) -> None:
        pass

    async def scenario() -> None:
        pauses: list[int] = []

        class Slower:
            @staticmethod
            def delay(failures: int, draw: float) -> float:
                pauses.append(failures)
                return 0.0

        async with joined(falls_silent, closes) as (server, client):
            client._backoff = Slower()  # type: ignore[assignment]
            while server.connections < 6:
                await asyncio.sleep(0)
            assert pauses[:4] == [1, 2, 3, 4]

    asyncio.run(scenario())


def test_without_the_setting_a_silent_link_stays_until_it_counts_as_broken() -> None:
    async def falls_silent(server: ScriptedServer, stream: Stream) -> None:
        await greet(server, stream)
        await asyncio.sleep(4 * BESIDE)
        await stream.write(state_frame(NEWS))
        await until_it_goes(stream)

    async def scenario() -> None:
        async with joined(falls_silent, beside=None) as (server, client):
            await until_seen(client, RunState.WARMUP)
            assert server.connections == 1

    asyncio.run(scenario())
