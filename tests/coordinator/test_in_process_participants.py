"""A participant in the server's own process is in the run like any other, but no bytes lie between it and the host."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from coordinator.coordinator_arenas import HostedArena, key
from distro_optim.coordinator.server import service as service_module
from distro_optim.coordinator.server.host import RunHost
from distro_optim.coordinator.types import Coordinator, NodeIdentity, RunState, Witness, WitnessProof
from distro_optim.errors import ConfigurationError, CoordinatorLinkError, JoinRefusedError
from distro_optim.testing.coordinator import Follower, dummy_run, joined, until_true

pytestmark = [pytest.mark.waiting]

FLOOD = 500
"""Messages in a row; five times as many as the burst of one stranger."""


def run(work: Callable[[HostedArena], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        arena = HostedArena()
        async with arena:
            await work(arena)

    asyncio.run(main())


def identity(number: int) -> NodeIdentity:
    return NodeIdentity.from_single_key(key(number).public)


@pytest.fixture
def framed(monkeypatch: pytest.MonkeyPatch) -> list[Coordinator]:
    """The states that were made into bytes."""
    seen: list[Coordinator] = []
    frame_of = service_module.frame_of

    def counting(state: Coordinator) -> bytes:
        seen.append(state)
        return frame_of(state)

    monkeypatch.setattr(service_module, "frame_of", counting)
    return seen


def test_it_gets_the_very_object_that_the_host_keeps_and_no_bytes_are_made(framed: list[Coordinator]) -> None:
    async def work(arena: HostedArena) -> None:
        followers = await joined(arena, 3)
        await arena.advance(3)
        for follower in followers:
            assert await follower.in_phase(RunState.WARMUP) is arena.state
        assert framed == []

    run(work)


def test_it_trains_in_one_epoch_with_clients_from_outside(framed: list[Coordinator]) -> None:
    async def work(arena: HostedArena) -> None:
        (host,) = await joined(arena, 1)
        guests = [Follower(arena.remote_client(number)) for number in (1, 2)]
        for guest in guests:
            await guest.client.join()
        await arena.advance(3)
        for follower in (host, *guests):
            state = await follower.in_phase(RunState.WARMUP)
            assert [listed.id for listed in state.epoch_state.clients] == [identity(number) for number in (0, 1, 2)]
            index = follower.index()
            await follower.client.warmup_witness(Witness(WitnessProof(index, index, False)))
        for follower in (host, *guests):
            await follower.in_phase(RunState.ROUND_TRAIN)
        assert framed
        for follower in (host, *guests):
            await follower.client.close()

    run(work)


def test_a_flood_of_its_messages_neither_drops_it_nor_holds_up_the_server() -> None:
    async def work(arena: HostedArena) -> None:
        host, other = await joined(arena, 2)
        guest = arena.remote_client(2)
        await guest.join()
        ticks = arena.service.ticks

        async def flood() -> None:
            # Until the server has ticked, and far beyond what a stranger may send.
            sent = 0
            while sent < FLOOD or arena.service.ticks < ticks + 3:
                await host.client.warmup_witness(Witness(WitnessProof(0, 0, False)))
                sent += 1

        await asyncio.wait_for(flood(), 20)
        assert identity(0) in arena.service.host.pending
        await arena.advance(3)
        for follower in (host, other, Follower(guest)):
            await follower.in_phase(RunState.WARMUP)
        await guest.close()

    run(work)


def test_a_connection_with_its_key_is_closed_and_it_stays_in_the_run() -> None:
    async def work(arena: HostedArena) -> None:
        (host,) = await joined(arena, 1)
        with pytest.raises(CoordinatorLinkError):
            await arena.remote_client(0).join()
        assert identity(0) in arena.service.host.pending
        assert arena.service.num_connections == 0
        await host.client.close()
        guest = arena.remote_client(0)  # now the key is free
        await guest.join()
        await guest.close()

    run(work)


def test_it_takes_the_place_of_a_connection_with_its_key() -> None:
    async def work(arena: HostedArena) -> None:
        guest = arena.remote_client(0)
        await guest.join()
        since = dict(arena.service.host._pending)
        (host,) = await joined(arena, 1)
        assert arena.service.num_connections == 0
        assert arena.service.host._pending == since  # it never left
        await guest.close()
        await host.client.close()
        assert not arena.service.host.pending

    run(work)


def test_the_same_participant_cannot_be_in_twice() -> None:
    async def work(arena: HostedArena) -> None:
        (host,) = await joined(arena, 1)
        with pytest.raises(ConfigurationError, match="already"):
            await arena.client(0).join()
        assert identity(0) in arena.service.host.pending
        await host.client.close()
        await arena.client(0).join()

    run(work)


def test_the_rules_of_the_run_are_the_same_for_it() -> None:
    async def work(arena: HostedArena) -> None:
        arena.service.host._allowed = frozenset({key(9).public})
        with pytest.raises(JoinRefusedError, match="not on the list"):
            await arena.client(0).join()
        arena.service.host._allowed = None
        arena.service.host._max_pending = 1
        await arena.client(0).join()
        with pytest.raises(JoinRefusedError, match="waiting already"):
            await arena.client(1).join()

    run(work)


def test_one_that_leaves_is_out_of_the_run_though_the_server_goes_on() -> None:
    async def work(arena: HostedArena) -> None:
        host, other = await joined(arena, 2)
        await host.client.close()
        await host.client.close()
        assert list(arena.service.host.pending) == [identity(1)]
        await arena.advance(1)
        assert other.client.state is arena.state

    run(work)


def test_its_states_end_with_the_server() -> None:
    async def work(arena: HostedArena) -> None:
        (host,) = await joined(arena, 1)
        await arena.server.close()
        assert [state async for state in host.client.states()] == [arena.state]

    run(work)


def test_it_is_told_when_the_server_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(arena: HostedArena) -> None:
        def broken(self: RunHost, now: int, seed: int) -> list[object]:
            raise RuntimeError("no more ticks")

        (host,) = await joined(arena, 1)
        monkeypatch.setattr(RunHost, "tick", broken)
        with pytest.raises(CoordinatorLinkError, match="no more ticks"):
            await host.until(lambda state: state != dummy_run())

    run(work)


def test_it_sees_each_phase_at_once_and_not_with_the_next_tick() -> None:
    async def work(arena: HostedArena) -> None:
        followers = await joined(arena, 3)
        await arena.advance(3)
        await until_true(lambda: arena.state.run_state is RunState.WARMUP)
        for follower in followers:
            await follower.in_phase(RunState.WARMUP)
        ticks = arena.service.ticks
        arena.service.tick = lambda now: None  # type: ignore[method-assign]  # time stands still
        for follower in followers:
            index = follower.index()
            await follower.client.warmup_witness(Witness(WitnessProof(index, index, False)))
        for follower in followers:
            await follower.in_phase(RunState.ROUND_TRAIN)
        assert arena.service.ticks == ticks

    run(work)
