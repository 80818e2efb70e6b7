"""The swarm within one process keeps the promises of every swarm, and its weather is as ordered."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable

import pytest
from typing_extensions import override

from distro_optim.comm.announcements import InboxLimits
from distro_optim.comm.swarm import Swarm
from distro_optim.errors import BlobUnavailableError, ConfigurationError, HashMismatchError, StoreFullError
from distro_optim.testing.swarm import MemoryNetwork, MemorySwarm
from distro_optim.testing.swarm_checks import CHECKS, SwarmArena

pytestmark = pytest.mark.waiting


class MemoryArena(SwarmArena):
    def __init__(self) -> None:
        self.network = MemoryNetwork(latency=(0.0, 0.002), seed=3)
        self.swarms: list[MemorySwarm] = []

    @override
    async def make(self, *, allowed: Iterable[bytes] | None = None, queued_per_sender: int | None = None) -> Swarm:
        limits = InboxLimits(queued_per_sender=queued_per_sender) if queued_per_sender else None
        self.swarms.append(self.network.join(allowed=allowed, inbox_limits=limits))
        return self.swarms[-1]

    @override
    async def settle(self) -> None: ...

    @override
    async def __aexit__(self, *_: object) -> None:
        for swarm in self.swarms:
            await swarm.aclose()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_memory_swarm_keeps_every_promise(check: Callable[[SwarmArena], Awaitable[None]]) -> None:
    async def run() -> None:
        async with MemoryArena() as arena:
            await check(arena)

    asyncio.run(run())


def test_a_partition_keeps_the_sides_apart_until_it_heals() -> None:
    async def run() -> None:
        network = MemoryNetwork(seed=1)
        alice, bob, carol = network.join(), network.join(), network.join()
        ticket = await alice.publish(b"data", "tag")
        network.partition([alice.peer_id], [bob.peer_id, carol.peer_id])
        await alice.announce(b"unheard")
        await carol.announce(b"heard")
        assert (await anext(bob.announcements())).data == b"heard"
        assert [info.id for info in bob.peers()] == [carol.peer_id]
        with pytest.raises(BlobUnavailableError):
            await bob.fetch(ticket, max_size=100)
        network.heal()
        await alice.announce(b"again")
        assert (await anext(bob.announcements())).data == b"again"
        assert await bob.fetch(ticket, max_size=100) == b"data"

    asyncio.run(run())


def test_what_is_under_way_when_the_network_is_cut_is_lost() -> None:
    async def run() -> None:
        network = MemoryNetwork(latency=(0.001, 0.001))
        alice, bob = network.join(), network.join()
        await alice.announce(b"lost")
        network.partition([alice.peer_id])
        await asyncio.sleep(0.005)
        network.heal()
        await alice.announce(b"found")
        assert (await anext(bob.announcements())).data == b"found"

    asyncio.run(run())


def test_loss_takes_its_share_and_the_seed_decides_which() -> None:
    async def heard(seed: int) -> list[bytes]:
        network = MemoryNetwork(loss=0.3, seed=seed)
        alice, bob = network.join(), network.join()
        for number in range(200):
            await alice.announce(b"%d" % number)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await bob.aclose()
        return [announcement.data async for announcement in bob.announcements()]

    first = asyncio.run(heard(5))
    assert 110 < len(first) < 170
    assert first == asyncio.run(heard(5)) != asyncio.run(heard(6))


def test_a_corrupting_provider_is_found_out_and_another_asked() -> None:
    async def run() -> None:
        network = MemoryNetwork()
        liar, honest, client = network.join(), network.join(), network.join()
        ticket = await liar.publish(b"data" * 100, "tag")
        await honest.fetch(ticket, max_size=1000, tag="tag")
        network.corrupt(liar.peer_id)
        with pytest.raises(BlobUnavailableError) as error:
            await client.fetch(ticket, max_size=1000)
        assert isinstance(error.value.attempts[0][1], HashMismatchError)
        assert await client.fetch(ticket, [honest.peer_id], max_size=1000) == b"data" * 100

    asyncio.run(run())


def test_a_full_store_says_so_and_forgetting_makes_room() -> None:
    async def run() -> None:
        swarm = MemoryNetwork().join(max_bytes=1000)
        await swarm.publish(bytes(900), "old_1")
        with pytest.raises(StoreFullError):
            await swarm.publish(b"x" * 200, "new")
        assert swarm.forget(lambda tag: tag.startswith("old")) == 1
        await swarm.publish(b"x" * 200, "new")

    asyncio.run(run())


@pytest.mark.parametrize("options", [{"latency": (1.0, 0.0)}, {"latency": (-1.0, 0.0)}, {"loss": 1.5}])
def test_impossible_weather_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        MemoryNetwork(**options)  # type: ignore[arg-type]
